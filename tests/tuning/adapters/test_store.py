"""PrefixStore: what is put is what rows read, in little memory, whatever else goes on."""

import copy
import math
import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import torch

from ctkernels.testing.models import make_model, tokens
from ctkernels.testing.tasks import DEMONSTRATIONS
from ctkernels.tuning import Adapter, KVPrefix, PrefixSet, PrefixStore
from ctkernels.tuning.adapters import file
from ctkernels.tuning.adapters.file import PrefixFileError
from ctkernels.tuning.adapters.lora import Lora
from ctkernels.tuning.evaluation.calibration import Offsets

checksum = file.checksum
ROWS = torch.stack([tokens(5, seed=n) for n in range(3)])
NAMES = ["routing", "a/b: Ä.x", ".hidden"]
SIZE = 3 * 2 * 2 * 8 * 4  # bytes of a prefix in fp32, per token


@pytest.fixture(scope="module")
def model():
    return make_model("llama", torch.float32)


@pytest.fixture(scope="module")
def prefixes(model) -> list[KVPrefix]:
    return [KVPrefix.from_tokens(model, tokens(n, seed=n), torch.tensor([0, 2, n])) for n in (6, 9, 4)]


@pytest.fixture
def store(tmp_path, model, prefixes) -> PrefixStore:
    store = PrefixStore(tmp_path / "store", model)
    for name, prefix in zip(NAMES, prefixes, strict=True):
        store.put(name, prefix)
    return store


def same(a: KVPrefix, b: KVPrefix) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@torch.no_grad()
def test_what_is_put_is_read(store, model, prefixes):
    """Through another store on the same folder, as after a restart: names of any kind, all that belongs to a prefix."""
    again = PrefixStore(store.directory, model)
    assert list(again) == sorted(NAMES) and len(again) == 3 and ".hidden" in again and "hidden" not in again
    for name, prefix in zip(NAMES, prefixes, strict=True):
        read = again.get(name)
        assert same(read, prefix) and torch.equal(read.segments, prefix.segments)
        assert read.metadata == prefix.metadata and read.first_position == prefix.length
        assert not any(p.requires_grad for p in read.parameters())
        with prefix.attach(model):
            expected = model(ROWS).logits
        with again.attach([name] * 3) as attachment:
            assert attachment.prefix is read  # in place, not a copy
            assert torch.equal(model(ROWS).logits, expected)


def test_offsets_of_an_adapter(store, model, prefixes):
    """Also through another store; a prefix alone has none, and takes away those of what it replaces."""
    offsets = Offsets("batch", "mean", {"warm": 0.5, "cold": -0.25})
    store.put("task", Adapter(prefixes[0], offsets=offsets))
    again = PrefixStore(store.directory, model)
    assert again.offsets("task") == offsets and same(again.get("task"), prefixes[0])
    assert Adapter.from_pretrained(store.directory / "task.safetensors").offsets == offsets
    assert again.offsets(NAMES[0]) is None
    again.put("task", prefixes[1])
    assert again.offsets("task") is None
    with pytest.raises(PrefixFileError, match="no prefix named 'tusk'; near names are 'task'"):
        store.offsets("tusk")
    for more, name in (({"lora": Lora(2, 3.0, ("q_proj",))}, "LoRA"), ({"demonstrations": DEMONSTRATIONS}, "in words")):
        with pytest.raises(ValueError, match=name):
            store.put("task", Adapter(prefixes[0], **more))


