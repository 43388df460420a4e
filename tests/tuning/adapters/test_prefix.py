"""KVPrefix as a module, and saved prefixes: what is written, and what is refused (`test_file.py`: damaged files)."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import warnings

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ctkernels.testing.models import make_model, stock_logits, tokens
from ctkernels.tuning import storage
from ctkernels.tuning.adapters.file import PrefixFileError, read_file, write_file
from ctkernels.tuning.adapters.prefix import KVPrefix, PrefixMetadata, tokenizer_hash
from ctkernels.tuning.adapters.prefix_set import PrefixSet
from ctkernels.tuning.data.demonstrations import Demonstration
from ctkernels.tuning.data.formats import EncodedContext, TextFormat, encode_context
from ctkernels.tuning.evaluation.evaluate import evaluate_prefix
from ctkernels.tuning.hf.fingerprint import weights_fingerprint
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
    expected.metadata = dataclasses.replace(expected.metadata, settings={"text_format": form.recorded})
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
    assert KVPrefix.from_pretrained(directory).context == prefix.context and len(prefix.context) == prefix.length
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


def test_what_is_written(model, prefix, tmp_path):
    prefix.save_pretrained(tmp_path)
    _, description, tensors = read_file(tmp_path, "adapter")
    assert description["format"] == "ctkernels-adapter"
    assert description["format_version"] == 2
    assert description["segments"] == [1, 4, 9]
    assert description["first_position"] == 9
    assert description["metadata"] == dataclasses.asdict(prefix.metadata)
    assert description["metadata"]["model_id"] == "tiny/llama"
    assert description["metadata"]["weights"] == weights_fingerprint(model)
    assert description["metadata"]["settings"] == {"lr": 1e-3, "epochs": 3, "drop": [0.05]}
    assert set(description["versions"]) == {"ctkernels", "torch", "transformers"}
    assert set(tensors) == {f"{kind}.{layer}" for kind in ("keys", "values") for layer in range(3)}
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.safetensors"]


def test_the_file_itself_can_be_read(prefix, tmp_path):
    prefix.save_pretrained(tmp_path)
    (tmp_path / "adapter.safetensors").rename(tmp_path / "other name")
    assert equal(KVPrefix.from_pretrained(tmp_path / "other name"), prefix)


def test_saving_again_replaces(prefix, tmp_path):
    (tmp_path / "notes.txt").write_text("keep me")
    for _ in range(3):
        with torch.no_grad():
            prefix.keys[0].add_(1.0)
        prefix.save_pretrained(tmp_path)
    assert equal(KVPrefix.from_pretrained(tmp_path), prefix)
    assert len(list(tmp_path.iterdir())) == 2


def test_loading_into_another_precision(prefix, tmp_path):
    prefix.save_pretrained(tmp_path)
    half = make_model("llama", torch.bfloat16)
    loaded = KVPrefix.from_pretrained(tmp_path, half)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    with torch.no_grad(), loaded.attach(half):
        half(tokens(1, 3))


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("there_before", [False, True])
@pytest.mark.parametrize("victim", ["write", "flush"])
def test_full_disk(prefix, tmp_path, monkeypatch, full_disk, victim, there_before):
    """A disk that fills while saving leaves the old prefix, or nothing."""
    directory = tmp_path / "task"
    old = copy.deepcopy(prefix)
    if there_before:
        old.save_pretrained(directory)
    before = {path.name: path.read_bytes() for path in directory.iterdir()} if there_before else {}
    with torch.no_grad():
        prefix.keys[0].add_(1.0)
    if victim == "write":
        with full_disk(4096), pytest.raises(OSError, match="File too large"):
            prefix.save_pretrained(directory)
    else:
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr("os.fsync", no_space)
            prefix.save_pretrained(directory)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    if there_before:
        assert equal(KVPrefix.from_pretrained(directory), old)
    prefix.save_pretrained(directory)
    assert equal(KVPrefix.from_pretrained(directory), prefix)


def test_an_error_behind_the_last_step_leaves_the_new_prefix(prefix, tmp_path, monkeypatch):
    """The file is in its place; making its rename durable fails."""
    prefix.save_pretrained(tmp_path)
    with torch.no_grad():
        prefix.keys[0].add_(1.0)

    def fails(path, mode):
        if path == tmp_path:
            no_space()

    monkeypatch.setattr(storage, "_flush", fails)
    with pytest.raises(OSError, match="No space left"):
        prefix.save_pretrained(tmp_path)
    assert equal(KVPrefix.from_pretrained(tmp_path), prefix) and len(list(tmp_path.iterdir())) == 1


def test_settings_that_json_lacks(prefix, tmp_path):
    prefix.metadata = dataclasses.replace(prefix.metadata, settings={"drop": torch.tensor(1.0)})
    with pytest.raises(TypeError, match="Tensor is not JSON serializable"):
        prefix.save_pretrained(tmp_path / "task")
    assert not (tmp_path / "task").exists()


@pytest.fixture
def saved(prefix, tmp_path):
    prefix.save_pretrained(tmp_path)
    return tmp_path


def edit(directory, description=(), tensors=()) -> None:
    """Write what is there anew, with changes; a tensor None is left out."""
    _, was, were = read_file(directory, "adapter")
    now = {name: x for name, x in {**were, **dict(tensors)}.items() if x is not None}
    write_file(directory / "adapter.safetensors", "adapter", {**was, **dict(description)}, now)


def refuses(directory, message: str, *check) -> None:
    with pytest.raises(PrefixFileError, match=message):
        KVPrefix.from_pretrained(directory, *check)


def test_missing_files(saved, tmp_path):
    refuses(tmp_path / "nowhere", r"nowhere: no such file or folder$")
    (saved / "adapter.safetensors").unlink()
    refuses(saved, r"adapter\.safetensors: no such file or folder$")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys.1": torch.zeros(2, 8, 8)}, r"adapter\.safetensors: values\[1\] must be like keys\[1\]"),
        ({"values.2": None}, "damaged: 'values.2' is missing"),
        ({"keys.2": None}, "damaged: 'keys.2' is missing"),
        ({"bias.0": torch.zeros(9)}, "holds a tensor bias.0, of which nothing is known"),
        ({"prompt": torch.zeros(9, 32)}, "holds a tensor prompt, of which nothing is known"),
        (
            {"keys.0": torch.zeros(2, 9, 8).long()},
            r"damaged: TypeError: keys\[0\] must be a floating tensor",
        ),
    ],
    ids=["shape", "values", "keys", "bias", "prompt", "type"],
)
def test_other_tensors(saved, change, message):
    edit(saved, tensors=change)
    refuses(saved / "adapter.safetensors", message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segments": [0, 5, 10]}, "non-decreasing offsets within the 9 prefix tokens"),
        ({"segments": "x"}, "damaged: TypeError"),
        ({"segments": [1 << 80]}, "Overflow when unpacking"),
        ({"first_position": -3}, "first_position must be an integer >= 0, got -3"),
        ({"metadata": {"model_class": "LlamaForCausalLM"}}, "damaged: TypeError"),
        ({"metadata": [1]}, "damaged: TypeError"),
        ({"context": [3, 4]}, "context must hold a token id for each of the 9 prefix tokens, got 2"),
    ],
    ids=str,
)
def test_damaged_descriptions(saved, change, message):
    edit(saved, change)
    refuses(saved, message)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_not_saved(saved, prefix, value):
    before = (saved / "adapter.safetensors").read_bytes()
    with torch.no_grad():
        prefix.values[1][1, 3, 2] = value
    with pytest.raises(PrefixFileError, match=r"adapter\.safetensors: not written: tensor values\.1 holds values that"):
        prefix.save_pretrained(saved)
    assert (saved / "adapter.safetensors").read_bytes() == before


def test_another_model(saved):
    made = "made for LlamaForCausalLM 'tiny/llama'; this"
    refuses(saved, f"{made} MistralForCausalLM .* has model_type .mistral. instead of .llama.$", make_model("mistral"))
    other = make_model("llama", rms_norm_eps=0.5, max_position_embeddings=64)
    differs = "max_position_embeddings 64 instead of 128, rms_norm_eps 0.5 instead of 1e-06$"
    refuses(saved, f"{made} LlamaForCausalLM '' has {differs}", other)


def test_a_resized_vocabulary(saved):
    """Keys and values do not depend on how many tokens there are."""
    model = make_model("llama")
    context, row = tokens(9), tokens(4, seed=2)
    expected = stock_logits(model, context, row)
    model.resize_token_embeddings(128)
    loaded = KVPrefix.from_pretrained(saved, model)
    with loaded.attach(model):
        own = model(row[None]).logits[0, :, : expected.shape[1]]
    torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-9)


def test_files_that_hold_a_hash_alone(saved):
    """As older releases wrote them."""
    metadata = read_file(saved, "adapter").description["metadata"]
    edit(saved, {"metadata": {key: x for key, x in metadata.items() if key != "architecture"}})
    assert KVPrefix.from_pretrained(saved, make_model("llama")).metadata.architecture == {}
    refuses(saved, "has another configuration, of which the prefix holds", make_model("llama", rms_norm_eps=0.5))


def test_other_weights_of_the_same_architecture(saved):
    """Also under the same name; would catch a comparison of names, or of a few values per tensor."""
    other = make_model("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[20, 17] *= 2
    for name in ("tiny/llama-instruct", "tiny/llama"):
        other.name_or_path = name
        told = f"made for model 'tiny/llama', loaded for '{name}' .* with other weights"
        with pytest.raises(PrefixFileError, match=f"{saved}.*: {told}.*; allow_other_weights=True"):
            KVPrefix.from_pretrained(saved, other)
        prefix = KVPrefix.from_pretrained(saved)
        with pytest.raises(ValueError, match=told):
            prefix.attach(other)
        with pytest.raises(ValueError, match=told):
            PrefixSet([prefix]).attach(other, [0])
        with pytest.raises(ValueError, match=told):
            evaluate_prefix(other, make_tokenizer(), [Demonstration("the film", "good", ("good", "bad"))], prefix)
        with pytest.warns(UserWarning, match=told):
            allowed = KVPrefix.from_pretrained(saved, other, allow_other_weights=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with allowed.attach(other):
                pass
        with pytest.warns(UserWarning, match=told):
            prefix.attach(other, allow_other_weights=True).detach()


@pytest.mark.filterwarnings("error")
def test_the_same_weights_under_another_name(saved):
    moved = make_model("llama", torch.bfloat16)
    moved.name_or_path = "/elsewhere/llama"
    KVPrefix.from_pretrained(saved, moved)


def test_names_are_compared_where_the_weights_are_not_known(saved, model):
    edit(saved, {"metadata": {**read_file(saved, "adapter").description["metadata"], "weights": None}})
    other = make_model("llama")
    other.name_or_path = "tiny/llama-instruct"
    with pytest.warns(UserWarning, match="loaded for 'tiny/llama-instruct' .* perhaps with other weights"):
        KVPrefix.from_pretrained(saved, other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KVPrefix.from_pretrained(saved, model)


def test_another_tokenizer(saved, model, tokenizer):
    other = make_tokenizer("<unk> <s> bad good film food was is the a")
    refuses(saved, "made with tokenizer 'words', not with this 'words', whose vocabulary", model, other)
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
