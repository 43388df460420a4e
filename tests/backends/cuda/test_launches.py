"""What the bindings ask of CUDA's runtime: python_bindings/cuda.cpp as it is, on GPUs that are not there and refuse
what true ones refuse (tools/gpu/cuda/fake_gpu.cpp). Nothing is executed.

Not shown here: torch's own bookkeeping of devices and streams, whose place the fake takes; what the driver does; that
the kernels are in the library (`make cuda-bindings` shows that).
"""

import itertools
import os
import re
import subprocess
import sys

import pytest
import torch

from ctkernels.problem import Problem
from ctkernels.testing.calls import make_call
from tools.gpu.cuda import fake_gpu

pytestmark = [
    pytest.mark.needs_nvcc,
    pytest.mark.skipif(torch.version.cuda is not None, reason="the fake takes the place of torch's CUDA library"),
]
SHARED_LIMIT = 99 * 1024
fresh = itertools.count(10)  # devices that no test has used


@pytest.fixture
def device():
    """A GPU on which nothing is loaded. It is not the current one."""
    fake, unused = fake_gpu.library(), next(fresh)
    fake_gpu.calls()
    yield unused
    fake.fake_end_capture(unused)
    fake.fake_set_device(0)


def run(device: int | None, backward: bool = True, **sizes) -> list[dict]:
    """What a forward pass, and a backward pass, calls on a GPU; None: with tensors of the CPU."""
    sizes = dict(B=3, H=4, Hk=2, S=5, P=70, D=64, types="bf16") | sizes
    call = make_call(**sizes)
    problem = Problem(
        **dict.fromkeys(Problem._fields)
        | dict(context_length=sizes["P"], drop_p=0.0, seed=0, scale=0.1, causal=True, window=0, window_prefix=True)
        | dict(softcap=0.0)
    )
    tensors = {name: x[None] if x.dim() == 3 else x for name, x in call.tensors.items()}
    tensors = {"prefix_bias": None, **(tensors if device is None else fake_gpu.to_gpu(tensors, device))}
    out, lse = torch.ops.ctkernels.cuda_forward(**tensors, **problem._asdict())
    if backward:
        needs = [True] * 5 + [False]
        torch.ops.ctkernels.cuda_backward(out, lse, **tensors, out=out, lse=lse, needs=needs, **problem._asdict())
    return fake_gpu.calls()


def of(calls: list[dict], *kinds: str) -> list[dict]:
    return [call for call in calls if call["call"] in kinds]


def kernels(calls: list[dict], kind: str = "launch") -> list[str]:
    return [call["kernel"].removeprefix("ctk_") for call in of(calls, kind)]


def test_launches_come_in_the_order_of_the_plan(device):
    forward = ["setup_rows", "setup_tiles", "forward_bf16_64_plain"]
    backward = ["setup_rows", "setup_tiles", "delta_bf16", "query_bf16_64_plain", "keys_bf16_64_plain"]
    assert kernels(run(device)) == forward + backward


def test_everything_happens_on_the_device_and_the_current_stream_of_the_tensors(device):
    """Though another device is the current one, which it is again in the end."""
    fake = fake_gpu.library()
    fake.fake_set_stream(device, 7)
    calls = run(device)
    switches = [call["device"] for call in of(calls, "set_device")]
    assert switches == [device, 0] * 2 and fake.fake_device() == 0
    assert {call["device"] for call in calls if call["call"] != "set_device"} == {device}
    assert {call["stream"] for call in of(calls, "launch")} == {7}
    inside = [i for i, call in enumerate(calls) if call["call"] != "set_device"]
    first, *_, last = (i for i, call in enumerate(calls) if call["call"] == "set_device")
    assert first < min(inside) and max(inside) < last


def test_no_device_is_switched_where_it_is_current(device):
    fake_gpu.library().fake_set_device(device)
    assert not of(run(device), "set_device")


def test_a_device_is_asked_for_its_own_multiprocessors(device):
    assert {call["device"] for call in of(run(device), "device_attribute")} == {device}


