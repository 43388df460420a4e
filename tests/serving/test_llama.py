"""Slot files of llama-server: the patched file is, byte by byte, what a server would save with the tuned prefix."""

import struct
import tracemalloc
from contextlib import nullcontext
from io import BytesIO

import pytest
import torch
from gguf import GGMLQuantizationType, quants

from ctkernels import cli
from ctkernels.serving.llama import SlotError, export_llama
from ctkernels.serving.llama.cells import BF16, F16, F32, Q8_0, decode, encode
from ctkernels.serving.llama.slot import read_slot
from ctkernels.testing.models import tokens
from ctkernels.testing.tasks import char_tokenizer
from ctkernels.tuning import Adapter, KVPrefix
from ctkernels.tuning.adapters.compose import moved
from ctkernels.tuning.adapters.lora import Lora, lora_targets
from ctkernels.tuning.data.demonstrations import Demonstration
from ctkernels.tuning.storage import OutputError
from tests.serving.slots import MODELS, Kind, model_of, slot

CONTEXT = tokens(11, seed=2)  # longer than the windows
SEGMENTS = torch.tensor([1, 6, 11])
KINDS = {
    "version 4": Kind(),
    "version 3, plain list of tokens": Kind(version=3, packed=False),
    "transposed": Kind(transposed=True),
    "version 3, transposed f32": Kind(version=3, transposed=True, keys="f32", values="f32"),
    "bf16": Kind(keys="bf16", values="bf16"),
    "q8_0": Kind(keys="q8_0", values="q8_0"),
    "version 3, q8_0": Kind(version=3, keys="q8_0", values="q8_0"),
    "q8_0 and f16, transposed": Kind(keys="q8_0", values="f16", transposed=True),
    "second of four slots": Kind(streams=4, sequence=1),
}


@pytest.fixture(scope="module")
def served():
    """name -> model, its plain context, and a prefix that is no cache of any text."""
    found = {}
    for name in MODELS:
        model = model_of(name)
        plain = KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)
        tuned = KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        found[name] = model, plain, tuned
    return found


def template(served, folder, name="llama", kind=None):
    model, plain, _ = served[name]
    path = folder / "template.bin"
    path.write_bytes(slot(model, plain, CONTEXT, name, kind or Kind()))
    return path


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_patched_file_is_what_a_server_would_save(served, tmp_path, name, kind):
    model, _, tuned = served[name]
    path, out = template(served, tmp_path, name, kind), tmp_path / "out" / "tuned.bin"
    before = path.read_bytes()
    warns = pytest.warns(UserWarning, match="two caches without a checkpoint") if name == "gemma3" else nullcontext()
    with warns:
        done = export_llama(tuned, path, out, model)
    assert_same(out.read_bytes(), slot(model, tuned, CONTEXT, name, kind), kind)
    assert path.read_bytes() == before
    assert (done.tokens, done.layers, done.interleaved) == (11, 3, name == "llama")
    assert done.keys < 0.02 and done.values < 0.02


def assert_same(got: bytes, expected: bytes, kind: Kind):
    """The same bytes; where a Hadamard matrix was multiplied in another order, a few may be rounded to the next one."""
    if "q8_0" not in (kind.keys, kind.values):
        assert got == expected
        return
    a, b = (torch.frombuffer(bytearray(x), dtype=torch.int8).short() for x in (got, expected))
    assert (a - b).abs().max() <= 1
    assert (a != b).float().mean() < 1e-3


@pytest.mark.parametrize(
    "kind",
    [Kind(checkpoint=5), Kind(keys="q8_0", values="q8_0", checkpoint=7), Kind(streams=4, sequence=2, checkpoint=5)],
)
def test_a_checkpoint_of_windows_is_replaced_by_one_behind_the_prefix(served, tmp_path, kind):
    model, _, tuned = served["gemma3"]
    path, out = template(served, tmp_path, "gemma3", kind), tmp_path / "tuned.bin"
    export_llama(tuned, path, out, model)
    assert_same(out.read_bytes(), slot(model, tuned, CONTEXT, "gemma3", kind, behind_all=True), kind)


def test_rows_that_begin_elsewhere_are_moved(served, tmp_path):
    model, _, tuned = served["llama"]
    kind = Kind(keys="f32", values="f32")
    path, out = template(served, tmp_path, kind=kind), tmp_path / "tuned.bin"
    export_llama(moved(tuned, model, 40), path, out, model)
    end = path.stat().st_size // 4 * 4
    got, expected, plain = (
        torch.frombuffer(bytearray(x[:end]), dtype=torch.float32)[60:]  # behind the list of tokens
        for x in (out.read_bytes(), slot(model, tuned, CONTEXT, "llama", kind), path.read_bytes())
    )
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    assert (got - plain).abs().max() > 0.5


