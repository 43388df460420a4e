"""What earlier versions saved: the files in `fixtures`, which they really wrote (see `fixtures/write.py`)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from ctkernels.testing.models import make_model
from ctkernels.testing.tasks import DEMONSTRATIONS, char_tokenizer
from ctkernels.tuning import Adapter, KVPrefix, PrefixStore, get_method, tune
from ctkernels.tuning.adapters.file import PrefixFileError, read_file
from ctkernels.tuning.train.checkpoint import CheckpointError
from tests.tuning.adapters.fixtures.write import (
    EPOCHS,
    LORA_SHAPES,
    METHOD,
    SEGMENTS,
    SETTINGS,
    STOPPED,
    TUNED,
    layers,
    values,
)
from tests.tuning.runs import assert_same_bits

FIXTURES = Path(__file__).parent / "fixtures"
FOLDERS = ("prefix", "prompt", "lora", "pool", "older")


@pytest.fixture
def fixtures(tmp_path):
    shutil.copytree(FIXTURES, tmp_path / "fixtures")
    return tmp_path / "fixtures"


@pytest.fixture(scope="module")
def model():
    model = make_model("llama", torch.float32)
    model.name_or_path = "tiny/llama"
    return model


def check_prefix(prefix: KVPrefix) -> None:
    assert prefix.segments.tolist() == SEGMENTS and prefix.first_position == 4
    for found, start in ((prefix.keys, 0), (prefix.values, 10)):
        assert all(torch.equal(x, y) for x, y in zip(found, layers(start), strict=True))
    metadata = prefix.metadata
    assert (metadata.method, metadata.settings, metadata.model_id) == (METHOD, SETTINGS, "tiny/llama")
    assert metadata.weights is None and metadata.tokenizer_hash is not None


def check_adapter(adapter: Adapter, name: str) -> None:
    check_prefix(adapter.prefix)
    assert (adapter.prompt is not None) == (name in ("prompt", "pool", "older"))
    assert (adapter.lora is not None) == (name in ("lora", "older"))
    assert adapter.demonstrations == (tuple(DEMONSTRATIONS[:2]) if name in ("pool", "older") else ())
    if adapter.prompt is not None:
        assert torch.equal(adapter.prompt.embeddings, values(20, 4, 32))
        assert adapter.prompt.segments.tolist() == SEGMENTS
    if adapter.lora is not None:
        assert (adapter.lora.rank, adapter.lora.alpha, adapter.lora.targets) == (1, 2.0, ("q_proj", "v_proj"))
        assert adapter.lora.tensors.keys() == LORA_SHAPES.keys()
        for number, (key, shape) in enumerate(LORA_SHAPES.items()):
            assert torch.equal(adapter.lora.tensors[key], values(number, *shape))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", FOLDERS)
def test_old_folders_load_and_are_replaced(fixtures, model, name):
    """Saving over them leaves one file, and what is the user's."""
    folder = fixtures / name
    for adapter in (
        Adapter.from_pretrained(folder),
        Adapter.from_pretrained(folder, model, char_tokenizer()),
    ):
        check_adapter(adapter, name)
    if adapter.lora is None:
        check_prefix(KVPrefix.from_pretrained(folder))
    else:
        with pytest.warns(UserWarning, match="belongs to a LoRA update"):
            check_prefix(KVPrefix.from_pretrained(folder))
    (folder / "prompt-ideas.safetensors").touch()
    (folder / "lora-notes").mkdir()
    adapter.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter.safetensors",
        "lora-notes",
        "prompt-ideas.safetensors",
    ]
    check_adapter(Adapter.from_pretrained(folder, model, char_tokenizer()), name)


def test_another_model_than_that_of_an_old_folder(fixtures, model):
    with pytest.raises(
        PrefixFileError, match=r"made for LlamaForCausalLM 'tiny/llama'; this Mistral.* has another configuration"
    ):
        Adapter.from_pretrained(fixtures / "prefix", make_model("mistral", torch.float32))
    other = make_model("llama", torch.float32)
    other.name_or_path = "tiny/llama-instruct"
    with pytest.warns(UserWarning, match="loaded for 'tiny/llama-instruct' .* perhaps with other weights"):
        Adapter.from_pretrained(fixtures / "prefix", other)


def test_a_description_apart_of_another_prefix_does_not_count(fixtures):
    """As an older version left it that was killed while it saved."""
    path = fixtures / "older" / "adapter.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prefix": "prefix-0123456789abcdef.safetensors"}))
    check_adapter(Adapter.from_pretrained(fixtures / "older"), "prefix")


