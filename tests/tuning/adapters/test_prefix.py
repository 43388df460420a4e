"""KVPrefix as a module, and saved prefixes: what is written, and every way in which a file can be wrong."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json

import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ctkernels.testing.models import make_model, tokens
from ctkernels.tuning import storage
from ctkernels.tuning.adapters import prefix_file
from ctkernels.tuning.adapters.prefix import KVPrefix, PrefixMetadata, tokenizer_hash
from ctkernels.tuning.adapters.prefix_file import PrefixFileError
from ctkernels.tuning.data.demonstrations import Demonstration
from ctkernels.tuning.data.formats import EncodedContext, TextFormat, encode_context
from ctkernels.tuning.hf.models import Decoder
from ctkernels.tuning.storage import atomic_file, atomic_write_bytes, atomic_write_json

SEGMENTS = torch.tensor([1, 4, 9])


def make_tokenizer(words: str = "<unk> <s> good bad film food was is the a") -> PreTrainedTokenizerFast:
    """Words and spaces, one token each."""
    vocabulary = {word: i for i, word in enumerate([" ", *words.split()])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", name_or_path="words")


@pytest.fixture(scope="module")
def model():
    model = make_model("llama")
    model.name_or_path = "tiny/llama"
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def prefix(model, tokenizer) -> KVPrefix:
    settings = {"lr": 1e-3, "epochs": 3, "drop": [0.05]}
    return KVPrefix.from_tokens(model, tokens(9), SEGMENTS, tokenizer, method="ct-kv", settings=settings)


def equal(a: KVPrefix, b: KVPrefix) -> bool:
    state, other = a.state_dict(), b.state_dict()
    same = state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)
    return same and a.metadata == b.metadata and a.first_position == b.first_position


# the module


def test_module_state(prefix):
    assert len(list(prefix.parameters())) == 6
    assert [name for name, _ in prefix.named_buffers()] == ["segments"]
    assert prefix.segments.dtype == torch.int64
    assert (prefix.length, prefix.first_position, prefix.num_demonstrations) == (9, 9, 2)
    assert prefix.to(torch.float32).keys[0].dtype == torch.float32
    assert "ct-kv for LlamaForCausalLM: 3 layers of [2, 9, 8], 2 demonstrations" in repr(prefix)


def test_from_demonstrations(model, tokenizer):
    pairs = [Demonstration("the film was good", "good"), Demonstration("the food is bad", "bad")]
    form = TextFormat(delimiter="is", bos=True)
    prefix = KVPrefix.from_demonstrations(model, tokenizer, pairs, text_format=form)
    context = encode_context(tokenizer, pairs, form)
    assert isinstance(context, EncodedContext)
    expected = KVPrefix.from_tokens(model, context.input_ids, context.segments, tokenizer)
    expected.metadata = dataclasses.replace(expected.metadata, settings={"text_format": dataclasses.asdict(form)})
    assert equal(prefix, expected)
    assert prefix.length == len(context.input_ids) > 10
    assert prefix.metadata.tokenizer_id == "words"


def test_number_of_demonstrations(model, tokenizer):
    one = KVPrefix.from_demonstrations(model, tokenizer, [Demonstration("the film was good", "good")])
    assert one.num_demonstrations == 1  # in-context learning may use it; a trainer has to refuse leave-one-out
    with pytest.raises(ValueError, match="demonstrations must hold at least one pair, got none"):
        KVPrefix.from_demonstrations(model, tokenizer, [])


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
@torch.no_grad()
def test_empty_prefix(name):
    """No context tokens: the attached model is the model itself."""
    model = make_model(name)
    prefix = KVPrefix.from_tokens(model, torch.empty(0, dtype=torch.long), torch.tensor([0]))
    row = tokens(1, 6)
    expected = model(row).logits
    assert (prefix.length, prefix.num_demonstrations) == (0, 0)
    with prefix.attach(model):
        tolerance = 1e-5 if name == "bloom" else 1e-9  # whose own softmax is fp32
        torch.testing.assert_close(model(row).logits, expected, rtol=tolerance, atol=tolerance)


def test_arguments_that_do_not_fit(model, prefix):
    keys, values = list(prefix.keys), list(prefix.values)
    for change, error, message in (
        ({"keys": []}, ValueError, "one tensor per layer, got 0 and 3"),
        ({"keys": keys[:2]}, ValueError, "one tensor per layer, got 2 and 3"),
        ({"keys": [keys[0][0], *keys[1:]]}, ValueError, r"keys\[0\] must have shape \[Hk, P, D\], got \(9, 8\)"),
        ({"keys": [keys[0].long(), *keys[1:]]}, TypeError, r"keys\[0\] must be a floating tensor"),
        ({"values": [values[0][:, :8], *values[1:]]}, ValueError, r"values\[0\] must be like keys\[0\]"),
        ({"values": [values[0].float(), *values[1:]]}, ValueError, r"values\[0\] must be like keys\[0\]"),
        (
            {"keys": [keys[0], keys[1][:, :8], keys[2]], "values": [values[0], values[1][:, :8], values[2]]},
            ValueError,
            r"keys\[1\] must have the P = 9 tokens of keys\[0\], got 8",
        ),
        ({"segments": torch.tensor([0, 5, 10])}, ValueError, r"within the 9 prefix tokens, got \[0, 5, 10\]"),
        ({"segments": torch.tensor([0, 5, 4])}, ValueError, "non-decreasing"),
        ({"segments": torch.tensor([-1, 5])}, ValueError, "non-decreasing offsets within"),
        ({"segments": torch.tensor([0.0, 5.0])}, ValueError, "segments must be an integer tensor"),
        ({"segments": torch.empty(0, dtype=torch.long)}, ValueError, r"segments must be an integer tensor \[K\+1\]"),
        ({"first_position": -1}, ValueError, "first_position must be an integer >= 0, got -1"),
        ({"first_position": 2.5}, ValueError, "first_position must be an integer >= 0, got 2.5"),
    ):
        arguments = {"keys": keys, "values": values, "segments": SEGMENTS, "first_position": 9}
        with pytest.raises(error, match=message):
            KVPrefix(**{**arguments, **change}, metadata=prefix.metadata)


def test_tokens_that_do_not_fit(model):
    with pytest.raises(ValueError, match=r"input_ids must have shape \[P\], got \(1, 4\)"):
        KVPrefix.from_tokens(model, tokens(1, 4), SEGMENTS)
    with pytest.raises(TypeError, match="input_ids must be integers"):
        KVPrefix.from_tokens(model, torch.randn(9), SEGMENTS)
    with pytest.raises(ValueError, match=r"within the 4 prefix tokens, got \[1, 4, 9\]"):
        KVPrefix.from_tokens(model, tokens(4), SEGMENTS)


# saved prefixes


def test_round_trip(model, tokenizer, prefix, tmp_path):
    directory = tmp_path / "runs" / "task"
    prefix.save_pretrained(directory)
    assert equal(KVPrefix.from_pretrained(directory), prefix)
    loaded = KVPrefix.from_pretrained(directory, model, tokenizer)
    assert equal(loaded, prefix)
    assert all(p.requires_grad for p in loaded.parameters())
    row = tokens(1, 5)
    with torch.no_grad(), loaded.attach(model):
        actual = model(row).logits
    with torch.no_grad(), prefix.attach(model):
        assert torch.equal(model(row).logits, actual)


def test_layers_go_where_those_of_the_model_are(prefix, saved, monkeypatch):
    """With "meta" in the place of a second GPU."""
    spread = (torch.device("cpu"), torch.device("meta"), torch.device("cpu"))
    monkeypatch.setattr(Decoder, "devices", spread)
    loaded = KVPrefix.from_pretrained(saved, model=make_model("llama"))
    assert tuple(key.device for key in loaded.keys) == tuple(value.device for value in loaded.values) == spread
    assert torch.equal(loaded.keys[2], prefix.keys[2]) and loaded.segments.device == spread[0]
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in loaded.parameters())


def test_what_is_written(prefix, tmp_path):
    prefix.save_pretrained(tmp_path)
    description = json.loads((tmp_path / "prefix.json").read_text())
    assert description["format"] == "ctkernels-kv-prefix"
    assert description["format_version"] == 1
    assert description["segments"] == [1, 4, 9]
    assert description["first_position"] == 9
    assert description["shapes"]["values.2"] == [2, 9, 8]
    assert description["metadata"] == dataclasses.asdict(prefix.metadata)
    assert description["metadata"]["model_id"] == "tiny/llama"
    assert description["metadata"]["settings"] == {"lr": 1e-3, "epochs": 3, "drop": [0.05]}
    assert set(description["versions"]) == {"ctkernels", "torch", "transformers"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [description["tensors"], "prefix.json"]


def test_saving_again_replaces(prefix, tmp_path):
    (tmp_path / "notes.txt").write_text("keep me")
    for _ in range(3):
        with torch.no_grad():
            prefix.keys[0].add_(1.0)
        prefix.save_pretrained(tmp_path)
    assert equal(KVPrefix.from_pretrained(tmp_path), prefix)
    assert len(list(tmp_path.iterdir())) == 3


def test_loading_into_another_precision(prefix, tmp_path):
    prefix.save_pretrained(tmp_path)
    half = make_model("llama", torch.bfloat16)
    loaded = KVPrefix.from_pretrained(tmp_path, half)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    with torch.no_grad(), loaded.attach(half):
        half(tokens(1, 3))


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_after_some_bytes(tensors, path):
    path.write_bytes(b"half a file")
    no_space()


@pytest.mark.parametrize("there_before", [False, True])
@pytest.mark.parametrize("victim", ["tensors", "description", "flush"])
def test_full_disk(prefix, tmp_path, monkeypatch, victim, there_before):
    """A disk that fills while saving leaves the old prefix, or nothing."""
    directory = tmp_path / "task"
    old = copy.deepcopy(prefix)
    if there_before:
        old.save_pretrained(directory)
    before = {path.name: path.read_bytes() for path in directory.iterdir()} if there_before else {}
    with torch.no_grad():
        prefix.keys[0].add_(1.0)
    if victim == "tensors":
        monkeypatch.setattr(safetensors.torch, "save_file", full_after_some_bytes)
    elif victim == "description":
        monkeypatch.setattr(prefix_file, "atomic_write_json", no_space)
    else:
        monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        prefix.save_pretrained(directory)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    if there_before:
        assert equal(KVPrefix.from_pretrained(directory), old)
    prefix.save_pretrained(directory)
    assert equal(KVPrefix.from_pretrained(directory), prefix)


def test_an_error_behind_the_last_step_leaves_the_new_prefix(prefix, tmp_path, monkeypatch):
    """The description is in its place; making its rename durable fails."""
    prefix.save_pretrained(tmp_path)
    with torch.no_grad():
        prefix.keys[0].add_(1.0)

    def fails(path, mode, calls=[]):  # noqa: B006 (counts)
        calls.append(path)
        if calls.count(tmp_path) == 2:
            no_space()

    monkeypatch.setattr(storage, "_flush", fails)
    with pytest.raises(OSError, match="No space left"):
        prefix.save_pretrained(tmp_path)
    assert equal(KVPrefix.from_pretrained(tmp_path), prefix) and len(list(tmp_path.iterdir())) == 2


def test_settings_that_json_lacks(prefix, tmp_path):
    prefix.metadata = dataclasses.replace(prefix.metadata, settings={"drop": torch.tensor(1.0)})
    with pytest.raises(TypeError, match="Tensor is not JSON serializable"):
        prefix.save_pretrained(tmp_path / "task")
    assert not (tmp_path / "task").exists()


@pytest.fixture
def saved(prefix, tmp_path):
    prefix.save_pretrained(tmp_path)
    return tmp_path


def edit(directory, **changes) -> None:
    path = directory / "prefix.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def tensor_file(directory):
    return next(directory.glob("*.safetensors"))


def refuses(directory, message: str, *check) -> None:
    with pytest.raises(PrefixFileError, match=message):
        KVPrefix.from_pretrained(directory, *check)


def test_missing_files(saved, tmp_path):
    refuses(tmp_path / "nowhere", r"nowhere/prefix\.json: no such file")
    tensor_file(saved).unlink()
    refuses(saved, r"\.safetensors: no such file, although prefix\.json names it")


def test_damaged_tensors(saved):
    path = tensor_file(saved)
    data = path.read_bytes()
    for damage in (data[:-5], data[:40], b"", data + b"x"):
        path.write_bytes(damage)
        refuses(saved, r"\.safetensors: damaged or cut off")


def test_other_tensors(saved):
    path = tensor_file(saved)
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({**tensors, "keys.1": torch.zeros(2, 8, 8)}, path)
    refuses(saved, r"tensor keys\.1 has shape \(2, 8, 8\), prefix\.json says \(2, 9, 8\)")
    safetensors.torch.save_file({key: x for key, x in tensors.items() if key != "values.2"}, path)
    refuses(saved, r"tensor values\.2 has shape None")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"format": "ctkern', "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[1, 2]", "not a prefix saved by ctkernels"),
        (b'{"peft_type": "PREFIX_TUNING"}', "not a prefix saved by ctkernels"),
        (b'{"format": "ctkernels-kv-prefix", "format_version": 1}', "damaged description: KeyError"),
    ],
)
def test_foreign_descriptions(saved, content, message):
    (saved / "prefix.json").write_bytes(content)
    refuses(saved, rf"prefix\.json: {message}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format version 2, this ctkernels .* reads up to 1"),
        ({"format_version": "new"}, "format version new"),
        ({"segments": [0, 5, 10]}, "non-decreasing offsets within the 9 prefix tokens"),
        ({"segments": "x"}, "damaged description"),
        ({"first_position": -3}, "first_position must be an integer >= 0, got -3"),
        ({"tensors": "../../etc/passwd"}, "damaged description: .*names '../../etc/passwd'"),
        ({"shapes": {}}, "tensor keys.0 has shape .*says None"),
        ({"metadata": {"model_class": "LlamaForCausalLM"}}, "damaged description: TypeError"),
    ],
    ids=str,
)
def test_damaged_descriptions(saved, change, message):
    edit(saved, **change)
    refuses(saved, message)


def test_another_model(saved):
    refuses(saved, "made for LlamaForCausalLM 'tiny/llama' .* not for this MistralForCausalLM", make_model("mistral"))
    refuses(saved, "not for this LlamaForCausalLM", make_model("llama", rms_norm_eps=0.5))


def test_other_weights_of_the_same_architecture(saved):
    other = make_model("llama", seed=1)
    other.name_or_path = "tiny/llama-instruct"
    with pytest.warns(UserWarning, match="made for model 'tiny/llama', loaded for 'tiny/llama-instruct'"):
        KVPrefix.from_pretrained(saved, other)


def test_another_tokenizer(saved, model, tokenizer):
    other = make_tokenizer("<unk> <s> bad good film food was is the a")
    refuses(saved, "made with tokenizer 'words' .* not with this 'words'", model, other)
    larger = make_tokenizer()
    larger.add_tokens(["new"])
    refuses(saved, "made with tokenizer", None, larger)
    assert tokenizer_hash(tokenizer) == tokenizer_hash(make_tokenizer())


def test_prefix_without_a_tokenizer_accepts_any(model, tokenizer, tmp_path):
    KVPrefix.from_tokens(model, tokens(9), SEGMENTS).save_pretrained(tmp_path)
    assert KVPrefix.from_pretrained(tmp_path, model, tokenizer).metadata == PrefixMetadata.of(model)


# storage


def test_atomic_write(tmp_path):
    path = tmp_path / "new" / "value.json"
    atomic_write_json(path, {"a": "ü"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ü"}
    atomic_write_bytes(path, b"second")
    assert path.read_bytes() == b"second"
    with pytest.raises(TypeError):
        atomic_write_json(path, {"a": object()})
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"second"
    assert [p.name for p in path.parent.iterdir()] == ["value.json"]
