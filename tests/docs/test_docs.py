"""The Python of the guides runs as it stands, block after block of a page in one namespace; links lead somewhere."""

import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import ctkernels
from ctkernels import ContextMask, dispatch, prefix_attention, tuning
from ctkernels.testing.models import make_model
from ctkernels.testing.tasks import char_tokenizer

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def run(page: Path) -> dict:
    names = {}
    code = blocks(page)
    assert code
    for block in code:
        exec(block, names)
    return names


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_migration():
    run(DOCS / "guides" / "migrate.md")  # the blocks compare with what they replace


def test_tuning(tmp_path, monkeypatch):
    """With a tiny model in the place of the pretrained one."""
    make_model("llama", torch.float32, max_position_embeddings=4096).save_pretrained(tmp_path / ".models/smollm2-135m")
    char_tokenizer().save_pretrained(tmp_path / ".models/smollm2-135m")
    (tmp_path / "examples").symlink_to(DOCS.parent / "examples")
    monkeypatch.chdir(tmp_path)
    names = run(DOCS / "guides" / "tune.md")
    assert len(names["result"].history) == 3
    assert torch.equal(names["adapter"].prefix.keys[0], names["result"].prefix.keys[0])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_writing_a_backend(monkeypatch):
    """The backend of the page computes the op, forward and backward."""
    module = types.ModuleType("ctkernels.example_backend")
    (code,) = blocks(DOCS / "guides" / "backend.md")
    exec(code, vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(dispatch.BACKENDS, "example", (module.__name__, ("cpu",)))
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 4, 5, 8), (3, 2, 5, 8), (3, 2, 5, 8), (2, 7, 8), (2, 7, 8)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    tensors[0].requires_grad_(False)
    mask = ContextMask.leave_one_out(torch.tensor([0, 3, 7]), torch.tensor([0, 1, -1]), drop_p=0.2)
    results = []
    for backend in ("example", "reference"):
        out, lse = prefix_attention(*tensors, mask, return_lse=True, backend=backend)
        results.append((out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), tensors[1:])))
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted)


BUILT = DOCS / "api.md"
PAGES = [
    DOCS.parent / "README.md",
    DOCS.parent / "CONTRIBUTING.md",
    *sorted(page for page in DOCS.rglob("*.md") if page != BUILT),
]


def anchors(page: Path) -> set[str]:
    """What links can point to, as GitHub names headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS.parent).as_posix())
def test_links(page):
    """Every link to a file of this repository, and to a heading in one, leads somewhere."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_the_index():
    index = (DOCS / "index.md").read_text()
    for page in PAGES[2:]:
        name = page.relative_to(DOCS).as_posix()
        assert name == "index.md" or f"({name})" in index, name


def test_the_api_reference_is_built_and_has_every_public_name(tmp_path):
    """It is not committed: `make docs` writes it from the docstrings."""
    script = DOCS / "generate_api.py"
    subprocess.run([sys.executable, script, "--out", tmp_path / "api.md"], check=True, capture_output=True)
    page = (tmp_path / "api.md").read_text()
    for module in (ctkernels, tuning):
        assert all(f"\n### {name}\n" in page for name in module.__all__ if not name.startswith("_")), module
    assert "### cpu_info" in page and "KVPrefix.attach(" in page and "Raises:" in page
    assert "docs/api.md" in (DOCS / "index.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS.parent).as_posix())
def test_commands_exist(page):
    """Every `make TARGET` and every script that a page tells to run."""
    text, makefile = page.read_text(), (DOCS.parent / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for script in re.findall(r"(?<![\w/])(?:examples|benchmarks|tools|docs)/[\w/]+\.py\b", text):
        assert (DOCS.parent / script).exists(), script


def test_the_walks_name_files_that_exist():
    """Every path in backticks of CONTRIBUTING, from the top, from the package, or beside the one before."""
    text = (DOCS.parent / "CONTRIBUTING.md").read_text()
    walks = text[text.index("## Three walks") : text.index("## Rules")]
    previous = DOCS.parent
    found = re.findall(r"`([\w./]+\.(?:py|cpp|h|cuh))`", walks)
    assert len(found) > 30
    for name in found:
        folders = (DOCS.parent, DOCS.parent / "ctkernels", DOCS.parent / "ctkernels/tuning", previous)
        path = next((folder / name for folder in folders if (folder / name).exists()), None)
        assert path is not None, name
        previous = path.parent
