"""What the bindings make of tensors: python_bindings/cuda.cpp as it is, on GPUs that are not there
(tools/gpu/cuda/fake_gpu.cpp), its launches executed by the PTX emulator.
"""

from dataclasses import replace

import pytest
import torch

import ctkernels as ct
from ctkernels import dispatch
from ctkernels.backends.triton.call import tf32_allowed
from ctkernels.prepare import NOTHING
from ctkernels.problem import Problem
from ctkernels.testing.backends import Backend
from ctkernels.testing.calls import Call, cotangents_for, make_call, run
from ctkernels.testing.compare import assert_matches
from tools.gpu.cuda import fake_gpu, plan
from tools.gpu.cuda.emulated import shipped

pytestmark = [
    pytest.mark.needs_nvcc,
    pytest.mark.skipif(torch.version.cuda is not None, reason="the tests of the op run the bindings on a true GPU"),
]
BACKEND = Backend("cuda-bindings")
# not the bounds: the bindings allocate what no test knows of
CHECKS = ("uninitialised_shared", "shared_race", "sync")
launched: list[str] = []


def execute(kernel, grid, threads, shared, args) -> None:
    """Runs what the bindings launch."""
    launched.append(kernel)
    shipped().module(kernel).launch(kernel, grid, threads, [args], shared_bytes=shared, check=CHECKS)