def damaged(folder: Path, name: str, **changes) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, r"prefix\.json was not saved by ctkernels"),
        ({"format_version": 2}, r"prefix\.json has format version 2, 1 is known"),
        ({"tensors": "../../etc/passwd"}, r"prefix\.json names '\.\./\.\./etc/passwd'"),
        ({"tensors": 3}, "damaged: TypeError"),
        ({"tensors": "prefix-0123456789abcdef.safetensors"}, r"prefix-0123456789abcdef\.safetensors: no such file"),
        ({"shapes": {"keys.0": [2, 5, 8]}}, r"tensor keys\.0 has shape \[2, 4, 8\], prefix\.json says \[2, 5, 8\]"),
        ({"shapes": 3}, "damaged: AttributeError"),
        ({"metadata": {}}, "damaged: TypeError"),
        ({"segments": [0, 5]}, "within the 4 prefix tokens"),
        ({"beside": [3]}, "damaged: TypeError"),
        ({"beside": {"prompt": "../prompt/x"}}, r"prefix\.json names '\.\./prompt/x'"),
        ({"beside": {"lora": "lora-0123456789abcdef"}}, r"adapter_config\.json: no such file"),
        ({"beside": {"pool": [{"input": "x"}]}}, "damaged: TypeError"),
    ],
    ids=str,
)
def test_damaged_old_folders(fixtures, change, message):
    damaged(fixtures / "prefix", "prefix.json", **change)
    with pytest.raises(PrefixFileError, match=message) as caught:
        Adapter.from_pretrained(fixtures / "prefix")
    assert str(caught.value).startswith(f"{fixtures / 'prefix'}: ")


def test_old_folders_with_damaged_files(fixtures):
    for name in ("prompt", "lora"):
        path = next((fixtures / name).glob("prompt-*" if name == "prompt" else "lora-*/*.safetensors"))
        path.write_bytes(path.read_bytes()[:-5])
        with pytest.raises(PrefixFileError, match=rf"{path.name} is damaged or cut off"):
            Adapter.from_pretrained(fixtures / name)
    (fixtures / "pool" / "prefix.json").write_text("{")
    with pytest.raises(PrefixFileError, match="damaged: its description is not valid JSON"):
        Adapter.from_pretrained(fixtures / "pool")


def test_an_old_store(fixtures, model):
    store = PrefixStore(fixtures / "store", model)
    assert list(store) == ["team-a/routing"]
    check_prefix(store.get("team-a/routing"))
    store.put("team-a/routing", store.get("team-a/routing"))
    assert read_file(store.path("team-a/routing"), "adapter").description["format_version"] == 2


def test_an_old_checkpoint_is_resumed(fixtures):
    """As if the run had never stopped. What it was run with is compared as before, but for the model's fingerprint."""

    def run(**arguments):
        model, pairs = make_model("llama", torch.float32), DEMONSTRATIONS[1:4:2]
        settings = get_method("ct-kv").settings(**{**TUNED, **arguments.pop("options", {})})
        return tune(model, char_tokenizer(), arguments.pop("pairs", pairs), settings=settings, **arguments)

    old = {"checkpoint_dir": fixtures / "checkpoint", "resume": True}
    warned = pytest.warns(UserWarning, match=r"checkpoint\.safetensors was written by an earlier version of ctkernels")
    for change, message in (
        ({"options": {"lr": 0.5}}, "lr was 0.01 and is now 0.5"),
        ({"pairs": DEMONSTRATIONS[:2]}, "demonstrations was '[0-9a-f]{16}' and is now"),
        ({"start_from": run().adapter}, "start_from was None and is now '[0-9a-f]{16}'"),
    ):
        with warned, pytest.raises(CheckpointError, match=message):
            run(**change, **old)
    epochs = []
    with warned:
        resumed = run(**old, on_epoch=lambda record, module: epochs.append(record.epoch))
    assert epochs == list(range(STOPPED + 1, EPOCHS + 1))
    expected = run()
    for x, y in zip(resumed.prefix.parameters(), expected.prefix.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)  # kernels may differ between processors
    saved = read_file(fixtures / "checkpoint" / "checkpoint.safetensors", "checkpoint").description
    assert saved["format_version"] == 2 and len(saved["history"]) == EPOCHS
    assert_same_bits(run(**old).adapter, resumed.adapter)  # a checkpoint like any other now, without a warning
