"""A small campaign of `make torture`: one kind of file, every system call, every place."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD and tmpfs are Linux's")
ROOT = Path(__file__).parents[3]


def test_a_small_campaign(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tools.torture", "--kinds", "cell", "--events", "0", "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    record = json.loads((tmp_path / "torture.json").read_text())
    assert record["events"] > 100 and not record["examples"]
    assert record["counts"].keys() == {"call", "error", "read error", "damage"}