@pytest.fixture(scope="module", autouse=True)
def bindings():
    """Inside, backend "cuda-bindings" computes CPU tensors."""
    dispatch.BACKENDS[BACKEND.name] = (__name__, ("cpu",))
    with fake_gpu.launching(execute):
        yield
    del dispatch.BACKENDS[BACKEND.name]


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """New tensors hold NaN where nothing was written yet."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    launched.clear()
    yield
    torch.use_deterministic_algorithms(before)


def unavailable() -> None:
    return None


def tables(*args):
    *tensors, problem, backward = fake_gpu.to_gpu(args)
    return fake_gpu.to_cpu(torch.ops.ctkernels.cuda_tables(*tensors, *problem, backward))


def order(x):
    return torch.ops.ctkernels.cuda_order(fake_gpu.to_gpu(x))


def forward(*args, prepared=NOTHING):
    *tensors, problem = fake_gpu.to_gpu(args)
    made, _, *prefixes = fake_gpu.to_gpu(prepared)
    return fake_gpu.to_cpu(torch.ops.ctkernels.cuda_forward(*tensors, *problem, made, *prefixes))


def backward(*args, prepared=NOTHING):
    *tensors, problem = fake_gpu.to_gpu(args)
    _, made, *prefixes = fake_gpu.to_gpu(prepared)
    return fake_gpu.to_cpu(torch.ops.ctkernels.cuda_backward(*tensors, *problem, made, *prefixes))


def test_launches_replayed_with_another_seed_in_memory_drop_its_tokens():
    """As in a captured graph: the arguments stay as they were recorded, and so does the memory that they point to."""
    seed, recorded = torch.tensor([5]), []

    def record(*launch) -> None:
        recorded.append(launch)
        execute(*launch)
        if "forward" in launch[0] or "keys" in launch[0]:  # the last one of a pass, whose memory is there until it ends
            seed.fill_(-9)
            for again in recorded:
                execute(*again)
            recorded.clear()
            seed.fill_(5)

    def call(seed) -> Call:
        return make_call(H=4, Hk=2, P=100, D=64, types="bf16", lens=[5, 17, 30], mask=dict(drop_p=0.3, seed=seed))

    cotangents = cotangents_for(call(0))
    with fake_gpu.launching(record):
        got = run(call(seed), BACKEND, cotangents)
    assert not recorded
    expected, before = (run(call(number), BACKEND, cotangents) for number in (-9, 5))
    assert all(torch.equal(got[name], x) for name, x in expected.items())
    assert not torch.equal(expected["out"], before["out"])


def check(call: Call, layout: str = "plain") -> dict[str, torch.Tensor]:
    cotangents = cotangents_for(call, layout=layout)
    got = run(call, BACKEND, cotangents)
    assert_matches(call, got, cotangents)
    return got


def test_packed_rows_with_master_weights():
    """Spans, dropout, int64 row ids, an fp32 prefix whose gradient is fp32."""
    mask = dict(
        hidden=torch.tensor([[0, 25], [25, 50], [0, 0], [75, 100]]),
        drop_p=0.2,
        seed=2**63 + 5,
        row_ids=torch.tensor([3, 1, 4, 2**32 - 1]),
    )
    got = check(make_call(H=4, Hk=2, P=100, D=64, types="bf16+fp32", lens=[5, 17, 0, 30], mask=mask))
    assert got["dprefix_k"].dtype == torch.float32 and got["dq"].dtype == torch.bfloat16
    assert {"ctk_setup_rows", "ctk_pack", "ctk_forward_bf16_64_plain", "ctk_keys_bf16_64_plain"} <= set(launched)


@pytest.mark.parametrize("bias", [(90,), (6, 90), (2, 6, 90)])
def test_every_option(bias):
    """Two prefixes, padded decoding rows, a bias of each shape, int32 and int64 vectors, strided ones, a pattern."""
    keep = torch.rand(90, 4, generator=torch.Generator().manual_seed(1)).t() < 0.7
    call = make_call(
        B=4, H=6, Hk=2, S=7, T=20, P=90, D=40, G=2, types="bf16", bias=bias, mask=dict(keep=keep),
        prefix_index=torch.tensor([1, 9, 0, 9, 1, 9, 1, 9])[::2], prefix_lens=torch.tensor([90, 61], dtype=torch.int32),
        seq_lens=torch.tensor([20, 9, 7, 15], dtype=torch.int32), window=60, softcap=15.0, causal=True,
        alibi_slopes=torch.linspace(0.01, 0.3, 6),
    )  # fmt: skip
    got = check(call, "expanded")
    assert got["dprefix_bias"].shape == bias and got["dprefix_k"].dtype == torch.bfloat16


@pytest.mark.parametrize("D, Dv", [(24, 64), (64, 24), (264, 20)])
def test_values_of_a_head_dimension_of_their_own(D, Dv):
    """Results and gradients have the columns of their own tensors; an fp32 prefix under rows that are padded."""
    call = make_call(B=2, H=4, Hk=2, S=9, P=70, D=D, Dv=Dv, types="bf16+fp32", seq_lens=torch.tensor([9, 4]))
    got = check(call, "transposed")
    assert got["out"].shape[-1] == got["dprefix_v"].shape[-1] == Dv and got["dq"].shape[-1] == D


def test_padding():
    """Queries and keys behind the end of a row: zeros, and lse = -inf."""
    got = check(make_call(B=3, H=4, Hk=2, S=20, P=70, D=64, types="bf16", seq_lens=torch.tensor([20, 0, 7])))
    assert got["out"][1].eq(0).all() and got["lse"][2, :, 7:].isneginf().all()
    assert all(got[name][2, :, 7:].eq(0).all() for name in ("dq", "dk", "dv"))


@pytest.mark.parametrize("sizes", [dict(lens=[5, 9, 7]), dict(B=2, S=9, seq_lens=torch.tensor([9, 4]))], ids=str)
def test_nothing_is_filled_before_the_kernels_run(sizes):
    """Also not what belongs to no row: the kernels write it."""
    torch.use_deterministic_algorithms(False)  # which fills new memory
    call = make_call(H=4, Hk=2, P=20, D=64, types="bf16", **sizes)
    cotangents = cotangents_for(call)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(call, BACKEND, cotangents)
    names = [event.name for event in profile.events()]
    kernels = ("cuda_forward", "cuda_backward")
    inside = [x for x in profile.events() if x.name.endswith(kernels)]
    assert len(inside) == 2, names
    assert not {child.name for x in inside for child in x.cpu_children} & {"aten::fill_", "aten::zero_", "aten::zeros"}


def test_what_is_prepared():
    """Tables of both directions and a rounded prefix give the same bits; those of another call are refused."""
    call = make_call(H=4, Hk=2, P=100, D=64, types="bf16+fp32", lens=[5, 17, 3], mask=dict(drop_p=0.3, seed=3))
    cotangents = cotangents_for(call)
    expected = run(call, BACKEND, cotangents)
    launched.clear()
    t = {name: x.detach().requires_grad_() for name, x in call.tensors.items()}
    mask = ct.prepare(ct.ContextMask(**call.mask), [(t["prefix_k"], t["prefix_v"])])
    for _ in range(2):
        launched.clear()
        out, lse = ct.prefix_attention_varlen(
            t["q"], t["k"], t["v"], call.cu_seqlens, t["prefix_k"], t["prefix_v"], mask, return_lse=True,
            backend=BACKEND.name,
        )  # fmt: skip
        gradients = torch.autograd.grad((out, lse), list(t.values()), cotangents)
    assert not {"ctk_setup_rows", "ctk_setup_tiles", "ctk_pack"} & set(launched)
    assert torch.equal(out, expected["out"]) and torch.equal(lse, expected["lse"])
    assert all(torch.equal(x, expected[f"d{name}"]) for name, x in zip(t, gradients, strict=True))
    for name, wrong in (
        ("tables", torch.zeros(8, dtype=torch.uint8)),
        ("prepared_prefix_k", torch.zeros(1, 2, 10, 64)),
        ("prepared_prefix_v", torch.zeros(1, 2, 11, 64, dtype=torch.bfloat16)),
    ):
        with pytest.raises(ValueError, match=name.removeprefix("prepared_")):
            call_directly(**{name: wrong})


def test_a_window_without_end():
    """Sums of positions and the window stay in 64 bits."""
    check(make_call(B=2, H=2, Hk=1, S=9, P=20, D=64, types="bf16", window=2**63 - 1))


def test_tokens_behind_the_last_packed_row():
    """Values are not looked at on a GPU: what belongs to no row is zero, and not what memory held."""
    call = make_call(H=4, Hk=2, P=20, D=64, types="bf16", lens=[5, 9, 7])
    bounds = torch.tensor([0, 5, 14, 14], dtype=torch.int32)
    got = run(replace(call, cu_seqlens=bounds), BACKEND, cotangents_for(call))
    assert got["out"][14:].eq(0).all() and got["lse"][:, 14:].isneginf().all()
    assert all(got[name][14:].eq(0).all() for name in ("dq", "dk", "dv"))
    assert all(x.isfinite().all() for name, x in got.items() if name != "lse")


def test_tensors_that_are_read_in_place():
    """Transposed rows as models pass them, and a window of a larger prefix: nothing is copied."""
    call = make_call(B=2, H=4, Hk=2, S=9, P=70, D=64, types="bf16", window_prefix=False)
    call = call.with_tensors(
        q=call.tensors["q"].transpose(1, 2).contiguous().transpose(1, 2),
        prefix_k=torch.cat([call.tensors["prefix_k"]] * 2, dim=1)[:, 70:],
    )
    check(call, "transposed")
    assert "ctk_pack" not in launched


def test_fp32_is_exact_unless_tf32_is_allowed():
    """As in PyTorch: the flag that the kernels get follows torch's own. Nothing is executed."""
    received = []

    def record(kernel, grid, threads, shared, args):
        if kernel.startswith("ctk_forward"):
            received.append(args)

    call = make_call(B=2, H=2, Hk=1, S=5, P=70, D=64, types="fp32")
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        with fake_gpu.launching(record):
            for allowed in (False, True):
                matmul.allow_tf32 = allowed
                run(call, BACKEND)
                run(call.with_tensors(**{name: x.half() for name, x in call.tensors.items()}), BACKEND)
                assert tf32_allowed() == allowed
            matmul.fp32_precision = "ieee"  # torch's newer way to say so, after which the old one must not be read
            run(call, BACKEND)
            assert not tf32_allowed()
    finally:
        matmul.fp32_precision = "none"
        matmul.allow_tf32 = before
    # Args begins with its Call
    assert [args[plan.Call.tf32.offset] for args in received] == [0, 0, 1, 0, 0]


