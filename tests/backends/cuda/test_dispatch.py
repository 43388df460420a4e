"""Which backend serves a CUDA tensor, with fakes in the place of GPUs and kernels."""

import json
import re
import types

import pytest
import torch

import ctkernels as ct
from ctkernels import dispatch, dispatch_table
from ctkernels.backends import cuda
from ctkernels.backends.triton import backend as triton_backend
from ctkernels.backends.triton.config import Target
from ctkernels.testing.calls import make_call

GPU = torch.device("cuda", 0)
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def table():
    """Every test starts from the table alone, whatever the environment names."""
    dispatch_table.use(None)
    yield
    dispatch_table._rows = None
    dispatch_table.pick.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU: `gpu.architecture`, and per kernel backend the reason why it cannot be used."""
    machine = types.SimpleNamespace(architecture="sm_90", unavailable={"cuda": None, "triton": None, "cpu": None})
    monkeypatch.setattr(dispatch, "architecture", lambda device: machine.architecture)
    monkeypatch.setattr(dispatch, "_unavailable", lambda name: machine.unavailable.get(name))
    monkeypatch.setattr(dispatch, "load", lambda name: types.SimpleNamespace(name=name))
    return machine


@pytest.mark.parametrize("direction", dispatch_table.DIRECTIONS)
@pytest.mark.parametrize("dtype", dispatch_table.DTYPES)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_130"])
def test_without_a_measurement_every_call_is_served_by_cuda(architecture, dtype, direction):
    for D in dispatch_table.HEAD_DIMENSIONS:
        assert dispatch_table.pick(architecture, dtype, D, direction) == "cuda"


def test_auto_asks_the_table(gpu):
    for row, expected in ({}, "cuda"), ({"backend": "triton"}, "triton"):
        dispatch_table.use([row] if row else None)
        assert dispatch.choose(None, GPU, BF16, 64) == dispatch.choose("auto", GPU, BF16, 64) == (expected, expected)


def test_other_devices_do_not(gpu):
    assert dispatch.choose(None, torch.device("cpu"), BF16, 64) == ("cpu", "cpu")
    with pytest.warns(UserWarning, match="reference backend on meta"):
        assert dispatch.choose(None, torch.device("meta"), BF16, 64) == ("reference", "reference")


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("only", ["cuda", "triton"])
def test_auto_takes_the_other_one_where_one_refuses(gpu, architecture, only):
    gpu.architecture = architecture
    gpu.unavailable["triton" if only == "cuda" else "cuda"] = "not built"
    assert dispatch.choose(None, GPU, BF16, 64) == (only, only)


def test_auto_says_why_it_falls_back(gpu):
    gpu.unavailable |= {"cuda": "the compiler had a day off", "triton": "it went with it"}
    dispatch._warn_fallback.cache_clear()
    with pytest.warns(UserWarning, match="compiler had a day off.*it went with it"):
        assert dispatch.choose(None, GPU, BF16, 64) == ("reference", "reference")


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_named_backend_is_taken_or_refused(gpu, architecture, name):
    gpu.architecture = architecture
    assert dispatch.choose(name, GPU, BF16, 64) == (name, name)
    gpu.unavailable[name] = "it is Sunday"
    with pytest.raises(ValueError, match=f"backend='{name}' is unavailable: it is Sunday"):
        dispatch.choose(name, GPU, BF16, 64)


def test_the_first_matching_row_decides():
    rows = [
        dict(architecture="sm_90", dtype="bf16", head_dim=128, direction="backward", backend="triton"),
        dict(architecture="sm_8?", dtype="fp32", backend="triton"),
        dict(architecture="sm_8?", dtype="fp32", backend="cuda"),
    ]
    dispatch_table.use(rows)
    pick = dispatch_table.pick
    assert pick("sm_90", BF16, 128, "backward") == "triton"
    for call in (
        ("sm_90", BF16, 128, "forward"),
        ("sm_90", BF16, 64, "backward"),
        ("sm_90", torch.float16, 128, "backward"),
        ("sm_100", BF16, 128, "backward"),
    ):
        assert pick(*call) == "cuda"
    assert pick("sm_86", torch.float32, 64, "forward") == "triton"
    assert pick("sm_86", BF16, 64, "forward") == "cuda"
    dispatch_table.use(None)
    assert pick("sm_90", BF16, 128, "backward") == "cuda"  # not what was kept from before


@pytest.mark.parametrize("head_dim, column", [(1, 64), (64, 64), (65, 80), (81, 96), (97, 128), (129, 256), (256, 256)])
def test_a_head_dimension_counts_as_the_one_it_is_padded_to(head_dim, column):
    dispatch_table.use([dict(head_dim=column, backend="triton")])
    assert dispatch_table.pick("sm_90", BF16, dispatch_table.column(head_dim), "forward") == "triton"
    dispatch_table.use([dict(head_dim=d, backend="triton") for d in dispatch_table.HEAD_DIMENSIONS if d != column])
    assert dispatch_table.pick("sm_90", BF16, dispatch_table.column(head_dim), "forward") == "cuda"


def test_directions_may_differ(gpu):
    dispatch_table.use([dict(direction="backward", backend="triton")])
    assert dispatch.choose(None, GPU, BF16, 64) == dispatch.Choice(forward="cuda", backward="triton")
    dispatch_table.use([dict(direction="forward", backend="triton")])
    assert dispatch.choose(None, GPU, BF16, 64) == dispatch.Choice(forward="triton", backward="cuda")


@pytest.mark.parametrize("compiled", [False, True])
def test_the_operators_follow_directions_that_differ(monkeypatch, compiled):
    """Through the public function: forward runs on one backend, backward on the other, and the gradients are right."""
    assert dispatch.availability()["cpu"] is None  # and loaded
    cpu, asked = dispatch.load("cpu"), []

    def fake(name):
        def run(direction):
            return lambda *args: (asked.append((name, direction)), getattr(cpu, direction)(*args))[1]

        return types.SimpleNamespace(forward=run("forward"), backward=run("backward"))

    fakes = {"one": fake("one"), "two": fake("two")}
    monkeypatch.setattr(dispatch, "load", lambda name: fakes.get(name, cpu))

    def choose(*_):
        return dispatch.Choice("one", "two")

    choose._dynamo_marked_constant = True  # as that of `dispatch`
    monkeypatch.setattr(dispatch, "choose", choose)
    t = {name: x.requires_grad_() for name, x in make_call(types="fp32").tensors.items()}
    inputs = [t[name] for name in ("q", "k", "v", "prefix_k", "prefix_v")]
    attend = (
        torch.compile(ct.prefix_attention, fullgraph=True, backend="aot_eager") if compiled else ct.prefix_attention
    )
    grads = torch.autograd.grad(attend(*inputs).sum(), inputs)
    assert asked == [("one", "forward"), ("two", "backward")]
    monkeypatch.undo()
    torch.compiler.reset()
    expected = torch.autograd.grad(ct.prefix_attention(*inputs, backend="cpu").sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_a_file_named_by_the_environment(monkeypatch, tmp_path):
    path = tmp_path / "dispatch.json"
    row = {"architecture": "sm_90", "dtype": "bf16", "head_dim": 64, "direction": "forward", "backend": "triton"}
    path.write_text(json.dumps({"machine": {"gpu": "H100"}, "rows": [{**row, "seconds": {"cuda": 2, "triton": 1}}]}))
    monkeypatch.setenv(dispatch_table.VARIABLE, str(path))
    dispatch_table._rows = None
    dispatch_table.pick.cache_clear()
    assert dispatch_table.pick("sm_90", BF16, 64, "forward") == "triton"
    assert dispatch_table.pick("sm_90", BF16, 64, "backward") == "cuda"


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", ("dispatch.json", "must be JSON")),
        ("[]", ("dispatch.json", "rows")),
        ('{"rows": {}}', ("dispatch.json", "rows")),
        ('{"rows": [{"backend": "cuda"}, {"dtype": "bf16"}]}', ("row 1", "backend")),
        ('{"rows": ["cuda"]}', ("row 0", "object", "'cuda'")),
        ('{"rows": [{"backend": "cpu"}]}', ("row 0", "cuda, triton", "'cpu'")),
        ('{"rows": [{"backend": "cuda", "dtype": "fp64"}]}', ("dtype", "bf16", "'fp64'")),
        ('{"rows": [{"backend": "cuda", "head_dim": 72}]}', ("head_dim", "80", "'72'")),
        ('{"rows": [{"backend": "cuda", "direction": "both"}]}', ("direction", "backward", "'both'")),
        ('{"rows": [{"backend": "cuda", "D": 64}]}', ("unknown fields", "D")),
    ],
)
def test_what_is_no_table_is_refused_by_name(tmp_path, text, words):
    path = tmp_path / "dispatch.json"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        dispatch_table.use(path)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_missing_file_is_named():
    with pytest.raises(OSError, match=r"nowhere\.json"):
        dispatch_table.use("nowhere.json")


@pytest.mark.parametrize(
    "version, built, gpus, reason",
    [
        (None, True, True, "built without CUDA"),
        ("13.0", False, True, "not built.*CTKERNELS_CUDA=1"),
        ("13.0", True, False, "finds no GPU"),
        ("13.0", True, True, None),
    ],
)
def test_the_cuda_backend_says_why_it_is_unavailable(monkeypatch, version, built, gpus, reason):
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setattr(cuda.extension, "load", lambda name, missing: None if built else missing)
    cuda.load_library.cache_clear()
    cuda.unavailable.cache_clear()
    try:
        found = cuda.unavailable()
    finally:
        monkeypatch.undo()
        cuda.load_library.cache_clear()
        cuda.unavailable.cache_clear()
    assert found is None if reason is None else re.search(reason, found)


@pytest.mark.parametrize(
    "capability, dtype, wide, reason",
    [
        ((8, 0), BF16, 0, None),
        ((12, 0), torch.float32, 0, None),
        ((7, 5), BF16, 0, "8.0.*7.5"),
        ((9, 0), torch.float64, 0, "fp64"),
        ((8, 0), BF16, 256, None),
        ((8, 0), torch.float32, 512, None),
    ],
)
def test_what_the_cuda_backend_refuses(monkeypatch, capability, dtype, wide, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = cuda.refusal(GPU, dtype, wide)
    assert found is None if reason is None else re.search(reason, found)


@pytest.mark.parametrize(
    "arch, dtype, wide, reason",
    [
        ("sm_86", BF16, 512, None),
        ("sm_86", torch.float32, 256, None),
        ("sm_86", torch.float32, 512, "fp32 rows of head dimensions above 256.*got sm_86"),
        ("sm_90", torch.float32, 512, None),
    ],
)
def test_what_the_triton_backend_refuses(monkeypatch, arch, dtype, wide, reason):
    monkeypatch.setattr(triton_backend, "target", lambda device: Target(arch, 1))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    found = triton_backend.refusal(GPU, dtype, wide)
    assert found is None if reason is None else re.search(reason, found)


@pytest.mark.parametrize(
    "D, Dv, expected",
    [(64, 64, (64, 0)), (256, 256, (256, 0)), (192, 128, (256, 256)), (1, 257, (64, 512)), (300, 300, (256, 512))],
)
def test_what_backends_are_told_of_head_dimensions(D, Dv, expected):
    assert dispatch_table.heads(D, Dv) == expected


def test_auto_takes_the_backend_that_serves_the_head_dimension(gpu, monkeypatch):
    """CUDA C++, which the table prefers, stands for a backend that serves D = Dv <= 256 alone."""
    refusing = types.SimpleNamespace(refusal=lambda device, dtype, wide: "too wide" if wide else None)
    monkeypatch.setattr(dispatch, "load", lambda name: refusing if name == "cuda" else types.SimpleNamespace())
    assert dispatch.choose(None, GPU, BF16, 64, 0) == ("cuda", "cuda")
    assert dispatch.choose(None, GPU, BF16, 64, 256) == ("triton", "triton")
    with pytest.raises(ValueError, match="backend='cuda' is unavailable: too wide"):
        dispatch.choose("cuda", GPU, BF16, 64, 256)


def test_cpu_tensors_are_refused_in_words():
    with pytest.raises(ValueError, match="backend='cuda' is unavailable: it computes on cuda tensors, got cpu"):
        dispatch.choose("cuda", torch.device("cpu"))