@torch.no_grad()
def test_a_batch_of_several_tasks(store, model, prefixes):
    expected = []
    for row, prefix in zip(ROWS, (prefixes[2], prefixes[0], prefixes[2]), strict=True):
        with prefix.attach(model):
            expected.append(model(row[None]).logits[0])
    with store.attach([NAMES[2], NAMES[0], NAMES[2]]) as attachment:
        assert len(attachment.prefix) == 2
        torch.testing.assert_close(model(ROWS).logits, torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_the_least_recently_used_leave_memory(store, model):
    store = PrefixStore(store.directory, model, memory_bytes=15 * SIZE)  # 6 + 9 tokens, or 9 + 4
    first, second = store.get(NAMES[0]), store.get(NAMES[1])
    assert store.bytes_in_memory == 15 * SIZE
    assert store.get(NAMES[0]) is first
    third = store.get(NAMES[2])  # the second has to go
    assert store.bytes_in_memory == 10 * SIZE
    assert store.get(NAMES[0]) is first and store.get(NAMES[2]) is third
    assert store.get(NAMES[1]) is not second and store.bytes_in_memory == 13 * SIZE
    small = PrefixStore(store.directory, model, memory_bytes=8 * SIZE)
    kept = small.get(NAMES[0])
    assert small.get(NAMES[1]).length == 9  # read, too large to keep, and nothing leaves for it
    assert small.bytes_in_memory == 6 * SIZE and small.get(NAMES[0]) is kept


def test_files_are_mapped(store):
    """A prefix's tensors lie in its file one behind the other, and the file stays mapped for as long as it is held."""

    def mapped() -> bool:
        return any(Path(entry.path).name == store.path(NAMES[1]).name for entry in psutil.Process().memory_maps())

    store.memory_bytes, store.mapped = 0, True
    prefix = store.get(NAMES[1])
    addresses = sorted(p.data_ptr() for p in prefix.parameters())
    assert {b - a for a, b in pairwise(addresses)} == {prefix.keys[0].nbytes}
    assert mapped()
    del prefix
    assert not mapped()


@torch.no_grad()
def test_half_the_bytes(tmp_path, prefixes):
    """bf16 on disk: the same logits in a bf16 model, which reads the file in place; fp32 again in an fp32 model."""
    half = make_model("llama", torch.bfloat16)
    prefix = KVPrefix.from_tokens(half, tokens(20, seed=1), torch.tensor([0, 20]))
    for dtype in (None, torch.bfloat16):
        store = PrefixStore(tmp_path / str(dtype), half, dtype=dtype)
        store.put("x", prefix)
        with prefix.attach(half):
            expected = half(ROWS).logits
        with store.attach(["x"] * 3):
            assert torch.equal(half(ROWS).logits, expected)
    sizes = [next((tmp_path / str(dtype)).iterdir()).stat().st_size for dtype in (None, torch.bfloat16)]
    assert sizes[0] - sizes[1] == pytest.approx(20 * SIZE / 2, abs=200)
    assert store.get("x").keys[0].dtype == torch.bfloat16
    full = PrefixStore(store.directory, make_model("llama", torch.float32)).get("x")
    assert full.keys[0].dtype == torch.float32
    torch.testing.assert_close(full.keys[0], prefix.keys[0], rtol=2**-8, atol=0)


@torch.no_grad()
def test_a_file_that_is_cut_off_while_it_is_in_use(store, model, prefixes):
    """By another program, which writes in place: the batch goes on with what it has, the next one gets an error."""
    with prefixes[0].attach(model):
        expected = model(ROWS).logits
    with store.attach([NAMES[0]] * 3):
        os.truncate(store.path(NAMES[0]), 200)
        assert torch.equal(model(ROWS).logits, expected)
    with pytest.raises(PrefixFileError, match=r"routing\.safetensors: damaged or cut off"):
        store.attach([NAMES[0]] * 3)


@pytest.mark.parametrize("batch", [[0, 0, 0], [0, 1, 1]])
@pytest.mark.parametrize("size", [0, 200, None])
@torch.no_grad()
def test_a_mapped_file_that_another_program_writes_into(store, model, batch, size):
    """A process that reads it gets an error before its next pass, where the memory would end it (SIGBUS). A batch of
    several prefixes is a copy, which stays."""
    mapped, names = PrefixStore(store.directory, model, mapped=True), [NAMES[i] for i in batch]
    path = store.path(NAMES[0])
    to_child, from_parent = os.pipe()
    from_child, to_parent = os.pipe()
    reader = os.fork()
    if reader == 0:
        status = 1
        try:
            with mapped.attach(names):
                expected = model(ROWS).logits
                os.write(to_parent, b"x")
                os.read(to_child, 1)
                try:
                    status = 3 if torch.equal(model(ROWS).logits, expected) else 4
                except PrefixFileError as error:
                    status = 5 if f"{path}: another program has written into it" in str(error) else 6
            with pytest.raises(PrefixFileError, match=rf"{NAMES[0]}\.safetensors: "):
                mapped.attach(names)
        finally:
            os._exit(status)
    os.read(from_child, 1)
    if size is None:
        with open(path, "r+b") as opened:
            opened.write(b"other bytes")
    else:
        os.truncate(path, size)
    os.write(from_parent, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1]) == (5 if len(set(batch)) == 1 else 3)
    for pipe in (to_child, from_parent, from_child, to_parent):
        os.close(pipe)


