"""Every violated precondition is refused before a kernel runs, with a message that says what, expected and got."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch

import ctkernels as ct
from ctkernels import dispatch
from ctkernels.testing.backends import Backend, backends
from ctkernels.testing.calls import Call, call_op, make_call

from .test_gradients import Recorder

Z = torch.zeros
LONG = dict(dtype=torch.long)


@dataclass
class Wrong:
    """A valid call (B=3, H=4, Hk=2, S=T=5, P=11, D=8) with one thing wrong, and words its message must hold.

    by_value: found by reading values, which is done on the CPU alone.
    """

    words: tuple[str, ...]
    tensors: dict[str, Callable | torch.Tensor | object] = field(default_factory=dict)
    options: dict[str, object] = field(default_factory=dict)
    mask: dict[str, object] | None = None
    sizes: dict[str, object] = field(default_factory=dict)
    error: type[Exception] = ValueError
    by_value: bool = False

    def call(self, device: str) -> Call:
        call = make_call(**{"types": "fp32", **self.sizes})
        for name, change in self.tensors.items():
            call.tensors[name] = change(call.tensors[name]) if callable(change) else change
        call.options.update(self.options)
        return on(device, call if self.mask is None else call.with_mask(**self.mask))


def on(device: str, call: Call) -> Call:
    """The call with its tensors of the CPU on a device; those on "meta" stay there."""

    def move(x: object) -> object:
        return x.to(device) if isinstance(x, torch.Tensor) and x.device.type == "cpu" else x

    mask = None if call.mask is None else {name: move(x) for name, x in call.mask.items()}
    tensors, options = ({name: move(x) for name, x in given.items()} for given in (call.tensors, call.options))
    return replace(call, tensors=tensors, mask=mask, options=options, cu_seqlens=move(call.cu_seqlens))


def integers(*values: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def row_keep(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


PADDED = {
    # rows
    "q of three dimensions": Wrong(("q", "[B, H, S, D]", "(4, 5, 8)"), dict(q=lambda q: q[0])),
    "q not a tensor": Wrong(("q", "tensor", "list"), dict(q=[1.0]), error=TypeError),
    "k of three dimensions": Wrong(("k", "[B, Hk, T, D]", "(2, 5, 8)"), dict(k=lambda k: k[0])),
    "v of five dimensions": Wrong(("v", "[B, Hk, T, D]", "(1, 3, 2, 5, 8)"), dict(v=lambda v: v[None])),
    "k not a tensor": Wrong(("k", "tensor", "NoneType"), dict(k=None), error=TypeError),
    "k of another batch": Wrong(("k", "3", "(2, 2, 5, 8)"), dict(k=lambda k: k[:2])),
    "v of another batch": Wrong(("v", "(3, 2, 5, 8)", "(2, 2, 5, 8)"), dict(v=lambda v: v[:2])),
    "fewer keys than queries": Wrong(("k", "T >= S", "5", "4"), sizes=dict(S=5, T=4)),
    "v shorter than k": Wrong(("v", "(3, 2, 5, 8)", "(3, 2, 4, 8)"), dict(v=lambda v: v[:, :, :4])),
    "k of another head dimension": Wrong(("k", "D = 8", "7"), dict(k=lambda k: k[..., :7])),
    "v of another head dimension than prefix_v": Wrong(("prefix_v", "7 as v", "8)"), dict(v=lambda v: v[..., :7])),
    "prefix_v of another head dimension than v": Wrong(
        ("prefix_v", "8 as v", "7)"), dict(prefix_v=lambda x: x[..., :7])
    ),
    "heads that do not divide": Wrong(("q", "multiple", "H = 5", "Hk = 2"), sizes=dict(H=5)),
    "more KV heads than heads": Wrong(("multiple", "H = 2", "Hk = 4"), sizes=dict(H=2, Hk=4)),
    "no KV heads": Wrong(("Hk", "0"), sizes=dict(Hk=0)),
    "head dimension 513": Wrong(("q", "D", "512", "513"), sizes=dict(D=513)),
    "values of head dimension 513": Wrong(("v", "Dv", "512", "513"), sizes=dict(Dv=513)),
    "head dimension 0": Wrong(("q", "D", "0"), sizes=dict(D=0)),
    "values of head dimension 0": Wrong(("v", "Dv", "0"), sizes=dict(Dv=0)),
    "integer q": Wrong(("q", "fp32", "int64"), dict(q=lambda q: q.long()), error=TypeError),
    "k of another type": Wrong(("k", "float32", "bfloat16"), dict(k=lambda k: k.bfloat16()), error=TypeError),
    "v of another type": Wrong(("v", "float32", "float64"), dict(v=lambda v: v.double()), error=TypeError),
    "k on another device": Wrong(("k", "device", "meta"), dict(k=lambda k: k.to("meta"))),
    "v on another device": Wrong(("v", "device", "meta"), dict(v=lambda v: v.to("meta"))),
    # prefix
    "prefix_k of two dimensions": Wrong(("prefix_k", "[Hk, P, D]", "(11, 8)"), dict(prefix_k=lambda x: x[0])),
    "prefix_v of two dimensions": Wrong(("prefix_v", "[Hk, P, D]", "(11, 8)"), dict(prefix_v=lambda x: x[0])),
    "prefix_k not a tensor": Wrong(("prefix_k", "tensor", "NoneType"), dict(prefix_k=None), error=TypeError),
    "prefix_k of other heads": Wrong(("prefix_k", "Hk = 2", "(1,"), dict(prefix_k=lambda x: x[:1])),
    "prefix_v of other heads": Wrong(("prefix_v", "Hk = 2", "(1,"), dict(prefix_v=lambda x: x[:1])),
    "prefix_k of another head dimension": Wrong(("prefix_k", "8 as k", "7)"), dict(prefix_k=lambda x: x[..., :7])),
    "prefix_v shorter": Wrong(("prefix_v", "11", "10"), dict(prefix_v=lambda x: x[:, :10])),
    "prefixes of different ranks": Wrong(("prefix_", "(2, 11, 8)"), dict(prefix_v=lambda x: x[None])),
    "prefix_k of another type": Wrong(
        ("prefix_k", "float32", "bfloat16"), dict(prefix_k=lambda x: x.bfloat16()), error=TypeError
    ),
    "fp64 prefix with bf16 rows": Wrong(
        ("prefix_k", "bfloat16", "float64"),
        dict(prefix_k=lambda x: x.double(), prefix_v=lambda x: x.double()),
        sizes=dict(types="bf16"),
        error=TypeError,
    ),
    "fp32 prefix with fp64 rows": Wrong(
        ("prefix_k", "float64", "float32"),
        dict(prefix_k=lambda x: x.float(), prefix_v=lambda x: x.float()),
        sizes=dict(types="fp64"),
        error=TypeError,
    ),
    "prefixes of two types": Wrong(
        ("prefix_v", "float32", "bfloat16"),
        dict(prefix_v=lambda x: x.bfloat16()),
        sizes=dict(types="bf16+fp32"),
        error=TypeError,
    ),
    "prefix_k on another device": Wrong(("prefix_k", "device", "meta"), dict(prefix_k=lambda x: x.to("meta"))),
    "prefix_v on another device": Wrong(("prefix_v", "device", "meta"), dict(prefix_v=lambda x: x.to("meta"))),
    # which prefix
    "several prefixes without an index": Wrong(("prefix_index", "G = 3", "None"), sizes=dict(G=3)),
    "prefix_index out of range": Wrong(
        ("prefix_index", "2]", "3"), dict(), dict(prefix_index=integers(0, 3, 1)), sizes=dict(G=3), by_value=True
    ),
    "prefix_index far out of range": Wrong(
        ("prefix_index", "2]", str(2**40)),
        dict(),
        dict(prefix_index=integers(0, 2**40, 1)),
        sizes=dict(G=3),
        by_value=True,
    ),
    "negative prefix_index": Wrong(
        ("prefix_index", "[0", "-1"), dict(), dict(prefix_index=integers(0, -1, 1)), sizes=dict(G=3), by_value=True
    ),
    "prefix_index of two rows": Wrong(
        ("prefix_index", "[3]", "(2,)"), dict(), dict(prefix_index=integers(0, 1)), sizes=dict(G=3)
    ),
    "prefix_index of two dimensions": Wrong(
        ("prefix_index", "[3]", "(3, 1)"), dict(), dict(prefix_index=Z(3, 1, **LONG)), sizes=dict(G=3)
    ),
    "floating prefix_index": Wrong(
        ("prefix_index", "int", "float32"), dict(), dict(prefix_index=Z(3)), sizes=dict(G=3), error=TypeError
    ),
    "prefix_index as a list": Wrong(
        ("prefix_index", "tensor", "list"), dict(), dict(prefix_index=[0, 0, 0]), sizes=dict(G=3), error=TypeError
    ),
    "prefix_index for the only prefix, out of range": Wrong(
        ("prefix_index", "1"), dict(), dict(prefix_index=integers(0, 1, 0)), by_value=True
    ),
    "rows but no prefixes": Wrong(("prefix_", "0"), sizes=dict(G=0)),
    "prefix_lens too long": Wrong(("prefix_lens", "11]", "12"), dict(), dict(prefix_lens=integers(12)), by_value=True),
    "prefix_lens negative": Wrong(("prefix_lens", "[0", "-1"), dict(), dict(prefix_lens=integers(-1)), by_value=True),
    "prefix_lens of two prefixes": Wrong(("prefix_lens", "[1]", "(2,)"), dict(), dict(prefix_lens=integers(3, 4))),
    "floating prefix_lens": Wrong(("prefix_lens", "int", "float32"), dict(), dict(prefix_lens=Z(1)), error=TypeError),
    "prefix_lens on another device": Wrong(
        ("prefix_lens", "device", "meta"), dict(), dict(prefix_lens=integers(3).to("meta"))
    ),
    # ragged rows
    "seq_lens too long": Wrong(("seq_lens", "5]", "6"), dict(), dict(seq_lens=integers(5, 6, 1)), by_value=True),
    "seq_lens negative": Wrong(("seq_lens", "[0", "-2"), dict(), dict(seq_lens=integers(5, -2, 1)), by_value=True),
    "seq_lens of two rows": Wrong(("seq_lens", "[3]", "(2,)"), dict(), dict(seq_lens=integers(5, 1))),
    "floating seq_lens": Wrong(("seq_lens", "int", "float32"), dict(), dict(seq_lens=Z(3)), error=TypeError),
    "seq_lens on another device": Wrong(
        ("seq_lens", "device", "meta"), dict(), dict(seq_lens=integers(1, 1, 1).to("meta"))
    ),
    # mask
    "mask as a tensor": Wrong(("mask", "ContextMask", "bool"), dict(), dict(mask=row_keep(3, 11)), error=TypeError),
    "span beyond the context": Wrong(
        ("hidden", "11", "(3, 12)", "row 1"), mask=dict(hidden=torch.tensor([[0, 3], [3, 12], [0, 0]])), by_value=True
    ),
    "span far beyond the context": Wrong(
        ("hidden", "11", str(2**40)), mask=dict(hidden=torch.tensor([[0, 3], [3, 2**40], [0, 0]])), by_value=True
    ),
    "hidden of two rows": Wrong(("hidden", "[3, 2]", "(2, 2)"), mask=dict(hidden=Z(2, 2, **LONG))),
    "hidden on another device": Wrong(("hidden", "device", "meta"), mask=dict(hidden=Z(3, 2, **LONG).to("meta"))),
    "row_ids of two rows": Wrong(("row_ids", "[3]", "(2,)"), mask=dict(row_ids=integers(0, 1))),
    "keep of two rows": Wrong(("keep", "[3, 11]", "(2, 11)"), mask=dict(keep=row_keep(2, 11))),
    "keep of another length": Wrong(("keep", "[3, 11]", "(3, 9)"), mask=dict(keep=row_keep(3, 9))),
    "keep on another device": Wrong(("keep", "device", "meta"), mask=dict(keep=row_keep(3, 11).to("meta"))),
    # logits
    "scale not a number": Wrong(("scale", "number", "str"), dict(), dict(scale="0.1"), error=TypeError),
    "scale not finite": Wrong(("scale", "finite", "nan"), dict(), dict(scale=float("nan"))),
    "window of zero": Wrong(("window", "1", "0"), dict(), dict(window=0)),
    "negative window": Wrong(("window", "1", "-3"), dict(), dict(window=-3)),
    "window not an integer": Wrong(("window", "integer", "float"), dict(), dict(window=2.5), error=TypeError),
    "softcap of zero": Wrong(("softcap", "> 0", "0"), dict(), dict(softcap=0.0)),
    "negative softcap": Wrong(("softcap", "> 0", "-1"), dict(), dict(softcap=-1.0)),
    "softcap not finite": Wrong(("softcap", "finite", "inf"), dict(), dict(softcap=float("inf"))),
    "causal not a bool": Wrong(("causal", "bool", "str"), dict(), dict(causal="yes"), error=TypeError),
    "window_prefix not a bool": Wrong(
        ("window_prefix", "bool", "NoneType"), dict(), dict(window_prefix=None), error=TypeError
    ),
    "slopes of the KV heads": Wrong(("alibi_slopes", "[4]", "(2,)"), dict(), dict(alibi_slopes=Z(2))),
    "integer slopes": Wrong(
        ("alibi_slopes", "floating", "int64"), dict(), dict(alibi_slopes=Z(4, **LONG)), error=TypeError
    ),
    "slopes as a list": Wrong(
        ("alibi_slopes", "tensor", "list"), dict(), dict(alibi_slopes=[0.1] * 4), error=TypeError
    ),
    "slopes that want a gradient": Wrong(
        ("alibi_slopes", "gradient", "detach"), dict(), dict(alibi_slopes=torch.ones(4, requires_grad=True))
    ),
    "slopes on another device": Wrong(("alibi_slopes", "device", "meta"), dict(), dict(alibi_slopes=Z(4).to("meta"))),
    "bias of another length": Wrong(("prefix_bias", "[11]", "[4, 11]", "[1, 4, 11]", "(10,)"), dict(prefix_bias=Z(10))),
    "bias of the KV heads": Wrong(("prefix_bias", "[4, 11]", "(2, 11)"), dict(prefix_bias=Z(2, 11))),
    "bias of other prefixes": Wrong(("prefix_bias", "[1, 4, 11]", "(2, 4, 11)"), dict(prefix_bias=Z(2, 4, 11))),
    "bias of four dimensions": Wrong(("prefix_bias", "(1, 1, 4, 11)"), dict(prefix_bias=Z(1, 1, 4, 11))),
    "integer bias": Wrong(("prefix_bias", "floating", "int64"), dict(prefix_bias=Z(11, **LONG)), error=TypeError),
    "bias on another device": Wrong(("prefix_bias", "device", "meta"), dict(prefix_bias=Z(11).to("meta"))),
    "sinks of the KV heads": Wrong(("sinks", "[4]", "(2,)"), dict(sinks=Z(2))),
    "sinks of two dimensions": Wrong(("sinks", "[4]", "(4, 1)"), dict(sinks=Z(4, 1))),
    "a sink for all heads": Wrong(("sinks", "[4]", "()"), dict(sinks=Z(()))),
    "integer sinks": Wrong(("sinks", "floating", "int64"), dict(sinks=Z(4, **LONG)), error=TypeError),
    "sinks as a list": Wrong(("sinks", "tensor", "list"), dict(sinks=[0.1] * 4), error=TypeError),
    "sinks on another device": Wrong(("sinks", "device", "meta"), dict(sinks=Z(4).to("meta"))),
}


@pytest.mark.parametrize("case", [case for case, wrong in PADDED.items() if not wrong.by_value])
def test_refused(backend, case):
    refused(PADDED[case], backend)


@pytest.mark.parametrize("case", [case for case, wrong in PADDED.items() if wrong.by_value])
def test_values_refused(host_backend, case):
    refused(PADDED[case], host_backend)


def refused(wrong: Wrong, backend: Backend) -> None:
    with pytest.raises(wrong.error) as caught:
        attempt(wrong.call(backend.device), backend.name)
    assert_says(caught.value, wrong.words)


def attempt(call: Call, backend: str) -> None:
    if "mask" in call.options:  # something that is no ContextMask
        t = call.tensors
        ct.prefix_attention(t["q"], t["k"], t["v"], t["prefix_k"], t["prefix_v"], backend=backend, **call.options)
    call_op(call, backend)


def assert_says(error: Exception, words: tuple[str, ...]) -> None:
    missing = [word for word in words if word not in str(error)]
    assert not missing, f"{missing} not in: {error}"


def cu(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


CU_SEQLENS = {
    "empty": (cu(), ValueError, ("cu_seqlens", "[B+1]", "(0,)")),
    "two dimensions": (cu(0, 9)[None], ValueError, ("cu_seqlens", "[B+1]", "(1, 2)")),
    "floating": (torch.tensor([0.0, 9.0]), TypeError, ("cu_seqlens", "int32", "float32")),
    "a list": ([0, 9], TypeError, ("cu_seqlens", "int32", "list")),
    "on another device": (cu(0, 9).to("meta"), ValueError, ("cu_seqlens", "device", "meta")),
}
OFFSETS = {
    "not starting at zero": (cu(1, 4, 9), ValueError, ("cu_seqlens", "start at 0", "[1, 4, 9]")),
    "decreasing": (cu(0, 6, 4, 9), ValueError, ("cu_seqlens", "decrease", "[0, 6, 4, 9]")),
    "negative": (cu(0, -2, 9), ValueError, ("cu_seqlens", "-2")),
    "ending before N": (cu(0, 4, 8), ValueError, ("cu_seqlens", "N = 9", "8")),
    "ending after N": (cu(0, 4, 10), ValueError, ("cu_seqlens", "N = 9", "10")),
    "one offset for tokens": (cu(0), ValueError, ("cu_seqlens", "N = 9", "[0]")),
}


@pytest.mark.parametrize("case", CU_SEQLENS)
def test_cu_seqlens_refused(backend, case):
    refuse_offsets(CU_SEQLENS[case], backend)


@pytest.mark.parametrize("case", OFFSETS)
def test_offsets_refused(host_backend, case):
    refuse_offsets(OFFSETS[case], host_backend)


def refuse_offsets(case: tuple, backend: Backend) -> None:
    offsets, error, words = case
    call = on(backend.device, replace(make_call(lens=[4, 5], types="fp32"), cu_seqlens=offsets))
    with pytest.raises(error) as caught:
        call_op(call, backend.name)
    assert_says(caught.value, words)


PACKED = {
    "q of four dimensions": Wrong(("q", "[N, H, D]", "(1, 9, 4, 8)"), dict(q=lambda q: q[None])),
    "k of other tokens": Wrong(("k", "9", "(8, 2, 8)"), dict(k=lambda k: k[:8])),
    "v of other tokens": Wrong(("v", "(8, 2, 8)"), dict(v=lambda v: v[:8])),
    "k of another type": Wrong(("k", "float32", "float16"), dict(k=lambda k: k.half()), error=TypeError),
    "heads that do not divide": Wrong(("multiple", "H = 3", "Hk = 2"), sizes=dict(H=3)),
    "prefix_index of tokens, not rows": Wrong(
        ("prefix_index", "[2]", "(9,)"), dict(), dict(prefix_index=Z(9, **LONG)), sizes=dict(G=2)
    ),
    "hidden of tokens, not rows": Wrong(("hidden", "[2, 2]", "(9, 2)"), mask=dict(hidden=Z(9, 2, **LONG))),
    "span beyond the context": Wrong(
        ("hidden", "11", "(0, 12)"), mask=dict(hidden=torch.tensor([[0, 12], [0, 0]])), by_value=True
    ),
    "keep of tokens, not rows": Wrong(("keep", "[2, 11]", "(9, 11)"), mask=dict(keep=row_keep(9, 11))),
}


@pytest.mark.parametrize("case", [case for case, wrong in PACKED.items() if not wrong.by_value])
def test_packed_refused(backend, case):
    refused(replace(PACKED[case], sizes={"lens": [4, 5], **PACKED[case].sizes}), backend)


@pytest.mark.parametrize("case", [case for case, wrong in PACKED.items() if wrong.by_value])
def test_packed_values_refused(host_backend, case):
    refused(replace(PACKED[case], sizes={"lens": [4, 5], **PACKED[case].sizes}), host_backend)


def test_refused_shapes_in_packed_messages_are_the_callers(backend):
    """Messages speak of the shapes that were passed, not of an internal layout."""
    call = make_call(lens=[4, 5], types="fp32")
    call.tensors["v"] = call.tensors["v"][:, :1]
    with pytest.raises(ValueError, match=r"v.*\(9, 1, 8\)"):
        call_op(call, backend.name)


def test_unknown_backend():
    call = make_call(types="fp32")
    with pytest.raises(ValueError, match=r"backend.*reference.*cpu|backend.*cpu.*reference") as caught:
        call_op(call, "gpu")
    assert_says(caught.value, ("'gpu'", "auto"))
    with pytest.raises(TypeError, match=r"backend.*str.*int"):
        call_op(call, 3)


def test_unavailable_backend_says_why(monkeypatch):
    """And is not replaced by another one."""
    monkeypatch.setattr(dispatch, "refusal", lambda *_: "the moon is in the wrong phase")
    with pytest.raises(ValueError, match=r"backend.*cpu.*unavailable.*moon is in the wrong phase"):
        call_op(make_call(types="fp32"), "cpu")


def test_kernels_refuse_tensors_of_a_foreign_device(kernel_backend):
    call = make_call(types="fp32").to("meta")
    with pytest.raises(ValueError, match=rf"backend.*{kernel_backend.name}.*{kernel_backend.device}.*meta"):
        call_op(call, kernel_backend.name)


def test_every_backend_of_the_table_has_a_state():
    states = dispatch.availability()
    assert states["reference"] is None
    assert "cpu" in states
    for name, reason in states.items():
        assert reason is None or (isinstance(reason, str) and len(reason) > 10), name


def test_head_dimensions_that_all_backends_on_the_cpu_serve():
    """Without it a backend that refuses what it could compute would pass."""
    assert all(backend.wide for backend in backends() if backend.device == "cpu")


def test_unknown_instruction_set():
    with pytest.raises((ValueError, RuntimeError), match=r"mmx|not built"):
        dispatch.set_cpu_isa("mmx")


def test_the_compiled_backend_is_there():
    """Without it the suite would run on the reference alone, and prove little."""
    assert dispatch.availability()["cpu"] is None


@pytest.mark.parametrize(("wanted", "told"), [("portable", "None portable"), ("mmx", "mmx")])
def test_instruction_set_from_the_environment(wanted, told):
    """CTKERNELS_CPU_ISA chooses; a name that cannot be had makes the backend unavailable, and the reason says so."""
    script = 'from ctkernels import dispatch; print(dispatch.availability()["cpu"], dispatch.cpu_info()["isa"])'
    environment = {**os.environ, "CTKERNELS_CPU_ISA": wanted}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert told in done.stdout


def test_errors_come_before_any_work(kernel_backend):
    """A refused call starts no operator."""
    call = make_call(types="fp32", window=0).to(kernel_backend.device)
    with Recorder() as recorder, pytest.raises(ValueError, match="window"):
        call_op(call, kernel_backend.name)
    assert not any(outputs is not None for calls in recorder.calls.values() for *_, outputs in calls)


# What the registered operator is asked directly, past the public function's checks, in a process of its own: a kernel
# that trusted these would read out of bounds.
HOSTILE = """
import sys
import torch
sys.path.insert(0, {root!r})
from ctkernels.testing.calls import call_op, make_call
from ctkernels.testing.pretend import install, pretending
from tests.op.test_gradients import Recorder

