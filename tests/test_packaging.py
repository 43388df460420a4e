"""What different files say about versions, extras and linters agrees."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from setuptools.config.pyprojecttoml import read_configuration

import ctkernels

ROOT = Path(__file__).parent.parent
PYPROJECT, MAKEFILE = ((ROOT / name).read_text() for name in ("pyproject.toml", "Makefile"))
PINNED = dict(re.findall(r"^([\w.-]+)==([^;\s]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))


def load_yaml(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text())


def makefile_variable(name: str) -> str:
    (value,) = re.findall(rf"^{name} \?= (.*)$", MAKEFILE, re.MULTILINE)
    return value


def test_the_lower_bound_of_torch_is_the_one_that_is_tested():
    (bound,) = set(re.findall(r'"torch>=([\d.]+)"', PYPROJECT))
    assert makefile_variable("OLDEST") == f"torch=={bound}.0"


def test_every_extra_is_pinned_and_no_pin_is_below_its_bound():
    """requirements.txt is what the tests run with; torch is installed before it, and wandb and vLLM have stand-ins in
    them."""
    pins = {re.sub(r"[_.]", "-", name).lower(): version for name, version in PINNED.items()}
    extras = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\n", PYPROJECT, re.DOTALL)[1]
    listed = re.findall(r'"([A-Za-z][\w.-]*)(?:>=([\d.]+))?"', extras)
    assert len(listed) > 15
    for name, bound in listed:
        if name in ("wandb", "vllm"):
            continue
        version = pins[re.sub(r"[_.]", "-", name).lower()]
        assert not bound or numbers(version) >= numbers(bound), (name, version, bound)


def numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


@pytest.mark.filterwarnings("ignore::setuptools.warnings.SetuptoolsWarning")
def test_the_version_is_the_packages_own_everywhere():
    """pyproject.toml reads it from `ctkernels/__init__.py`; citation and changelog name the last release."""
    project = read_configuration(ROOT / "pyproject.toml")["project"]
    assert project["version"] == ctkernels.__version__ and project["dynamic"] == ["version"]
    citation = load_yaml("CITATION.cff")
    latest, date = re.findall(r"^## ([\d.]+) - ([\d-]+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    assert latest == citation["version"] and date == str(citation["date-released"])
    assert ctkernels.__version__ == latest or numbers(ctkernels.__version__) > numbers(latest)
    assert citation["license"] == project["license"]


def test_pre_commit_runs_the_linters_of_make_lint():
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)[1]
    commands = [re.sub(r" (\.|\$\(CXX_FILES\))$", "", line.strip()) for line in recipe.splitlines()]
    (repository,) = load_yaml(".pre-commit-config.yaml")["repos"]
    hooks = {hook["entry"]: hook for hook in repository["hooks"]}
    assert repository["repo"] == "local" and list(hooks) == commands
    (pattern,) = (hook["files"] for hook in hooks.values() if "files" in hook)
    show = ["make", "--silent", "--eval", "show: ; @echo $(CXX_FILES)", "show"]
    formatted = subprocess.run(show, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    sources = (p for folder in ("csrc", "python_bindings", "tools", "tests") for p in (ROOT / folder).rglob("*.*"))
    names = {path.relative_to(ROOT).as_posix() for path in sources}
    assert {name for name in names if re.search(pattern, name)} == set(formatted)


def test_hosted_ci_runs_the_same_command_and_the_bounds_of_torch():
    jobs = load_yaml(".github/workflows/ci.yml")["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands[0] == ".ci/run" and (ROOT / ".ci/run").stat().st_mode & 0o100
    assert re.findall(r"^make (\w+)$", (ROOT / ".ci/run").read_text(), re.MULTILINE) == ["lint", "test"]
    assert all(f"\n{command.split()[1]}:" in MAKEFILE for command in commands if command.startswith("make "))
    assert jobs["bounds"]["strategy"]["matrix"]["torch"] == [makefile_variable(name) for name in ("OLDEST", "NEWEST")]
