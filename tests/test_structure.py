"""The import arrows of this repository, read from the import statements, and the tool that reads them."""

from pathlib import Path

import pytest

from tools import structure

ROOT = Path(__file__).parents[1]
# what the files of a folder may import besides their own folder and installed packages
FOLDERS = {
    "ctkernels": set(),
    "tools": {"ctkernels", "benchmarks", "examples"},
    "benchmarks": {"ctkernels"},
    "examples": {"ctkernels"},
    "docs": {"ctkernels"},
    "tests": {"ctkernels", "tools", "examples"},
}


@pytest.fixture(scope="module")
def known():
    return structure.modules(ROOT)


def test_no_module_reaches_itself(known):
    assert structure.circles(structure.arrows(ROOT, known)) == []


def test_no_arrow_points_upward(known):
    assert [module for module in known if structure.level(module) is None] == []  # every module has its place
    assert structure.upward(structure.arrows(ROOT, known)) == []


def test_kernel_backends_do_not_import_one_another(known):
    """They may share what is no backend itself: the loading of extensions and the checks of values."""

    def backend(module: str) -> str:
        return module.removeprefix("ctkernels.backends").lstrip(".").partition(".")[0]

    between = {(backend(a), backend(b)) for a, b in structure.arrows(ROOT, known) if backend(a) != backend(b)}
    backends = {"cpu", "cuda", "triton", "reference"}
    assert backends <= {backend(module) for module in known}
    assert {pair for pair in between if backends.issuperset(pair)} == set()


def test_folders_import_only_what_they_may():
    assert set(FOLDERS) == set(structure.FOLDERS)
    allowed = {(folder, other) for folder, others in FOLDERS.items() for other in others}
    assert structure.folder_arrows(ROOT) - allowed == set()


def plant(root: Path, files: dict[str, str]) -> dict[str, Path]:
    """Write files by path; returns the modules of the package among them."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return structure.modules(root)


def test_arrows_of_every_kind_of_import(tmp_path):
    known = plant(
        tmp_path,
        {
            "ctkernels/__init__.py": "from ctkernels.at_the_top import name",
            "ctkernels/at_the_top.py": "import ctkernels.plain\nimport torch",
            "ctkernels/plain.py": "def f():\n    from ctkernels import in_a_function",
            "ctkernels/in_a_function.py": "if TYPE_CHECKING:\n    from ctkernels.wing.of_types import Name",
            "ctkernels/wing/__init__.py": "from .relative import name",
            "ctkernels/wing/of_types.py": "from ctkernels.wing import name",  # which is re-exported
            "ctkernels/wing/relative.py": "from .. import plain\nfrom ..plain import f\nfrom . import relative",
        },
    )
    assert structure.arrows(tmp_path, known) == {
        ("ctkernels", "ctkernels.at_the_top"),
        ("ctkernels.at_the_top", "ctkernels.plain"),
        ("ctkernels.plain", "ctkernels.in_a_function"),
        ("ctkernels.in_a_function", "ctkernels.wing.of_types"),
        ("ctkernels.wing", "ctkernels.wing.relative"),
        ("ctkernels.wing.of_types", "ctkernels.wing"),
        ("ctkernels.wing.relative", "ctkernels.plain"),
    }


@pytest.mark.parametrize(
    "back",
    ["from ctkernels.mask import rule", "def f():\n    import ctkernels.mask", "if TYPE:\n    from . import mask"],
)
def test_a_circle_is_found(tmp_path, back):
    files = {
        "ctkernels/__init__.py": "",
        "ctkernels/mask.py": "from ctkernels import problem",
        "ctkernels/problem.py": "from ctkernels.dispatch import choose",
        "ctkernels/dispatch.py": "import torch",
        "ctkernels/ops.py": "from ctkernels.mask import rule",  # reaches the circle, but not back
    }
    assert structure.circles(structure.arrows(tmp_path, plant(tmp_path, files))) == []
    known = plant(tmp_path, {"ctkernels/dispatch.py": back})
    assert structure.circles(structure.arrows(tmp_path, known)) == [
        ["ctkernels.dispatch", "ctkernels.mask", "ctkernels.problem"]
    ]


@pytest.mark.parametrize(
    "source, target, up",
    [
        ("ctkernels.tuning.hf.attach", "ctkernels.tuning.adapters.prefix", True),
        ("ctkernels.tuning.adapters.prefix", "ctkernels.tuning.hf.attach", False),
        ("ctkernels.tuning.hf.encode", "ctkernels.tuning.hf.attach", False),  # within a wing
        ("ctkernels.tuning.adapters.adapter", "ctkernels.tuning.evaluation.evaluate", False),  # the longer name counts
        ("ctkernels.tuning.adapters.adapter", "ctkernels.tuning.evaluation.sweep.run", True),
        ("ctkernels.mask", "ctkernels", True),
        ("ctkernels.tuning.data", "ctkernels", False),
        ("ctkernels.tuning.train.trainer", "ctkernels.cli.options", True),
    ],
)
def test_an_upward_arrow_is_found(source, target, up):
    assert structure.upward([(source, target)]) == ([(source, target)] if up else [])


def test_a_module_without_a_place_is_found():
    assert structure.level("ctkernels.tuning.novelty") is None
    assert structure.level("ctkernels.tuning.data.novelty") is not None


def test_arrows_between_folders_are_found(tmp_path):
    plant(
        tmp_path,
        {
            "tests/test_a.py": "import pytest\nfrom tests.helpers import b",
            "tests/op/test_b.py": "def test():\n    from benchmarks import cases",
            "benchmarks/cases.py": "import numpy",
            "tools/inner/tool.py": "if TYPE_CHECKING:\n    import tests.op.test_b\nfrom .tests import own",
        },
    )
    assert structure.folder_arrows(tmp_path) == {("tests", "benchmarks"), ("tools", "tests")}


def test_what_it_prints(tmp_path, capsys):
    plant(
        tmp_path,
        {
            "ctkernels/mask.py": "import ctkernels.ops",
            "ctkernels/ops.py": "import ctkernels.mask",
            "tests/test_a.py": "import ctkernels",
        },
    )
    structure.main(tmp_path)
    assert capsys.readouterr().out.splitlines() == [
        "   2 ctkernels",
        "2 modules, 2 arrows",
        "upward: 1",
        "  ctkernels.mask -> ctkernels.ops",
        "circular: 2 modules",
        "  ctkernels.mask, ctkernels.ops",
        "folders:",
        "  tests -> ctkernels",
    ]
