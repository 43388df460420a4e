"""What setup.py builds, with fakes in the place of CUDA, torch and NVIDIA's wheels."""

import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from tools.gpu.cuda import build as cuda_build

ROOT = Path(__file__).resolve().parents[3]
VARIABLES = ("CTKERNELS_CUDA", "TORCH_CUDA_ARCH_LIST", "CTKERNELS_CXXFLAGS")


@pytest.fixture
def build(monkeypatch, tmp_path):
    """setup.py as a module, in an empty folder, with no wheels, no toolkit, and a CUDA 13.0 build of torch."""
    spec = importlib.util.spec_from_file_location("ctkernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(module.cpp_extension, "CUDA_HOME", None)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    for name in ("CppExtension", "CUDAExtension"):
        monkeypatch.setattr(module, name, lambda name, *_, **options: types.SimpleNamespace(name=name, **options))
    return module


def make_toolkit(folder: Path, *more: str) -> Path:
    for name in ("bin/nvcc", "include/cuda_runtime.h", *more):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def names(extensions) -> list[str]:
    return [extension.name for extension in extensions]


def test_a_cpu_build_says_what_it_leaves_out_in_one_line(build, monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert names(build.extensions()) == ["ctkernels._C"]
    (line,) = capsys.readouterr().err.splitlines()
    assert "without the CUDA kernels" in line and f"torch {torch.__version__} is built without CUDA" in line


@pytest.mark.parametrize(
    "version, told", [(None, "built without CUDA"), ("13.0", "no fitting nvcc was found.*CUDA 13.0")]
)
def test_cuda_asked_for_in_vain_ends_the_build(build, monkeypatch, version, told):
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setenv("CTKERNELS_CUDA", "1")
    with pytest.raises(SystemExit, match=f"CTKERNELS_CUDA=1.*{told}"):
        build.extensions()


def test_a_toolkit_is_used_unless_declined(build, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(build.cpp_extension, "CUDA_HOME", str(make_toolkit(tmp_path / "cuda")))
    assert names(build.extensions()) == ["ctkernels._C", "ctkernels._cuda"]
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("CTKERNELS_CUDA", "0")
    assert names(build.extensions()) == ["ctkernels._C"]
    assert "CTKERNELS_CUDA=0" in capsys.readouterr().err


def test_a_choice_that_means_nothing_is_refused(build, monkeypatch):
    monkeypatch.setenv("CTKERNELS_CUDA", "yes")
    with pytest.raises(SystemExit, match="CTKERNELS_CUDA must be 0, 1 or unset, got 'yes'"):
        build.extensions()


@pytest.mark.parametrize(
    "version, given, expected",
    [
        ("13.0", None, "8.0;9.0;10.0;12.0+PTX"),
        ("12.8", None, "8.0;9.0;10.0;12.0+PTX"),
        ("12.4", None, "8.0;9.0+PTX"),  # its nvcc knows no sm_100
        ("13.0", "9.0", "9.0"),
    ],
)
def test_architectures(build, monkeypatch, tmp_path, version, given, expected):
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(build.cpp_extension, "CUDA_HOME", str(make_toolkit(tmp_path / "cuda")))
    if given:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    build.extensions()
    assert build.os.environ["TORCH_CUDA_ARCH_LIST"] == expected


def test_a_toolkit_of_another_major_version_is_left_alone(build, monkeypatch, tmp_path, capsys):
    """torch would refuse to build with it, and take the CPU kernels along."""
    home = make_toolkit(tmp_path / "cuda")
    monkeypatch.setattr(build.cpp_extension, "CUDA_HOME", str(home))
    (home / "bin" / "nvcc").chmod(0o755)
    for release, fits in (("12.4", False), ("13.2", True)):
        (home / "bin" / "nvcc").write_text(
            f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n"
        )
        assert names(build.extensions()) == ["ctkernels._C", "ctkernels._cuda"][: 1 + fits]
        assert fits or "no fitting nvcc was found" in capsys.readouterr().err


def test_warnings_are_errors_in_our_own_builds_alone(build, monkeypatch, tmp_path):
    """A newer compiler may warn of what nobody has seen yet."""
    monkeypatch.setattr(build.cpp_extension, "CUDA_HOME", str(make_toolkit(tmp_path / "cuda")))
    monkeypatch.setenv("CTKERNELS_CXXFLAGS", "-g '-DNAME=a b'")
    cpu, cuda = build.extensions()
    assert "-Werror=all-warnings" in cuda_build.flags()
    assert not any("-Werror" in flag for flag in cuda.extra_compile_args["nvcc"])
    assert cuda.extra_compile_args["cxx"][-2:] == cpu.extra_compile_args[-2:] == ["-g", "-DNAME=a b"]


def test_wheels_stand_in_for_a_toolkit_without_headers(build, monkeypatch, tmp_path):
    """PyPI's nvcc, headers and runtime; a wrapper of nvcc on the PATH brings no headers along."""
    (tmp_path / "wrapper" / "bin").mkdir(parents=True)
    (tmp_path / "wrapper" / "bin" / "nvcc").write_text("exec elsewhere")
    monkeypatch.setattr(build.cpp_extension, "CUDA_HOME", str(tmp_path / "wrapper"))
    assert build.find_toolkit() is None
    wheels = make_toolkit(tmp_path / "nvidia" / "cu13", "lib/libcudart.so.13", "lib/libcudadevrt.a", "nvvm/bin/cicc")
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(build, "find_spec", lambda name: spec if name == "nvidia" else None)
    for _ in range(2):  # a second build finds the links of the first
        toolkit = build.find_toolkit()
    assert (toolkit / "lib64" / "libcudart.so").resolve() == wheels / "lib" / "libcudart.so.13"
    assert (toolkit / "lib64" / "libcudadevrt.a").exists() and (toolkit / "nvvm" / "bin" / "cicc").exists()
    assert (toolkit / "bin" / "nvcc").exists() and (toolkit / "include" / "cuda_runtime.h").exists()
    build.extensions()
    assert str(toolkit) == build.cpp_extension.CUDA_HOME
    # and wheels of another CUDA do not
    monkeypatch.setattr(build.cpp_extension, "CUDA_HOME", None)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert build.find_toolkit() is None


def test_the_cpu_sources_are_all_there():
    """As a build sees them: from the root of the repository, in a process of its own."""
    script = "import setup; (cpu,) = setup.extensions(); print(*cpu.sources, len(cpu.depends))"
    command = [sys.executable, "-c", script]
    environment = {**os.environ, "CTKERNELS_CUDA": "0"}
    told = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, env=environment).stdout.split()
    kernels = {f"csrc/cpu/kernels_{isa}.cpp" for isa in ("portable", "avx2", "avx512", "avx512_bf16", "amx")}
    assert {*told[:-1]} == {"python_bindings/cpu.cpp", *kernels} and int(told[-1]) >= 15