@pytest.mark.parametrize("kind", [F32, F16, BF16, Q8_0], ids=lambda kind: kind.name)
def test_cells_are_those_of_ggml(kind):
    torch.manual_seed(0)
    x = torch.randn(7, 64) * torch.logspace(-6, 3, 64)
    x[3] = 0
    stored = encode(x, kind)
    number = GGMLQuantizationType(kind.number)
    assert stored == quants.quantize(x.numpy(), number).tobytes()
    back = quants.dequantize(quants.quantize(x.numpy(), number), number)
    assert torch.equal(decode(stored, kind).view(7, 64), torch.from_numpy(back))


def test_numbers_too_large_for_the_cells(served, tmp_path):
    model = served["llama"][0]
    huge = KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)
    with torch.no_grad():
        huge.values[1][0, 2, 3] = 1e6
    with pytest.raises(ValueError, match=r"1e\+06, which is too large for cells of f16"):
        export_llama(huge, template(served, tmp_path), tmp_path / "tuned.bin", model)
    assert not (tmp_path / "tuned.bin").exists()


def changed(data: bytes, offset: int, code: str, value) -> bytes:
    return data[:offset] + struct.pack(f"<{code}", value) + data[offset + struct.calcsize(f"<{code}") :]


TOKENS = 12  # where the list of tokens begins; behind its 15 numbers lies the cache
CACHE = TOKENS + 4 * 15
LAYERS = CACHE + 8 + 12 * 11 + 4
KEYS = LAYERS + 12
REFUSED = [
    ("another magic", lambda b: b"GGUF" + b[4:], "not a slot file of llama-server: it begins with 0x46554747"),
    ("version", lambda b: changed(b, 4, "I", 5), "state version 5 is not known, versions 3, 4 are"),
    ("empty", lambda b: b"", "the file ends within the magic number and version"),
    ("packing", lambda b: changed(b, TOKENS + 4, "I", 2), "the list of tokens begins with"),
    ("images", lambda b: changed(b, CACHE - 4, "I", 1), "images or other media"),
    ("token", lambda b: changed(b, TOKENS + 12, "i", 61), "token 61 is none of the 61"),
    ("streams", lambda b: changed(b, CACHE, "I", 0), "0 streams in a cache"),
    ("no cells", lambda b: changed(b, CACHE + 4, "I", 0), "a cache without cells"),
    ("position", lambda b: changed(b, CACHE + 8, "i", 11), "no cell at 0"),
    ("position twice", lambda b: changed(b, CACHE + 8 + 12, "i", 0), "no cell at 1"),
    ("several sequences", lambda b: changed(b, CACHE + 16 + 12, "i", 3), "several sequences: [0, 3]"),
    ("a cell of two", lambda b: changed(b, CACHE + 12, "I", 2), "a cell of 2 sequences"),
    ("transposition", lambda b: changed(b, LAYERS - 4, "I", 7), "7 in place of 0 or 1 for transposed"),
    ("layers", lambda b: changed(b, LAYERS, "I", 1000), "the file ends within the type of keys of layer 6"),
    ("more layers", lambda b: changed(b, LAYERS, "I", 1 << 31), "2147483648 layers in a cache are more than the 1024"),
    ("tokens", lambda b: changed(b, TOKENS - 4, "I", 1 << 23), "8388608 tokens are more than the 4194304 that are"),
    ("cells", lambda b: changed(b, CACHE + 4, "I", 1 << 23), "8388608 cells are more than the 4194304 that are read"),
    ("matrix", lambda b: changed(b, LAYERS + 4, "I", 48), "a Hadamard matrix of size 48 for keys, which is no power"),
    (
        "large matrix",
        lambda b: changed(b, LAYERS + 4, "I", 128),
        "a Hadamard matrix of size 128 for keys of dimension 64",
    ),
    ("wrong matrix", lambda b: changed(b, LAYERS + 4, "I", 64), "its keys are not those that LlamaForCausalLM"),
    (
        "type",
        lambda b: changed(b, KEYS, "i", 2),
        "keys of layer 0 are cells of type q4_0; f32, f16, q8_0, bf16 are known",
    ),
    ("unknown type", lambda b: changed(b, KEYS, "i", 99), "keys of layer 0 are cells of type 99"),
    ("size", lambda b: changed(b, KEYS + 4, "Q", 255), "keys of layer 0 of 255 bytes for each cell"),
    ("width", lambda b: changed(b, KEYS + 4, "Q", 1 << 40), "the file ends within keys of layer 0"),
    ("behind", lambda b: b + bytes(9), "0 streams in a cache"),
    ("a second cache", lambda b: b + b[CACHE:], "caches of 3 and 3 layers, LlamaForCausalLM has 3"),
    ("something behind", lambda b: b + b[CACHE:] + bytes(5), "5 bytes behind the caches are not recognised"),
    ("checkpoints", lambda b: b + b"SCKP" + bytes(8), "checkpoints behind one cache"),
]


