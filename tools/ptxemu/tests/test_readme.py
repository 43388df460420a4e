"""The examples in the README run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


@pytest.mark.needs_nvcc
@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example(number, tmp_path):
    if "triton" in EXAMPLES[number]:
        pytest.importorskip("triton")
        pytest.importorskip("torch")
    script = tmp_path / "example.py"
    script.write_text(EXAMPLES[number])
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if "BUG" in EXAMPLES[number]:
        assert "shared_race" in done.stdout or "uninitialised_shared" in done.stdout
