"""Which prefixes an engine serves, and what it reads of them."""

import copy

import pytest
import torch
from transformers import AutoConfig

from ctkernels.serving.vllm import files
from ctkernels.serving.vllm.files import PrefixFiles
from ctkernels.serving.vllm.salts import Placed
from ctkernels.testing.models import make_model, tokens
from ctkernels.tuning import KVPrefix, PrefixStore, concatenate, moved
from ctkernels.tuning.adapters import file
from ctkernels.tuning.adapters.file import PrefixFileError
from ctkernels.tuning.adapters.store import UnknownPrefixError
from ctkernels.tuning.hf.fingerprint import base_weights


@pytest.fixture(scope="module")
def model():
    return make_model("llama", torch.float32)


@pytest.fixture
def store(tmp_path, model):
    store = PrefixStore(tmp_path, model)
    store.put("a/b", KVPrefix.from_tokens(model, tokens(7), torch.tensor([0, 7])))
    return store


def files_of(store, model, **options) -> PrefixFiles:
    return PrefixFiles(store.directory, model.config, base_weights(model), **options)


def test_a_prefix_is_described_and_read(store, model):
    served = files_of(store, model)
    found = served.describe("a/b")
    assert found.placed.name == "a/b" and found.placed.length == 7 and found.context == tuple(tokens(7).tolist())
    prefix = store.get("a/b")
    for (key, value), k, v in zip(served.read(found.placed), prefix.keys, prefix.values, strict=True):
        assert torch.equal(key, k) and torch.equal(value, v)


def test_a_prefix_without_a_recorded_context_has_fillers(store, model):
    store.put("b", KVPrefix(*parts(store.get("a/b")), torch.tensor([0]), 7, store.get("a/b").metadata))
    assert files_of(store, model, filler=5).describe("b").context == (5,) * 7


def parts(prefix: KVPrefix) -> tuple[list, list]:
    return list(prefix.keys), list(prefix.values)


def test_a_replaced_prefix_is_another_one(store, model):
    served = files_of(store, model)
    before = served.describe("a/b").placed
    store.put("a/b", KVPrefix.from_tokens(model, tokens(7, seed=2), torch.tensor([0, 7])))
    after = served.describe("a/b").placed
    assert before.length == after.length and before.checksum != after.checksum
    with pytest.raises(PrefixFileError, match="was replaced after the request had chosen it"):
        served.read(before)
    served.read(after)


def test_a_prefix_that_is_replaced_while_it_is_read_is_not_taken(store, model, monkeypatch):
    """What was read may be the new one, under the name of the old one's content."""
    found = files_of(store, model)
    placed = found.describe("a/b").placed

    def slow(path, kind):
        store.put("a/b", KVPrefix.from_tokens(model, tokens(7, seed=2), torch.tensor([0, 7])))
        return file.read_file(path, kind)

    monkeypatch.setattr(files, "read_file", slow)
    with pytest.raises(PrefixFileError, match="was replaced while it was read"):
        found.read(placed)


def test_unknown_and_damaged_prefixes(store, model):
    served = files_of(store, model)
    with pytest.raises(UnknownPrefixError, match="no prefix named 'a/c'; near names are 'a/b'"):
        served.describe("a/c")
    placed = served.describe("a/b").placed
    path = store.path("a/b")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(PrefixFileError, match="checksum"):
        served.read(placed)
    path.unlink()
    with pytest.raises(UnknownPrefixError, match="no prefix named 'a/b'"):
        served.read(placed)


def test_prefixes_of_other_models_are_refused(store, model):
    other = make_model("llama", torch.float32, seed=3)
    with pytest.raises(PrefixFileError, match="with other weights the prefix means nothing"):
        files_of(store, other).describe("a/b")
    assert PrefixFiles(store.directory, other.config, None).describe("a/b")
    wide = make_model("llama", torch.float32, intermediate_size=48)
    with pytest.raises(PrefixFileError, match=r"made for LlamaForCausalLM.*has intermediate_size 48 instead of 40"):
        files_of(store, wide).describe("a/b")


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("states.0.state", {}, "holds states of layers"),
        ("bias.0", {}, "adds a bias to the logits"),
        ("lora.q", {"lora": {}}, "belongs to a LoRA update"),
        ("more.0", {}, "holds a tensor more.0, of which nothing is known"),
        ("", {"demonstrations": []}, "puts demonstrations in words"),
    ],
)
def test_what_vllm_has_no_place_for_is_refused(store, model, name, change, message):
    description, tensors = store.get("a/b").parts()
    extra = {name: torch.zeros(3)} if name else {}
    file.write_file(store.path("a/b"), "adapter", {**description, **change}, {**tensors, **extra})
    with pytest.raises(PrefixFileError, match=message):
        files_of(store, model).describe("a/b")


def test_an_empty_prefix_is_refused(store, model):
    store.put("empty", KVPrefix.from_tokens(model, torch.tensor([], dtype=torch.long), torch.tensor([0])))
    with pytest.raises(PrefixFileError, match="is empty"):
        files_of(store, model).describe("empty")


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_keys_are_moved_to_where_rows_begin(tmp_path, name):
    """Two parts side by side: rows begin behind the longer one, in vLLM behind both. The move needs no weights."""
    model = make_model(name, torch.float32)
    both = concatenate(
        [KVPrefix.from_tokens(model, tokens(n, seed=n), torch.tensor([0, n])) for n in (5, 4)], model, "shared"
    )
    assert (both.first_position, both.length) == (5, 9)
    store = PrefixStore(tmp_path, model)
    store.put("both", both)
    expected = moved(both, model, 9)
    served = files_of(store, model)
    found = served.read(served.describe("both").placed)
    for (key, value), k, v in zip(found, expected.keys, expected.values, strict=True):
        torch.testing.assert_close(key, k.detach(), rtol=1e-5, atol=1e-5)
        assert torch.equal(value, v)
    assert (found[0][0] - both.keys[0]).abs().max() > 1e-2


def test_keys_that_cannot_be_moved_are_refused(tmp_path):
    model = make_model("gpt2", torch.float32)
    store = PrefixStore(tmp_path, model)
    prefix = KVPrefix.from_tokens(model, tokens(5), torch.tensor([0, 5]))
    store.put("far", KVPrefix(*parts(prefix), torch.tensor([0]), 8, prefix.metadata))
    with pytest.raises(PrefixFileError, match="cannot be moved"):
        files_of(store, model).describe("far")


def test_the_configuration_that_vllm_reads_is_enough(store, model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert PrefixFiles(store.directory, copy.deepcopy(config), base_weights(model)).describe("a/b")
    with pytest.raises(PrefixFileError, match="no prefix named"):
        PrefixFiles(store.directory, config, None).read(Placed("x", 1, "00"))
