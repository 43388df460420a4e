"""The Python and the commands of the guides run as they stand, on a tiny model in the place of the pretrained one."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from ctkernels import cli
from ctkernels.testing.models import make_model
from ctkernels.testing.tasks import char_tokenizer

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"```(python|bash)\n(.*?)```", re.DOTALL)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # of peft itself
@pytest.mark.parametrize("guide", ["serve", "peft", "trainer"])
def test_guide(guide, tmp_path, monkeypatch, capsys):
    model = make_model("llama", torch.float32, max_position_embeddings=4096)
    model.save_pretrained(tmp_path / ".models/smollm2-135m")
    char_tokenizer().save_pretrained(tmp_path / ".models/smollm2-135m")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    blocks = BLOCK.findall((ROOT / f"docs/guides/{guide}.md").read_text())
    assert len(blocks) >= 2
    for language, code in blocks:
        if language == "python":
            exec(code, names)
            continue
        for command in code.replace("\\\n", " ").splitlines():
            program, *arguments = shlex.split(command)
            assert program == "ctkernels" and cli.run(arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    if guide == "serve":
        assert len(names["store"]) == 3 and names["answers"].shape[0] == 3
        assert names["both"].length == names["store"].get("both").length > 100
    elif guide == "trainer":
        assert printed[0].startswith("trainable params: ") and names["answer"].shape[0] == 1
        assert (tmp_path / "runs/trainer/state/model.safetensors").exists()
    else:
        assert printed[-1] == printed[-2]  # peft generates what the attached model does
