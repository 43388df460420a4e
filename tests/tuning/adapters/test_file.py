"""The file format: what comes back, and every way in which a file can be damaged, foreign, too new or half there."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import pytest
import safetensors.torch
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open

from ctkernels.testing.models import make_model
from ctkernels.tuning.adapters import file
from ctkernels.tuning.adapters.adapter import Adapter
from ctkernels.tuning.adapters.file import FILE_NAME, PrefixFileError, read_file, write_file
from tests.tuning.runs import run

DESCRIPTION = {"segments": [0, 2], "settings": {"lr": 1e-3, "note": "ä\ud800", "none": None}}
TENSORS = {
    "keys.0": torch.arange(12.0).reshape(2, 3, 2).transpose(0, 1),
    "double": torch.linspace(0, 1, 5, dtype=torch.float64),
    "half": torch.tensor([6e4, -1e-7]).half(),
    "brain": torch.tensor([[3e38]]).bfloat16(),
    "step": torch.tensor(7.0),
    "count": torch.tensor([1 << 40]),
    "empty": torch.empty(2, 0, 4),
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / FILE_NAME
    write_file(path, "adapter", DESCRIPTION, TENSORS)
    return path


def refuses(path, message: str, **options) -> None:
    with pytest.raises(PrefixFileError, match=message) as caught:
        read_file(path, "adapter", **options)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def same(tensors) -> bool:
    alike = (torch.equal(tensors[name], x) and tensors[name].dtype == x.dtype for name, x in TENSORS.items())
    return tensors.keys() == TENSORS.keys() and all(alike)


@pytest.mark.parametrize("mapped", [False, True])
def test_what_is_written_is_read(path, mapped):
    for place in (path, path.parent, str(path)):
        read, description, tensors = read_file(place, "adapter", mapped=mapped)
        assert read == path and same(tensors) and description.items() >= DESCRIPTION.items()
    assert same(safetensors.torch.load_file(path))  # by the library of the format alone


def test_files_have_the_permissions_that_the_user_wants(path):
    """Would catch a library that makes them unreadable to all others."""
    before = os.umask(0o027)
    try:
        write_file(path, "adapter", DESCRIPTION, TENSORS)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("mapped", [False, True])
def test_every_byte_counts(path, mapped):
    """A file that is cut off, or has one byte changed, anywhere: refused, unless what is read is the same."""
    whole = path.read_bytes()
    expected = read_file(path, "adapter").description
    for place in range(len(whole)):
        for damage in (whole[:place], whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]):
            path.unlink()  # what is mapped keeps its file
            path.write_bytes(damage)
            try:
                _, description, tensors = read_file(path, "adapter", mapped=mapped)
            except PrefixFileError as error:
                assert str(error).startswith(f"{path}: ")
            else:
                assert len(damage) == len(whole) and same(tensors) and description == expected, place
    path.write_bytes(whole + b"x")
    refuses(path, "damaged or cut off", mapped=mapped)


def test_a_changed_value_is_found_by_the_checksum(path):
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refuses(path, r"adapter\.safetensors: damaged: .*\(checksum\)")
    assert not same(read_file(path, "adapter", verify=False).tensors)
    path.write_bytes(whole.replace(b"segments", b"segmentz"))
    refuses(path, r"damaged: .*\(checksum\)")
    path.write_bytes(whole.replace(b'"checksum"', b'"chocksum"'))
    refuses(path, "damaged: 'checksum' is missing")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["keys.0", "double", "half", "brain", "step"])
def test_values_that_are_not_finite(path, monkeypatch, name, value):
    before = path.read_bytes()
    tensors = {**TENSORS, name: TENSORS[name].clone().flatten()}
    tensors[name][-1] = value
    with pytest.raises(
        PrefixFileError, match=rf"adapter\.safetensors: not written: tensor {name} holds values that are"
    ):
        write_file(path, "adapter", DESCRIPTION, tensors)
    assert path.read_bytes() == before and len(os.listdir(path.parent)) == 1
    with monkeypatch.context() as patch:
        patch.setattr(file, "require_finite", lambda tensors: None)
        write_file(path, "adapter", DESCRIPTION, tensors)
    for mapped in (False, True):
        refuses(path, rf"adapter\.safetensors: tensor {name} holds values that are not finite", mapped=mapped)


def test_descriptions_that_json_cannot_hold(path):
    before = path.read_bytes()
    with pytest.raises(TypeError, match="Tensor is not JSON serializable"):
        write_file(path, "adapter", {"drop": torch.ones(1)}, TENSORS)
    assert path.read_bytes() == before


def header(path, metadata: dict[str, str]) -> None:
    path.write_bytes(safetensors.torch.save({"keys.0": torch.zeros(1)}, metadata))


@pytest.mark.parametrize("mapped", [False, True])
def test_foreign_files(path, mapped):
    for content in (b"", b"not a file of tensors", b"\x80\x04K\x01.", os.urandom(100), b"\xff" * 8 + b"{}"):
        path.write_bytes(content)
        refuses(path, "damaged or cut off", mapped=mapped)
    for metadata in (None, {"format": "pt"}, {"ctkernels": '{"segments": [1]}'}, {"ctkernels": "[1]"}):
        header(path, metadata)
        refuses(path, r"not an adapter saved by ctkernels; import_peft reads adapters", mapped=mapped)
    for text in ("", "{", "[" * 100_000):
        header(path, {"ctkernels": text, "checksum": "x"})
        refuses(path, "damaged: its description is not valid JSON", mapped=mapped)
    write_file(path, "checkpoint", DESCRIPTION, TENSORS)
    refuses(path, "not an adapter saved by ctkernels", mapped=mapped)
    write_file(path, "adapter", DESCRIPTION, TENSORS)
    with pytest.raises(PrefixFileError, match=r"not a checkpoint saved by ctkernels$"):
        read_file(path, "checkpoint", mapped=mapped)


@pytest.mark.parametrize("version", [3, 2.5, "new", None])
def test_other_versions(path, version):
    write_file(path, "adapter", {**DESCRIPTION, "format_version": version}, TENSORS)
    refuses(path, f"format version {version}, this ctkernels .* reads up to 2; it was written by .*torch")


def test_files_that_are_not_there(tmp_path):
    refuses(tmp_path / "nowhere", "nowhere: no such file or folder$")
    refuses(tmp_path, r"adapter\.safetensors: no such file or folder$")
    (tmp_path / FILE_NAME).mkdir()
    refuses(tmp_path, r"adapter\.safetensors: cannot be read: Is a directory")


def test_readers_beside_a_writer_that_is_killed(tmp_path):
    """One process saves without end and is killed, twenty times; another reads all the while: always one whole file.
    Would catch a file that is written in place, and two files that have to fit."""
    path, chance = tmp_path / FILE_NAME, random.Random(0)
    write_file(path, "adapter", {"number": 0}, {"keys.0": torch.zeros(2000)})
    seen: set[tuple[int, int]] = set()

    def whole_number() -> int:
        _, description, tensors = read_file(path, "adapter")
        assert torch.equal(tensors["keys.0"], torch.full((2000,), float(description["number"])))
        return description["number"]

    for _ in range(20):
        child = os.fork()
        if child == 0:
            try:
                for number in range(1, 1 << 30):
                    write_file(path, "adapter", {"number": number}, {"keys.0": torch.full((2000,), float(number))})
            finally:
                os._exit(1)
        try:
            end, before = time.monotonic() + chance.uniform(0.05, 0.15), len(seen)
            while (now := time.monotonic()) < end or (len(seen) < before + 2 and now < end + 60):  # it has written
                seen.add((child, whole_number()))
            assert len(seen) >= before + 2
        finally:
            os.kill(child, signal.SIGKILL)
            assert os.waitpid(child, 0)[1] == signal.SIGKILL
        whole_number()


def test_model_cards(tmp_path):
    """Written if asked for, kept up to date then, and never in the place of a file of the user."""
    model = make_model("llama", torch.float32)
    model.name_or_path = "someone/tiny-llama"
    adapter = run("ttt", model).adapter
    adapter.save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == [FILE_NAME]
    adapter.save_pretrained(tmp_path, card=True)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "someone/tiny-llama" and card.data.library_name == "ctkernels"
    assert "ttt" in card.data.tags and "LoRA update of rank 2" in card.text
    assert adapter.prefix.metadata.weights in card.text and FILE_NAME in card.text
    run("icl", model).adapter.prefix.save_pretrained(tmp_path)
    assert "LoRA" not in ModelCard.load(tmp_path / "README.md").text
    assert Adapter.from_pretrained(tmp_path).lora is None
    (tmp_path / "README.md").write_text("# My own")
    with pytest.warns(UserWarning, match=r"README\.md is not a card that ctkernels wrote and stays as it is"):
        adapter.save_pretrained(tmp_path, card=True)
    assert (tmp_path / "README.md").read_text() == "# My own" and Adapter.from_pretrained(tmp_path).lora is not None


def test_the_card_of_a_local_model_names_no_base_on_the_hub(tmp_path):
    model = make_model("llama", torch.float32)
    model.name_or_path = "/home/me/llama: 1"
    run("icl", model).adapter.save_pretrained(tmp_path, card=True)
    assert ModelCard.load(tmp_path / "README.md").data.base_model is None


def test_the_header_can_be_read_without_this_package(path):
    with safe_open(path, "pt") as opened:
        described = json.loads(opened.metadata()["ctkernels"])
    assert described["format"] == "ctkernels-adapter" and described["format_version"] == 2
