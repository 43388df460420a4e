"""The Python of the guides runs as it stands, block after block of a page in one namespace; links lead somewhere."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ctkernels
from ctkernels import tuning
from ctkernels.testing.models import make_model
from ctkernels.testing.tasks import char_tokenizer
from ctkernels.tuning.data.suites import SUITES
from ctkernels.tuning.methods import METHODS
from ctkernels.tuning.methods.settings import SETTINGS

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


def test_no_two_pages_or_examples_share_an_output_folder():
    """Whoever follows one after the other would replace results, or be refused."""
    ways = r"--out|OUT=|save_pretrained\(|PrefixStore\(|TrainingArguments\(|_dir="
    writes = re.compile(rf"""(?:{ways})[\s"']*runs/([\w-]+)""")
    owners = {}
    for page in (*PAGES, *sorted((DOCS.parent / "examples").glob("*.py"))):
        for folder in set(writes.findall(page.read_text())):
            owners.setdefault(folder, []).append(page.name)
    assert len(owners) > 15 and {name: pages for name, pages in owners.items() if len(pages) > 1} == {}


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


def test_the_tables_of_the_methods_page_are_current():
    """`make docs` writes them from the tables of methods, settings, presets and suites."""
    text = (DOCS / "methods.md").read_text()
    script = runpy.run_path(str(DOCS / "generate_methods.py"))
    assert script["page"](text) == text
    assert "| `lr` | 0.003; 0.001 (ct-prompt, cpt); 0.0001 (ttt) | all that train | peak learning rate" in text
    assert all(f"\n| `{name}` |" in text for name in (*METHODS, *SETTINGS, *SUITES))
    with pytest.raises(SystemExit, match="has no place for the table of presets"):
        script["page"](text.replace("<!-- /presets -->", ""))
