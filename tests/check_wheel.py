"""Run by `make wheel-check` with an installed wheel: it holds the whole package and nothing else, and the op equals its
reference on every instruction set, each in a process of its own that CTKERNELS_CPU_ISA limits to it."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CALL = """
import torch, ctkernels
from ctkernels import dispatch
x = [torch.randn(shape, dtype=torch.float64) for shape in ((2, 4, 5, 16), *2 * [(2, 2, 5, 16)], *2 * [(2, 9, 16)])]
out, wanted = (ctkernels.prefix_attention(*x, backend=name) for name in ("cpu", "reference"))
torch.testing.assert_close(out, wanted)
print(dispatch.cpu_info()["isa"], ctkernels.__file__)
"""


def check_contents() -> None:
    """Every module of the sources, the type marker, the compiled kernels; no tests, tools or benchmarks."""
    files = [path for path in metadata.files("ctkernels") if path.suffix != ".pyc" and ".." not in path.parts]
    folders = {path.parts[0] for path in files}
    assert folders == {"ctkernels", f"ctkernels-{metadata.version('ctkernels')}.dist-info"}, folders
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ctkernels").rglob("*.py")}
    modules = {path.as_posix() for path in files if path.suffix == ".py"}
    assert modules == sources, modules ^ sources
    assert {"py.typed"} <= {path.name for path in files} and any(path.match("ctkernels/_C.*") for path in files)
    print(f"{len(modules)} modules, and nothing else")


def run(isa: str) -> str:
    environment = {**os.environ, "CTKERNELS_CPU_ISA": isa}
    return subprocess.run(
        [sys.executable, "-I", "-c", CALL], env=environment, check=True, capture_output=True, text=True
    ).stdout


if __name__ == "__main__":
    from ctkernels import dispatch

    check_contents()
    available = dispatch.cpu_info()["isa_available"]
    assert "portable" in available, available
    for name in available:
        used, path = run(name).split()
        assert used == name, (used, name)
        assert "site-packages" in Path(path).parts, path
        print(f"{name}: right, from {path}")
