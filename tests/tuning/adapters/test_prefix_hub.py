"""Where a PrefixModel is saved to and read from: folders, checkpoints, runs, the hub."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file

from ctkernels.testing.models import make_model
from ctkernels.testing.tasks import char_tokenizer
from ctkernels.tuning.adapters import card
from ctkernels.tuning.adapters.adapter import Adapter
from ctkernels.tuning.adapters.file import FILE_NAME, PrefixFileError
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.adapters.prefix_model import PrefixModel
from tests.tuning.adapters.prefix_models import prefix_model, same_bits, values
from tests.tuning.runs import TOKENIZER, run


def base():
    return make_model("llama", torch.float32)


def read(source, **options) -> PrefixModel:
    return PrefixModel.from_pretrained(base(), source, **options)


def test_a_folder_is_that_of_a_prefix(tmp_path):
    model = prefix_model()
    model.save_pretrained(tmp_path / "one")
    assert {path.name for path in (tmp_path / "one").iterdir()} == {FILE_NAME, "README.md"}
    assert card.MARK in (tmp_path / "one" / "README.md").read_text()
    loaded = read(tmp_path / "one", adapter_name="mine", drop_p=0.2, tokenizer=TOKENIZER)
    assert same_bits(values(loaded), values(model)) and loaded.active_adapter == "mine"
    assert loaded.drop_p == 0.2 and not loaded.training and all(p.requires_grad for p in loaded.parameters())
    assert same_bits(values(KVPrefix.from_pretrained(tmp_path / "one")), values(model))
    assert same_bits(values(read(str(tmp_path / "one" / FILE_NAME))), values(model))
    assert Adapter.from_pretrained(tmp_path / "one", base()).prefix.length == model.prefixes["default"].length
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()


def test_each_other_prefix_has_a_folder_of_its_name(tmp_path):
    model = prefix_model()
    other = copy.deepcopy(model.prefixes["default"])
    with torch.no_grad():
        other.keys[0].add_(1)
    model.add_adapter("other", other)
    model.save_pretrained(tmp_path, card=False)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")) == [
        FILE_NAME,
        f"other/{FILE_NAME}",
    ]
    loaded = read(tmp_path)
    loaded.load_adapter(tmp_path / "other", "other")
    loaded.load_adapter(tmp_path, "again", subfolder="other")
    assert same_bits(values(loaded.prefixes["other"]), values(other))
    assert same_bits(values(loaded.prefixes["again"]), values(other))
    assert loaded.active_adapter == "default" and not any(
        p.requires_grad for p in loaded.prefixes["other"].parameters()
    )


def test_a_checkpoint_keeps_the_names_of_its_prefixes(tmp_path):
    model = prefix_model()
    model.add_adapter("other", copy.deepcopy(model.prefixes["default"]))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = read(tmp_path)
    assert list(loaded.prefixes) == ["default", "other"] and same_bits(values(loaded), values(model))
    assert read(tmp_path, adapter_name="other").active_adapter == "other"
    assert read(tmp_path, adapter_name="third").active_adapter == "default"
    with pytest.raises(PrefixFileError, match="holds several prefixes"):
        loaded.load_adapter(tmp_path, "third")


def test_the_folder_of_a_run(tmp_path):
    result = run("ct-kv", base())
    result.adapter.save_pretrained(tmp_path / "run" / "prefix")
    for read_prefix in (KVPrefix.from_pretrained, lambda folder: Adapter.from_pretrained(folder).prefix, read):
        assert same_bits(values(read_prefix(tmp_path / "run")), values(result.prefix))
    other = prefix_model()
    other.save_pretrained(tmp_path / "run")
    assert same_bits(values(read(tmp_path / "run")), values(other))  # its own adapter comes first


def test_what_cannot_be_read(tmp_path):
    make_model("gpt2", torch.float32).save_pretrained(tmp_path / "base")
    run("ttt", base()).adapter.save_pretrained(tmp_path / "ttt")
    prefix_model().save_pretrained(tmp_path / "one")
    prefix_model("gpt2").save_pretrained(tmp_path / "gpt2")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    save_file({"_extra_state": torch.tensor([123], dtype=torch.uint8)}, damaged / "model.safetensors")
    other, pipe = tmp_path / "other", tmp_path / "pipe"
    other.mkdir()
    save_file({"_extra_state": torch.zeros(3)}, other / "model.safetensors")
    pipe.mkdir()
    os.mkfifo(pipe / "model.safetensors")
    for source, message in (
        (tmp_path / "nothing", "adapter.safetensors: no such file or folder|nothing: no such file or folder"),
        (tmp_path / "base", "base/model.safetensors: not the state of a PrefixModel"),
        (tmp_path / "ttt", "belongs to a LoRA update of the weights; read it with Adapter.from_pretrained"),
        (tmp_path / "gpt2", "made for GPT2LMHeadModel"),
        (other, "the description of a state must be at most"),
        (pipe, "pipe/model.safetensors: must be a regular file; it is a FIFO"),
        (damaged, "damaged/model.safetensors: damaged: its description is not valid JSON"),
    ):
        with pytest.raises(PrefixFileError, match=message):
            read(source)
    with pytest.raises(PrefixFileError, match="not with this"):
        read(tmp_path / "one", tokenizer=smaller())


def smaller():
    tokenizer = char_tokenizer()
    tokenizer.add_tokens(["more"])
    return tokenizer


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's cache in a folder, without a network: `put` is what was fetched before."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def put(repository: str, folder: Path) -> None:
        place = tmp_path / "cache" / f"models--{repository.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("0" * 40)
        (place / "snapshots").mkdir()
        folder.rename(place / "snapshots" / ("0" * 40))

    return put


def test_a_repository_of_the_hub(hub, tmp_path):
    model = prefix_model()
    model.add_adapter("other", copy.deepcopy(model.prefixes["default"]))
    model.save_pretrained(tmp_path / "one")
    hub("me/task", tmp_path / "one")
    loaded = read("me/task")
    assert same_bits(values(loaded.prefixes["default"]), values(model.prefixes["default"]))
    loaded.load_adapter("me/task", "other", subfolder="other")
    with pytest.raises(PrefixFileError, match="me/other: no such folder here, and nothing from the hub: "):
        read("me/other")
    with pytest.raises(PrefixFileError, match="a/b/c: no such folder here, and nothing from the hub: Repo id"):
        read("a/b/c")


def test_without_a_network_the_hub_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(PrefixFileError, match=r"nothing from the hub: http://127.0.0.1:1 cannot be reached"):
        read("me/task")


@pytest.mark.parametrize("readme", [None, "mine", card.MARK])
def test_push_to_hub(monkeypatch, tmp_path, readme):
    """A README.md of somebody else there stays, a card of ours is replaced."""
    uploaded = {}

    def download(repo_id, name, revision, local_dir) -> None:
        Path(local_dir, name).write_text(readme)

    def upload(folder_path, **arguments) -> str:
        paths = list(Path(folder_path).rglob("*.*"))
        files = {path.relative_to(folder_path).as_posix(): path.read_bytes() for path in paths}
        uploaded.update(arguments, files=files)
        return "done"

    api = create_autospec(HfApi, instance=True)  # of the real one's signatures
    api.create_repo.return_value = SimpleNamespace(repo_id="me/task")
    api.file_exists.return_value = readme is not None
    api.hf_hub_download.side_effect, api.upload_folder.side_effect = download, upload
    monkeypatch.setattr(huggingface_hub, "HfApi", create_autospec(HfApi, return_value=api))
    model = prefix_model()
    if readme == "mine":
        with pytest.warns(UserWarning, match="is not a card that ctkernels wrote"):
            result = model.push_to_hub("task", private=True, token="secret", revision="v2")
    else:
        result = model.push_to_hub("task", private=True, token="secret", revision="v2")
    assert result == "done" and uploaded["repo_id"] == "me/task" and uploaded["revision"] == "v2"
    api.create_repo.assert_called_once_with("task", private=True, exist_ok=True)
    huggingface_hub.HfApi.assert_called_once_with(token="secret")
    assert set(uploaded["files"]) == {FILE_NAME, "README.md"}
    assert uploaded["allow_patterns"] == ["README.md", FILE_NAME, "*/README.md", f"*/{FILE_NAME}"]
    text = uploaded["files"]["README.md"].decode()
    assert text == "mine" if readme == "mine" else ('PrefixModel.from_pretrained(model, "FOLDER")' in text)
    (tmp_path / FILE_NAME).write_bytes(uploaded["files"][FILE_NAME])
    assert same_bits(values(read(tmp_path)), values(model))