@pytest.mark.parametrize(("change", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_is_not_recognised_is_named(served, tmp_path, change, message):
    model, _, tuned = served["llama"]
    path = template(served, tmp_path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(SlotError) as caught:
        export_llama(tuned, path, tmp_path / "tuned.bin", model)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "tuned.bin").exists()


@pytest.mark.parametrize(
    ("offset", "code", "value", "message"),
    [
        (4, "I", 9, "checkpoints of version 9"),
        (8, "I", 0, "0 checkpoints of version 1"),
        (28, "Q", 1 << 60, "the file ends within checkpoint 0"),
        (36, "I", 7, "how the state of checkpoint 0 begins"),
        (40, "I", 1, "how the state of checkpoint 0 begins"),
        (28, "Q", 40, "checkpoint 0 does not hold the 2 layers of the last cache alone"),
        (-16, "Q", 8, "checkpoint 0 holds the state of a draft model"),
    ],
)
def test_checkpoints_that_are_not_recognised(served, tmp_path, offset, code, value, message):
    model, _, tuned = served["gemma3"]
    path = template(served, tmp_path, "gemma3", Kind(checkpoint=5))
    data = path.read_bytes()
    at = len(data) + offset if offset < 0 else data.index(b"SCKP") + offset
    path.write_bytes(changed(data, at, code, value))
    with pytest.raises(SlotError) as caught:
        export_llama(tuned, path, tmp_path / "tuned.bin", model)
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", [Kind(checkpoint=5), Kind(version=3, keys="q8_0", transposed=True)])
def test_cut_off_anywhere(served, tmp_path, kind):
    model, _, tuned = served["gemma3"]
    path = template(served, tmp_path, "gemma3", kind)
    data = path.read_bytes()
    ends = {len(data[: data.find(b"SCKP")])} if kind.checkpoint else set()  # a whole file, without its checkpoint
    for end in range(0, len(data), 97):
        if end not in ends:
            with pytest.raises(SlotError):
                read_slot(BytesIO(data[:end]), end)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(SlotError, match=r"template\.bin: the file ends within"):
        export_llama(tuned, path, tmp_path / "tuned.bin", model)
    assert not (tmp_path / "tuned.bin").exists()


def test_hostile_numbers_are_refused_before_anything_is_allocated(served, tmp_path):
    """Every number of the headers as large as it can be: an error, and less memory than a megabyte."""
    model, _, tuned = served["gemma3"]
    path = template(served, tmp_path, "gemma3", Kind(checkpoint=5))
    data = path.read_bytes()
    appendix = data.index(b"SCKP")
    headers = [*range(0, KEYS + 12, 4), *range(appendix, appendix + 44, 4)]
    free = {appendix + 12, appendix + 16, appendix + 20, appendix + 24}  # what is unread
    for at in headers:
        for value in (0xFFFFFFFF, 0x7FFFFFFF):
            hostile = changed(data, at, "I", value)
            tracemalloc.start()
            try:
                read_slot(BytesIO(hostile), len(hostile))
                accepted = hostile != data and at not in free
            except SlotError:
                accepted = False
            finally:
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
            assert peak < 1 << 20, at
            if accepted:  # a token or a position, which mean something beside the prefix alone
                path.write_bytes(hostile)
                with pytest.raises(SlotError):
                    export_llama(tuned, path, tmp_path / "tuned.bin", model)


def test_slots_of_other_contexts_and_models(served, tmp_path):
    model, plain, tuned = served["llama"]
    path, out = tmp_path / "template.bin", tmp_path / "tuned.bin"
    path.write_bytes(slot(model, plain, tokens(11, seed=3), "llama", Kind()))
    with pytest.raises(SlotError, match=r"its keys are not those that LlamaForCausalLM .* makes of its tokens"):
        export_llama(tuned, path, out, model)
    shorter = KVPrefix.from_tokens(model, CONTEXT[:10], SEGMENTS.clamp(max=10))
    path.write_bytes(slot(model, shorter, CONTEXT[:10], "llama", Kind()))
    with pytest.raises(SlotError, match=r"the slot holds 10 tokens, the prefix has 11; .* n_predict 0"):
        export_llama(tuned, path, out, model)
    other = model_of("llama", num_key_value_heads=4)
    path.write_bytes(slot(other, KVPrefix.from_tokens(other, CONTEXT, SEGMENTS), CONTEXT, "llama", Kind()))
    with pytest.raises(SlotError, match=r"keys of layer 0 have 256 numbers for each token, .* 2 heads of 64"):
        export_llama(tuned, path, out, model)
    windowed, theirs, _ = served["gemma3"]
    path.write_bytes(slot(windowed, theirs, CONTEXT, "gemma3", Kind()))
    with pytest.raises(SlotError, match="caches of 1 and 2 layers, LlamaForCausalLM has 3"):
        export_llama(tuned, path, out, model)


def test_positions_within_the_window_are_needed(served, tmp_path):
    model, plain, tuned = served["gemma3"]
    path = template(served, tmp_path, "gemma3", Kind())
    narrow = model_of("gemma3", sliding_window=4)
    path.write_bytes(slot(narrow, plain, CONTEXT, "gemma3", Kind()))
    with pytest.raises(SlotError, match="the positions 6 to 10 of the prefix, each once, got no cell at 6"):
        export_llama(tuned, path, tmp_path / "tuned.bin", model)


def test_prefixes_that_have_no_place_in_a_slot(served, tmp_path):
    model, _, tuned = served["llama"]
    path, out = template(served, tmp_path), tmp_path / "tuned.bin"
    with pytest.raises(ValueError, match="belongs to a LoRA update"):
        export_llama(Adapter(tuned, lora=Lora(2, 3.0, lora_targets(model))), path, out, model)
    with pytest.raises(ValueError, match="is empty"):
        export_llama(KVPrefix.from_tokens(model, CONTEXT[:0], torch.tensor([0])), path, out, model)
    with pytest.raises(ValueError, match="prefix was made for Qwen2ForCausalLM"):
        export_llama(served["qwen2"][2], path, out, model)
    with pytest.raises(ValueError, match="with other weights"):
        export_llama(KVPrefix.from_tokens(model_of("llama", seed=3), CONTEXT, SEGMENTS), path, out, model)
    with pytest.raises(TypeError, match="must be an Adapter or a KVPrefix, got dict"):
        export_llama({}, path, out, model)
    with pytest.warns(UserWarning, match="in words belong in the requests"):
        export_llama(Adapter(tuned, demonstrations=(Demonstration("a", "b"),)), path, out, model)


def test_what_lies_at_out(served, tmp_path, full_disk):
    model, _, tuned = served["llama"]
    path, out = template(served, tmp_path), tmp_path / "tuned.bin"
    before = path.read_bytes()
    with pytest.raises(OutputError, match="is the template itself"):
        export_llama(tuned, path, path, model)
    out.write_text("mine")
    with pytest.raises(OutputError, match="exists; choose another file"):
        export_llama(tuned, path, out, model)
    with pytest.raises(SlotError, match="ends within the magic number"):
        export_llama(tuned, path, out, model, overwrite=True)
    assert out.read_text() == "mine" and path.read_bytes() == before
    out.unlink()
    with full_disk(len(before) // 2), pytest.raises(OSError):
        export_llama(tuned, path, out, model)
    assert [entry.name for entry in tmp_path.iterdir()] == ["template.bin"]
    export_llama(tuned, path, path, model, overwrite=True)
    assert path.read_bytes() == slot(model, tuned, CONTEXT, "llama", Kind())
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(OutputError, match="a symbolic link"):
        export_llama(tuned, path, tmp_path / "link", model, overwrite=True)


def test_command(served, tmp_path, capsys):
    model, _, tuned = served["llama"]
    model.save_pretrained(tmp_path / "model")
    char_tokenizer().save_pretrained(tmp_path / "model")
    tuned.save_pretrained(tmp_path / "prefix")
    path, out = template(served, tmp_path), tmp_path / "tuned.bin"
    words = ["export", "--to=llama-server", f"--adapter={tmp_path / 'prefix'}", f"--out={out}"]
    for missing, given in (("template", []), ("model", [f"--template={path}"])):
        assert cli.run([*words, *given]) == 2
        assert f"{missing} is required for llama-server" in capsys.readouterr().err
    words += [f"--template={path}", f"--model={tmp_path / 'model'}"]
    assert cli.run([*words, "--kind=lora"]) == 2
    assert cli.run(words) == 0
    assert "11 tokens, 3 layers of f16, keys interleaved; template and model differ by 0.000" in capsys.readouterr().out
    assert out.read_bytes() == slot(model, tuned, CONTEXT, "llama", Kind())
    assert cli.run(words) == 2
    assert "exists; choose another file" in capsys.readouterr().err
    assert cli.run([*words, "--overwrite"]) == 0
    assert cli.run(["export", f"--adapter={tmp_path / 'prefix'}", f"--out={tmp_path / 'peft'}", "--overwrite"]) == 2
    assert "template and overwrite are for --to llama-server" in capsys.readouterr().err
