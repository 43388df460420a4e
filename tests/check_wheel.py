"""Run by `make wheel-check` with an installed wheel: the op equals its reference on every instruction set, each in a
process of its own that is told so by CTKERNELS_CPU_ISA, as on a machine that has no other."""

import os
import subprocess
import sys
from pathlib import Path

CALL = """
import torch, ctkernels
from ctkernels import dispatch
x = [torch.randn(shape, dtype=torch.float64) for shape in ((2, 4, 5, 16), *2 * [(2, 2, 5, 16)], *2 * [(2, 9, 16)])]
out, wanted = (ctkernels.prefix_attention(*x, backend=name) for name in ("cpu", "reference"))
torch.testing.assert_close(out, wanted)
print(dispatch.cpu_info()["isa"], ctkernels.__file__)
"""


def run(isa: str) -> str:
    environment = {**os.environ, "CTKERNELS_CPU_ISA": isa}
    return subprocess.run(
        [sys.executable, "-I", "-c", CALL], env=environment, check=True, capture_output=True, text=True
    ).stdout


if __name__ == "__main__":
    from ctkernels import dispatch

    available = dispatch.cpu_info()["isa_available"]
    assert "portable" in available, available
    for name in available:
        used, path = run(name).split()
        assert used == name, (used, name)
        assert "site-packages" in Path(path).parts, path
        print(f"{name}: right, from {path}")
