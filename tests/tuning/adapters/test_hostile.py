"""Files that were damaged, or made to harm: one sentence that names the file, before anything of their size is made."""

import json
import os
import resource
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from ctkernels.testing.models import make_model
from ctkernels.tuning import Adapter, KVPrefix, export_peft, import_peft
from ctkernels.tuning.adapters.adapter import Offsets
from ctkernels.tuning.adapters.file import (
    FILE_NAME,
    LONGEST_HEADER,
    PrefixFileError,
    read_file,
    read_header,
    write_file,
)
from tests.tuning.runs import TOKENIZER, run, tensors

WRONG = (None, True, -1, 0, 10**7, 10**30, 1.5, 1e308, "x", "../../x", [], [[]], [None], {}, {"x": 1})
MOST = 512 << 10  # KiB that reading a small file may take


@pytest.fixture(scope="module")
def model():
    return make_model("llama", torch.float32)


@pytest.fixture(scope="module")
def ttt(model) -> Adapter:
    return run("ttt", model).adapter


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read(folder, model) -> Adapter | None:
    """The adapter, or None where it is refused as it should be: in one sentence, and little memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with quiet():
            return Adapter.from_pretrained(folder, model, TOKENIZER)
    except PrefixFileError as error:
        assert str(folder) in str(error) and "\n" not in str(error)
        return None
    finally:
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST


def replaced(value, path=()) -> Iterator[tuple[str, object]]:
    """A JSON object with each of its values, at any depth, replaced by some wrong ones in turn, or taken out."""
    for index, key in enumerate(value):
        for wrong in WRONG[(index + len(path)) % 5 :: 5]:
            yield f"{'.'.join((*path, key))} = {wrong!r}", {**value, key: wrong}
        yield f"no {'.'.join((*path, key))}", {name: x for name, x in value.items() if name != key}
        if isinstance(value[key], dict):
            for how, inner in replaced(value[key], (*path, key)):
                yield how, {**value, key: inner}


def test_descriptions_of_any_kind(tmp_path, model, ttt):
    """Their checksum is right: who made the file meant them."""
    ttt.save_pretrained(tmp_path)
    _, description, tensors_there = read_file(tmp_path, "adapter")
    refused = 0
    for number, (how, wrong) in enumerate(replaced(description)):
        write_file(tmp_path / FILE_NAME, "adapter", wrong, tensors_there)
        found = read(tmp_path, model if number % 4 == 0 else None)
        refused += found is None
        if found is not None:
            assert len(tensors(found)) == len(tensors(ttt)), how
    assert refused > 20


@pytest.mark.parametrize("rank", [10**7, 2**40, 0, -2, True, 2.0, "2"])
def test_a_rank_that_is_not_that_of_the_tensors(tmp_path, model, ttt, rank):
    ttt.save_pretrained(tmp_path / "ours")
    _, description, tensors_there = read_file(tmp_path / "ours", "adapter")
    description["lora"]["rank"] = rank
    write_file(tmp_path / "ours" / FILE_NAME, "adapter", description, tensors_there)
    assert read(tmp_path / "ours", model) is None and read(tmp_path / "ours", None) is None
    export_peft(ttt, tmp_path / "peft", "lora")
    weights, config = (tmp_path / "peft" / f"adapter_{name}" for name in ("model.safetensors", "config.json"))
    safetensors.torch.save_file(safetensors.torch.load_file(weights), weights)
    config.write_text(json.dumps({**json.loads(config.read_text()), "r": rank}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(PrefixFileError, match=r"adapter_config\.json: "):
        import_peft(tmp_path / "peft", model)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST


def test_an_update_of_other_modules(tmp_path, ttt):
    """Found when it is loaded for a model, and when it is used."""
    ttt.save_pretrained(tmp_path)
    other = make_model("llama", torch.float32, num_hidden_layers=4)
    lora = Adapter.from_pretrained(tmp_path).lora
    message = r"layers\.3\..*lora_A\.weight must have shape \(2, \d+\), got None"
    with pytest.raises(ValueError, match=message), lora.merged(other):
        raise AssertionError("it was used")


def header(tensors_there: object, size: int = 8) -> bytes:
    text = tensors_there if isinstance(tensors_there, bytes) else json.dumps(tensors_there).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


def one(**changes) -> dict:
    return {"keys.0": {"dtype": "F32", "shape": [1, 1, 2], "data_offsets": [0, 8], **changes}}


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(
    "content",
    [
        header(one(shape=[1 << 40])),
        header(one(shape=[1 << 62, 1 << 62])),
        header(one(shape=[-1, -2])),
        header(one(shape=[10**30])),
        header(one(shape="x")),
        header(one(data_offsets=[0, 1 << 60])),
        header(one(data_offsets=[8, 0])),
        header(one(dtype="F99")),
        header({**one(), "keys.1": one()["keys.0"]}),  # one memory for two
        header(one(), size=1 << 20),  # more than is described
        header([]),
        header(None),
        header({"__metadata__": {"ctkernels": 1}}),
        header({"__metadata__": []}),
        header(b"[" * 100_000),
        header(b'{"a":' * 100_000),
        header(b"\xff\xfe"),
        (1 << 63).to_bytes(8, "little"),
        b"\x80\x04cos\nsystem\n(S'touch harmed'\ntR.",  # a pickle
    ],
)
def test_headers(tmp_path, content, mapped):
    path = tmp_path / FILE_NAME
    path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(PrefixFileError, match=r"adapter\.safetensors: ") as caught:
        read_file(path, "adapter", mapped=mapped)
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST and os.listdir(tmp_path) == [FILE_NAME]


def test_a_header_as_long_as_the_file_allows(tmp_path):
    """In a file with a hole of 4 GB."""
    with open(tmp_path / FILE_NAME, "wb") as file:
        file.write((LONGEST_HEADER + 1).to_bytes(8, "little"))
        file.truncate(4 << 30)
    for work in (lambda: read_file(tmp_path, "adapter"), lambda: read_header(tmp_path / FILE_NAME)):
        with pytest.raises(PrefixFileError, match=r"its header has 33554433 bytes; more than 33554432 are not read"):
            work()


def test_offsets_that_are_not_finite(tmp_path, model, ttt):
    ttt.save_pretrained(tmp_path)
    _, description, tensors_there = read_file(tmp_path, "adapter")
    description["offsets"] = vars(Offsets("batch", "mean", {"warm": 0.5, "cold": float("nan")}))
    write_file(tmp_path / FILE_NAME, "adapter", description, tensors_there)
    with pytest.raises(PrefixFileError, match="its offsets of the options must be finite, got"):
        Adapter.from_pretrained(tmp_path, model)


@pytest.mark.parametrize("kind", ["cartridge", "lora"])
def test_damaged_adapters_of_peft(tmp_path, model, ttt, kind):
    """Bytes of either file changed or cut off at many places, and values of the configuration replaced: what is read
    has the shapes of the model, or the error is one sentence."""
    export_peft(ttt, tmp_path / "whole", kind)
    weights = tmp_path / "whole" / "adapter_model.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(weights), weights)
    folder = tmp_path / "damaged"

    def attempt(name: str, content: bytes) -> bool:
        shutil.copytree(tmp_path / "whole", folder, dirs_exist_ok=True)
        (folder / name).write_bytes(content)
        try:
            with quiet():
                found = import_peft(folder, model)
        except PrefixFileError as error:
            assert str(folder) in str(error) and "\n" not in str(error)
            return False
        return len(found.prefix.keys) == 3

    refused = 0
    for path in sorted((tmp_path / "whole").iterdir()):
        whole = path.read_bytes()
        for place in range(0, len(whole), max(1, len(whole) // 12)):
            refused += not attempt(path.name, whole[:place])
            refused += not attempt(path.name, whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
    assert refused > 15
    config = json.loads((tmp_path / "whole" / "adapter_config.json").read_text())
    for name in ("r", "lora_alpha", "peft_type", "target_modules", "num_virtual_tokens", "num_layers", "token_dim"):
        for wrong in WRONG if name in config else ():
            attempt("adapter_config.json", json.dumps({**config, name: wrong}).encode())


def test_values_that_are_not_finite_are_neither_exported_nor_imported(tmp_path, model, ttt):
    prefix = KVPrefix.from_pretrained(saved(ttt, tmp_path / "ours"))
    export_peft(prefix, tmp_path / "peft")
    before = {path.name: path.read_bytes() for path in (tmp_path / "peft").iterdir()}
    with torch.no_grad():
        prefix.values[1][0, 0, 0] = torch.inf
    with pytest.raises(PrefixFileError, match=r"not written: tensor prompt_embeddings holds values"):
        export_peft(prefix, tmp_path / "peft")
    assert {path.name: path.read_bytes() for path in (tmp_path / "peft").iterdir()} == before
    path = tmp_path / "peft" / "adapter_model.safetensors"
    own = safetensors.torch.load_file(path)
    own["prompt_embeddings"][0, 0] = torch.nan
    safetensors.torch.save_file(own, path)
    with pytest.raises(PrefixFileError, match=r"adapter_model\.safetensors: tensor prompt_embeddings holds"):
        import_peft(tmp_path / "peft", model)


def saved(adapter: Adapter, folder):
    with quiet():
        adapter.save_pretrained(folder)
    return folder


def test_two_files_of_two_exports(tmp_path, model):
    """As a process leaves them that was killed between them: the weights say what they were exported with."""
    one_, two = (run("icl", model).adapter.prefix, run("prefix-tuning", model).adapter.prefix)
    two = KVPrefix([x[:, :3] for x in two.keys], [x[:, :3] for x in two.values], torch.tensor([0, 3]), 3, two.metadata)
    export_peft(one_, tmp_path / "a")
    export_peft(two, tmp_path / "b")
    shutil.copy(tmp_path / "b" / "adapter_config.json", tmp_path / "a")
    with pytest.warns(UserWarning, match=r"adapter_config\.json is not the configuration that adapter_model\.safe"):
        back = import_peft(tmp_path / "a", model).prefix
    assert back.length == one_.length and torch.equal(back.keys[0], one_.keys[0])
    with safe_open(tmp_path / "b" / "adapter_model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["ctkernels-config"])["num_virtual_tokens"] == 3
