"""The triton backend under Triton's interpreter: a part of the op's suite, in processes that have TRITON_INTERPRET=1.

All of it, which takes about an hour: `TRITON_INTERPRET=1 pytest tests/op -k triton`, in `make test-gpu-full`.
"""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

EDGES = (
    "packed rows, some empty",
    "no rows and no tokens",
    "head dimension 80",
    "seven heads per KV head",
    "long prefix",
    "context in own keys only",
    "span, keep and dropout at once",
    "context longer than all keys",
    "ragged prefixes with a window and ALiBi",
    "decoding with fewer keys, window and ALiBi",
    "bidirectional packed rows with a window",
    "bias shared by prefixes",
    "values wider than keys",
    "decoding with values narrower than keys",
    "sinks of rows that see nothing",
    "everything packed",
)
PROPERTIES = (
    "test_permuting_rows_permutes_results_exactly[triton-packed-bf16+fp32]",
    "test_a_broken_row_breaks_no_other[triton-packed]",
    "test_queries_that_see_a_broken_value_say_so[triton]",
    "test_padding_is_zero_and_stays_out_of_everything[triton]",
    "test_keys_hidden_from_everybody_may_hold_nan[triton]",
    "test_no_gradient_reaches_hidden_or_dropped_tokens[triton]",
    "test_prompt_rows_get_no_gradient_in_what_they_hide[triton]",
    "test_queries_that_see_nothing[triton]",
    "test_same_dropped_tokens_as_the_dense_mask[triton]",
    "test_backward_drops_what_forward_dropped[triton]",
)
OTHERS = (
    "test_accuracy.py::test_decoding_at_most_twice_the_error_of_eager_pytorch[triton-bf16+fp32]",
    "test_edges.py::test_prefix_keys_with_a_bias_of_minus_infinity[triton]",
    "test_edges.py::test_only_keys_with_a_bias_of_minus_infinity[triton]",
    "test_errors.py::test_kernels_refuse_tensors_of_a_foreign_device[triton]",
    "test_errors.py::test_operators_called_directly_do_not_leave_memory[triton]",
    "test_library.py::test_opcheck[triton-everything]",
    "test_library.py::test_compiled_fullgraph_gives_the_same_for_packed_rows[triton]",
)
SELECTIONS = {
    "edges-fp32": [f"test_edges.py::test_edge[triton-{case}-fp32]" for case in EDGES],
    "edges-bf16": [f"test_edges.py::test_edge[triton-{case}-bf16+fp32]" for case in EDGES[-6:]],
    "properties": [f"test_properties.py::{name}" for name in PROPERTIES],
    "others": list(OTHERS),
    "kernels": ["../backends/triton/interpreted.py", "../backends/triton/prepared.py"],
}


@pytest.mark.parametrize("selection", SELECTIONS)
def test_under_the_interpreter(selection, pytestconfig):
    folder = pytestconfig.rootpath / "tests" / "op"
    tests = [str((folder / name.split("::")[0]).resolve()) + name[name.find("::") :] * ("::" in name)
             for name in SELECTIONS[selection]]  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=pytestconfig.rootpath, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


SCRIPT = """
import torch
import ctkernels as ct

generator = torch.Generator().manual_seed(0)
shapes = [(2, 4, 3, 16), (2, 2, 3, 16), (2, 2, 3, 16), (2, 9, 16), (2, 9, 16)]
for dtype in (torch.bfloat16, torch.float16):
    tensors = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    results = []
    for backend in ("triton", "reference"):
        out = ct.prefix_attention(*tensors, backend=backend)
        results.append((out, *torch.autograd.grad(out.float().sum(), tensors)))
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=2e-2, atol=2e-2)
"""


def test_16_bit_rows_outside_of_the_tests():
    """Would catch: a repair of the interpreter's bf16 that only the tests make."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


UNKNOWN = """
import torch
from triton.runtime import interpreter
del interpreter.InterpreterBuilder.create_dot
import ctkernels as ct
x = torch.zeros(1, 1, 1, 16)
ct.prefix_attention(x, x, x, x[0], x[0], backend="triton")
"""


def test_an_interpreter_that_cannot_be_repaired_is_refused():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", UNKNOWN], env=environment, capture_output=True, text=True)
    assert "backend='triton' is unavailable: the interpreter of Triton" in done.stderr, done.stderr[-2000:]