def test_every_kernel_of_the_rows_type_is_loaded_before_the_first_launch(device):
    """Once per device and type, and allowed the shared memory that any plan asks for."""
    calls = run(device)
    first = next(i for i, call in enumerate(calls) if call["call"] == "launch")
    before = calls[:first]
    expected = {name for name in fake_gpu.kernels() if "_fp16" not in name and "_fp32" not in name}
    loaded = [call["kernel"] for call in of(before, "load")]
    assert set(loaded) == expected and len(loaded) == len(expected)
    assert [call["kernel"] for call in of(before, "allow_shared")] == loaded
    assert {call["bytes"] for call in of(before, "allow_shared")} == {SHARED_LIMIT}
    assert not of(calls[first:], "load", "allow_shared")
    assert not of(run(device, D=128, S=40), "load", "allow_shared")
    more = of(run(device, types="fp16"), "load")
    assert {"ctk_forward_fp16_64_plain"} < {call["kernel"] for call in more}
    assert of(run(next(fresh)), "load") == [{**call, "device": call["device"] + 1} for call in of(calls, "load")]


@pytest.mark.parametrize("types", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("D", [64, 128, 256, 512])
def test_no_launch_asks_for_more_shared_memory_than_it_may_have(device, types, D):
    calls = run(device, types=types, D=D)
    most = max(call["shared"] for call in of(calls, "launch"))
    assert 48 * 1024 < most <= SHARED_LIMIT


def test_a_call_can_be_captured_after_another_one_that_launched_other_kernels(device):
    fake = fake_gpu.library()
    run(device, backward=False)
    fake.fake_begin_capture(device)
    calls = run(device, D=128)
    assert {"query_bf16_128_plain", "keys_bf16_128_plain"} < set(kernels(calls)) and not of(calls, "load")
    assert fake.fake_end_capture(device)


def test_the_first_call_of_all_can_be_captured(device):
    """What loads the kernels is what a capture forbids, unless the thread allows it, and only for as long."""
    fake = fake_gpu.library()
    fake.fake_begin_capture(device)
    assert kernels(run(device), "load")
    assert fake.fake_end_capture(device)
    assert fake.fake_capture_mode() == 0


def test_a_launch_that_fails_is_an_error(device):
    def fail(*_):
        raise ZeroDivisionError

    with fake_gpu.launching(fail), pytest.raises(RuntimeError, match="CUDA error 719"):
        run(device)
    assert fake_gpu.library().fake_device() == 0


def test_the_fake_refuses_what_a_gpu_refuses(device):
    """Kernels that are loaded during a capture end it, as without `load_kernels`."""
    fake = fake_gpu.library()
    fake.fake_begin_capture(device)
    assert fake.fake_load(device, b"ctk_pack") == 900
    assert not fake.fake_end_capture(device)
    assert fake.fake_load(device, b"ctk_pack") == 0


def test_tensors_of_the_cpu_are_refused(device):
    with pytest.raises(NotImplementedError, match="'CPU' backend"):
        run(None)


MISTAKES = {  # each an edit of python_bindings/cuda.cpp
    "the current device, whatever the tensors are on": (
        "guard(q.device())", "guard(c10::Device(c10::kCUDA, c10::cuda::current_device()))",
    ),
    "the default stream": ("= c10::cuda::getCurrentCUDAStream()", "= nullptr"),
    "kernels that are loaded where they are launched": ("if (loaded.count(wanted)) return;", "if (true) return;"),
    "loading that ends a capture": ("cudaStreamCaptureModeRelaxed", "cudaStreamCaptureModeGlobal"),
    "kernels that are loaded on one device alone": ("{c10::cuda::current_device(), rows}", "{0, rows}"),
    "less shared memory than plans ask for": ("ctk::cuda::SHARED_LIMIT", "64 * 1024"),
}  # fmt: skip


def test_every_mistake_has_its_place():
    bindings = (fake_gpu.ROOT / "python_bindings/cuda.cpp").read_text()
    assert all(old in bindings for old, _ in MISTAKES.values())


if os.environ.get("CTKERNELS_TEST_PROFILE") == "thorough":  # half a minute each, for the compiler

    @pytest.mark.parametrize("name", MISTAKES)
    def test_mistake_is_caught(name, tmp_path):
        old, new = MISTAKES[name]
        for source in (path for name in fake_gpu.CODE for path in fake_gpu.ROOT.glob(name)):
            copy = tmp_path / source.relative_to(fake_gpu.ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(source.read_text())
        bindings = tmp_path / "python_bindings/cuda.cpp"
        bindings.write_text(bindings.read_text().replace(old, new))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        changed = {"CTKERNELS_FAKE_GPU_SOURCES": str(tmp_path), "CTKERNELS_TEST_PROFILE": "default"}
        done = subprocess.run(command, env=os.environ | changed, capture_output=True, text=True)
        assert re.search(r"\d+ failed", done.stdout) and " error" not in done.stdout.splitlines()[-1], done.stdout[
            -3000:
        ]