@torch.no_grad()
def test_a_mapped_file_that_is_replaced_or_removed(store, model, prefixes):
    """What is mapped stays; so does what was copied from a file that is changed."""
    with prefixes[0].attach(model):
        expected = model(ROWS).logits
    mapped = PrefixStore(store.directory, model, mapped=True)
    prefix = mapped.get(NAMES[0])
    own = copy.deepcopy(prefix)
    with prefix.attach(model):
        store.put(NAMES[0], prefixes[1])
        assert torch.equal(model(ROWS).logits, expected)
        store.remove(NAMES[0])
        assert torch.equal(model(ROWS).logits, expected)
    prefix = mapped.get(NAMES[1])
    os.truncate(store.path(NAMES[1]), 0)
    for work in (prefix.parts, lambda: PrefixSet([own, prefix])):
        with pytest.raises(PrefixFileError, match="another program has written into it while it was mapped"):
            work()
    assert own.file is None and same(own, prefixes[0])


def test_replaced_and_removed(store, model, prefixes):
    """Here and by another process; a batch that holds the old one goes on with it."""
    other = PrefixStore(store.directory, model)
    old = store.get(NAMES[0])
    other.put(NAMES[0], prefixes[1])
    assert same(store.get(NAMES[0]), prefixes[1]) and same(old, prefixes[0])
    assert store.bytes_in_memory == 9 * SIZE  # the old version is not kept
    store.put(NAMES[0], prefixes[2])
    assert store.bytes_in_memory == 0 and same(store.get(NAMES[0]), prefixes[2])
    other.remove(NAMES[0])
    for work in (store.get, store.remove):
        with pytest.raises(PrefixFileError, match=r"no prefix named 'routing'"):
            work(NAMES[0])
    assert NAMES[0] not in store and len(store) == 2


def test_a_full_disk_leaves_the_old_prefix(store, prefixes, full_disk):
    with full_disk(1000), pytest.raises(OSError, match="File too large"):
        store.put(NAMES[0], prefixes[1])
    assert same(store.get(NAMES[0]), prefixes[0]) and len(os.listdir(store.directory)) == 3


def test_errors(store, model, prefixes, tmp_path):
    with pytest.raises(PrefixFileError, match=r"no prefix named 'rooting'; near names are 'routing'"):
        store.get("rooting")
    with pytest.raises(PrefixFileError, match=r"no prefix named '\.\./routing'"):
        store.get("../routing")
    other = make_model("llama", torch.float32, intermediate_size=48)
    with pytest.raises(PrefixFileError, match=r"routing\.safetensors: prefix was made for LlamaForCausalLM"):
        PrefixStore(store.directory, other).get("routing")
    with pytest.raises(ValueError, match="prefix was made for LlamaForCausalLM"):
        PrefixStore(store.directory, other).put("routing", prefixes[0])
    path = store.directory / "routing.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(PrefixFileError, match=r"routing\.safetensors: damaged or cut off"):
        store.get("routing")
    path.write_bytes(whole)
    assert same(store.get("routing"), prefixes[0])  # a failure is not remembered
    safetensors.torch.save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(PrefixFileError, match=r"routing\.safetensors: not an adapter saved by ctkernels"):
        store.get("routing")
    for name in ("", "x" * 222):
        with pytest.raises(ValueError, match="name must have 1 to 221 bytes"):
            store.put(name, prefixes[0])
    store.put("x" * 221, prefixes[0])  # a name that is accepted is one that the disk takes
    with pytest.raises(TypeError, match="name must be a string, got int"):
        store.get(3)
    with pytest.raises(ValueError, match="names must hold"):
        store.attach([])
    with pytest.raises(TypeError, match="dtype must be one of"):
        PrefixStore(tmp_path, model, dtype=torch.int8)
    with pytest.raises(ValueError, match="memory_bytes must be >= 0"):
        PrefixStore(tmp_path, model, memory_bytes=-1)
    assert list(PrefixStore(tmp_path / "none", model)) == []


def test_damaged_bytes_are_found_when_a_file_is_first_read(store, model, prefixes):
    path = store.directory / "routing.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(PrefixFileError, match=r"routing\.safetensors: damaged: .*\(checksum\)"):
        store.get("routing")
    assert not same(PrefixStore(store.directory, model, verify=False).get("routing"), prefixes[0])