def test_only_what_is_asked_for_is_computed():
    call = make_call(B=2, H=4, Hk=2, S=9, P=70, D=64, types="bf16")
    full = run(call, BACKEND, cotangents_for(call))
    t = call.tensors
    t["prefix_v"].requires_grad_()
    launched.clear()
    out = ct.prefix_attention(t["q"], t["k"], t["v"], t["prefix_k"], t["prefix_v"], backend=BACKEND.name)
    (grad,) = torch.autograd.grad(out, [t["prefix_v"]], cotangents_for(call)[0])
    assert not [name for name in launched if "query" in name]
    assert torch.equal(grad, full["dprefix_v"])  # dv does not depend on dlse


@pytest.mark.parametrize(
    "sizes", [dict(B=0), dict(S=0, T=0), dict(lens=[0, 0]), dict(P=0), dict(P=0, bias=(0,))], ids=str
)
def test_nothing_to_do_gives_zero_gradients(sizes):
    check(make_call(H=4, Hk=2, D=64, types="bf16+fp32", **sizes))


def call_directly(**changes):
    """The operator, past attention.py: the arguments of a small call, with changes; "meta" stands for another GPU."""
    call = make_call(B=3, H=4, Hk=2, S=5, P=11, D=64, types="fp32")
    problem = dict.fromkeys(Problem._fields) | dict(
        context_length=11, drop_p=0.0, seed=0, scale=0.1, causal=True, window=0, window_prefix=True, softcap=0.0
    )
    t = {name: x[None] if x.dim() == 3 else x for name, x in call.tensors.items()}
    arguments = t | dict(prefix_bias=None) | problem
    arguments |= dict(tables=None, prepared_prefix_k=None, prepared_prefix_v=None)
    assert changes.keys() <= arguments.keys()

    def place(x):
        if not isinstance(x, torch.Tensor):
            return x
        return fake_gpu.to_gpu(torch.zeros_like(x, device="cpu"), 1) if x.is_meta else fake_gpu.to_gpu(x)

    return torch.ops.ctkernels.cuda_forward(**{name: place(x) for name, x in {**arguments, **changes}.items()})


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(k=torch.zeros(3, 2, 4, 64)), ("q", "k", "do not fit")),
        (dict(q=torch.zeros(3, 4, 5, 64, dtype=torch.bfloat16)), ("do not fit",)),
        (dict(prefix_v=torch.zeros(1, 2, 10, 64)), ("prefix_v", "[1, 2, 10, 64]")),
        (dict(prefix_k=torch.zeros(0, 2, 11, 64), prefix_v=torch.zeros(0, 2, 11, 64)), ("prefix_k", "G = 0")),
        (dict(prefix_k=torch.zeros(1, 2, 11, 64, device="meta")), ("cuda:0", "cuda:1")),
        (dict(seq_lens=torch.zeros(2, dtype=torch.int32)), ("seq_lens", "[3]", "[2]")),
        (dict(seq_lens=torch.zeros(3)), ("seq_lens", "int32 or int64", "Float")),
        (dict(hidden=torch.zeros(3, 2, dtype=torch.int64, device="meta")), ("hidden", "cuda:1")),
        (dict(keep=torch.zeros(3, 11, dtype=torch.uint8)), ("keep", "bool")),
        (dict(cu_seqlens=torch.zeros(0, dtype=torch.int32)), ("cu_seqlens", "[B+1]")),
        (dict(prefix_bias=torch.zeros(1, 2, 11)), ("prefix_bias", "[1, 2, 11]")),
        (dict(prefix_bias=torch.zeros(1, 4, 11, device="meta")), ("prefix_bias", "cuda:0", "cuda:1")),
        (dict(alibi_slopes=torch.zeros(2)), ("alibi_slopes", "[4]")),
        (dict(drop_p=1.0), ("drop_p", "[0, 1)", "1")),
        (dict(window=-3), ("window", "-3")),
        (dict(context_length=-1), ("context_length", "-1")),
    ],
)
def test_inconsistent_arguments_are_refused_by_name(changes, words):
    with pytest.raises((ValueError, TypeError)) as caught:
        call_directly(**changes)
    assert all(word in str(caught.value) for word in words), caught.value
    assert launched == []


def test_fp64_is_refused():
    x = {name: torch.zeros(3, h, 5, 64, dtype=torch.float64) for name, h in (("q", 4), ("k", 2), ("v", 2))}
    prefix = torch.zeros(1, 2, 11, 64, dtype=torch.float64)
    with pytest.raises(TypeError, match="q must be fp32, bf16 or fp16, got Double"):
        call_directly(**x, prefix_k=prefix, prefix_v=prefix)


def test_more_queries_than_the_tables_count_are_refused():
    """Before anything is allocated: the rows here are views of 64 numbers."""
    rows = {name: torch.zeros(64).expand(3, heads, 2**28, 64) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    with pytest.raises(ValueError, match="fewer than 1073741824"):
        call_directly(**rows)
