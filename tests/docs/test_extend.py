"""docs/guides/extend.md, executed in a copy of the package: its files are written, its rows added, its code run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ctkernels.testing.models import make_model
from ctkernels.testing.tasks import char_tokenizer

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"```(python|diff|bash)\n(.*?)```", re.DOTALL)
FILE = re.compile(r"# (ctkernels/\S+\.py)\n")

# what runs in the copy, without its tests: everything that is no file and no row, in one process and one namespace
RUN = """
import shlex, sys
from pathlib import Path
import ctkernels
from ctkernels import cli
assert Path(ctkernels.__file__).parent.parent == Path.cwd(), ctkernels.__file__
names = {}
for path in sorted(Path("blocks").iterdir()):
    if path.suffix == ".python":
        exec(compile(path.read_text(), path.name, "exec"), names)
        continue
    for command in path.read_text().replace(chr(92) + chr(10), " ").splitlines():
        program, *arguments = shlex.split(command)
        assert program == "ctkernels" and cli.run(arguments) == 0, command
cli.run(["tune", "--help"])
"""


def add_rows(file: Path, diff: str) -> None:
    """Apply a diff without line numbers: an added line follows the line before it, which must be there once."""
    for hunk in diff.split("@@\n"):
        old = "".join(line[1:] for line in hunk.splitlines(keepends=True) if line[0] in " -")
        new = "".join(line[1:] for line in hunk.splitlines(keepends=True) if line[0] in " +")
        text = file.read_text()
        assert text.count(old) == 1, f"{file.name} does not hold once:\n{old}"
        file.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> tuple[Path, str]:
    """A folder with the extended package, and what its code printed."""
    folder = tmp_path_factory.mktemp("extend")
    shutil.copytree(ROOT / "ctkernels", folder / "ctkernels", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "examples").symlink_to(ROOT / "examples")
    make_model("llama", torch.float32, max_position_embeddings=4096).save_pretrained(folder / ".models/smollm2-135m")
    char_tokenizer().save_pretrained(folder / ".models/smollm2-135m")
    (folder / "blocks").mkdir()
    changed = []
    for number, (language, code) in enumerate(BLOCK.findall((ROOT / "docs/guides/extend.md").read_text())):
        named = FILE.match(code)
        if named is None:
            (folder / f"blocks/{number:02}.{language}").write_text(code)
        elif language == "diff":
            add_rows(folder / named[1], code[named.end() :])
            changed.append(named[1])
        else:
            assert not (folder / named[1]).exists()
            (folder / named[1]).write_text(code)
    assert len(changed) == len(set(changed)) == 4  # one table for each of method, objective, suite and backend
    shown = run(folder, "-c", RUN)
    return folder, " ".join(shown.replace("│", " ").split())


def run(folder: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "200"}
    command = [sys.executable, *arguments]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_page_runs(copy):
    folder, shown = copy
    assert (folder / "runs/faded/prefix").exists() and "ct-prompt, ct-kv, faded, ttt" in shown
    assert "--strength FLOAT Factor of the demonstrations' values before training, in (0, 1]. [faded]" in shown
    assert (folder / "runs/margin/prefix").exists()
    report = (folder / "runs/tsv/report.md").read_text()
    assert "| faded:epochs=1 |" in report and "| icl |" in report


def test_documents_follow(copy):
    """The generated tables of methods.md, written by the copy."""
    folder, _ = copy
    (folder / "docs").mkdir()
    for name in ("generate_methods.py", "methods.md"):
        shutil.copy(ROOT / "docs" / name, folder / "docs")
    run(folder, "docs/generate_methods.py")
    text = (folder / "docs/methods.md").read_text()
    assert "| `faded` | ct-kv from the demonstrations' values scaled down | prefix |" in text
    assert "| `strength` | 0.5 | faded | factor of" in text and "| `tsv` | TASK/{train,test}.tsv" in text


def test_the_shared_tests_run_on_the_new_rows(copy):
    """What the page promises of pytest: tests of all methods and of all backends take the new ones without a change."""
    folder, _ = copy
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    files = ["tests/tuning/methods/test_methods.py", "tests/op/test_gradients.py"]
    chosen = "(faded and (leaves_the_model or learns)) or test_table or (example and (types or fp64))"
    shown = run(folder, "-m", "pytest", "-v", "-p", "no:cacheprovider", *files, "-k", chosen)
    passed = re.findall(r"::(\w+)(?:\[(\S+)\])? PASSED", shown)
    assert {"faded"} == {name for test, name in passed if "method" in test} and ("test_table", "") in passed
    assert {("test_gradient_types", "example"), ("test_fp64_lse_is_fp64", "example")} <= {*passed}, shown
