"""The Python of the guides runs as it stands, block after block of a page in one namespace."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("guide", ["migrate"])
def test_guides(guide, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = blocks(DOCS / "guides" / f"{guide}.md")
    assert code
    names = {}
    for block in code:
        exec(block, names)