def test_a_file_is_compared_once_until_it_is_replaced(store, prefixes, monkeypatch):
    compared = []
    monkeypatch.setattr(file, "checksum", lambda *args: compared.append(args) or checksum(*args))
    store.memory_bytes = 0
    for _ in range(3):
        store.get("routing")
    assert len(compared) == 1
    store.put("routing", prefixes[1])
    for _ in range(3):
        store.get("routing")
    assert len(compared) == 3  # once to write it, once to read it


def test_prefixes_that_a_store_does_not_serve(store, model, prefixes):
    nan = copy.deepcopy(prefixes[0])
    with torch.no_grad():
        nan.keys[1][0, 0, 0] = math.nan
    with pytest.raises(PrefixFileError, match=r"new\.safetensors: not written: tensor keys\.1 holds values that"):
        store.put("new", nan)
    assert "new" not in store
    update = Lora(1, 1.0, ("q_proj",))
    with update.injected(model) as wrapped:
        update.capture(wrapped)
    Adapter(prefixes[0], lora=update).save_pretrained(store.directory / "elsewhere")
    (store.directory / "elsewhere" / "adapter.safetensors").rename(store.directory / "new.safetensors")
    with pytest.raises(PrefixFileError, match=r"new\.safetensors: its prefix belongs to a LoRA update of the weights"):
        store.get("new")


def test_other_weights(store):
    """Where they are allowed a warning says so, once per file."""
    model = make_model("llama", torch.float32, seed=1)
    refused = PrefixStore(store.directory, model, memory_bytes=0)
    for _ in range(2):
        with pytest.raises(PrefixFileError, match=r"routing\.safetensors: .* with other weights .*allow_other_weights"):
            refused.get("routing")
    other = PrefixStore(store.directory, model, memory_bytes=0, allow_other_weights=True)
    with pytest.warns(UserWarning, match=r"routing\.safetensors: .* with other weights"):
        other.get("routing")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.get("routing")


def test_a_file_of_a_store_is_a_saved_prefix(store, model, prefixes):
    assert same(KVPrefix.from_pretrained(store.directory / "routing.safetensors", model), prefixes[0])


def test_one_read_for_all_who_wait(store, monkeypatch):
    """Eight threads ask at once: one reads, all get the same; if it fails all hear of it, and the next one reads."""
    read, started, reads = PrefixStore._read, threading.Event(), []

    def slow(self, name, version):
        reads.append(name)
        started.wait(5)
        if len(reads) == 1:
            raise PrefixFileError("no")
        return read(self, name, version)

    monkeypatch.setattr(PrefixStore, "_read", slow)
    for expected in (1, 2):
        with ThreadPoolExecutor(8) as pool:
            started.clear()
            asked = [pool.submit(store.get, "routing") for _ in range(8)]
            while sum(f.running() for f in asked) < 8 or not reads:
                pass
            threading.Timer(0.05, started.set).start()
            results = [f.exception() or f.result() for f in asked]
        assert len(reads) == expected
        assert len({id(result) for result in results}) == 1
        assert isinstance(results[0], PrefixFileError if expected == 1 else KVPrefix)


def test_threads_that_put_get_and_remove(store, model, prefixes):
    """Never a wrong prefix, never more memory than allowed, no error but that of a name that is gone."""
    store.memory_bytes = 12 * SIZE
    lengths = {f"task {i}": (6, 9, 4)[i % 3] for i in range(6)}

    def work(seed: int) -> int:
        generator = torch.Generator().manual_seed(seed)
        found = 0
        for draw in torch.randint(600, (60,), generator=generator).tolist():
            i, action = draw % 6, draw // 6 % 10
            name = f"task {i}"
            if action == 0:
                try:
                    store.remove(name)
                except PrefixFileError as error:
                    assert "no prefix named" in str(error)
            elif action < 4:
                store.put(name, prefixes[i % 3])
            else:
                try:
                    prefix = store.get(name)
                except PrefixFileError as error:
                    assert "no prefix named" in str(error)
                    continue
                assert prefix.length == lengths[name] and same(prefix, prefixes[i % 3])
                found += 1
            assert store.bytes_in_memory <= 12 * SIZE
        return found

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(work, range(4))) > 20
    held = sum(p.numel() * 4 for prefix in store._kept.values() for p in prefix.parameters())
    assert store.bytes_in_memory == held <= 12 * SIZE and not store._loading