if pretending():
    install()
call = make_call(types="fp32", G=2, B=3, bias=(4, 11), sinks=True, prefix_index=torch.tensor([0, 1, 0]),
                 prefix_lens=torch.tensor([11, 4]), seq_lens=torch.tensor([5, 2, 3]),
                 mask=dict(hidden=torch.tensor([[0, 3], [3, 11], [0, 0]]), keep=torch.ones(3, 11) > 0)).to({device!r})
leaves = {{n: x.clone().requires_grad_() for n, x in call.tensors.items()}}
with Recorder() as recorder:
    out, lse = call_op(call.with_tensors(**leaves), {backend!r})
    (out.sum() + lse.sum()).backward()
big = 10**12
changes = dict(
    prefix_index=torch.tensor([0, big, 0]), prefix_lens=torch.tensor([big, 4]), seq_lens=torch.tensor([big, 2, 3]),
    hidden=torch.tensor([[0, 3], [-big, big], [0, 0]]), keep=torch.ones(1, 1) > 0, k=torch.zeros(1, 1, 1, 8),
    v=torch.zeros(3, 2, 1, 8), prefix_k=torch.zeros(1, 1, 1, 8), prefix_v=torch.zeros(2, 2, 1, 8),
    prefix_bias=torch.zeros(1, 1, 1), sinks=torch.zeros(1), out=torch.zeros(1, 1, 1, 8), lse=torch.zeros(1, 1, 1),
    dout=torch.zeros(1, 1, 1, 8), dlse=torch.zeros(1, 1, 1), cu_seqlens=torch.tensor([0, big]),
)
accepted, by_value = [], ("prefix_index", "prefix_lens", "seq_lens", "hidden", "cu_seqlens")
for name in ("prefix_attention", "prefix_attention_backward"):
    [(operator, arguments, _)] = recorder.calls[name]
    names = [a.name for a in operator._schema.arguments]
    for changed, value in changes.items():
        if changed not in names:
            continue
        hostile = [value.to({device!r}) if n == changed else x for n, x in zip(names, arguments)]
        try:
            with torch.no_grad():
                operator(*hostile)
        except (ValueError, TypeError, RuntimeError) as error:
            continue
        if {device!r} != "cuda" or changed not in by_value:  # those a GPU clamps
            accepted.append(f"{{name}}({{changed}})")
if {device!r} == "cuda":
    torch.cuda.synchronize()  # reports what left memory
print("accepted:", *accepted)
"""


def test_operators_called_directly_do_not_leave_memory(kernel_backend, pytestconfig):
    script = HOSTILE.format(root=str(pytestconfig.rootpath), backend=kernel_backend.name, device=kernel_backend.device)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "accepted:", done.stdout
