"""Files that several processes write, read, lock and are killed at; and what is no file."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ctkernels.testing.models import make_model, tokens
from ctkernels.tuning import KVPrefix
from ctkernels.tuning.adapters.file import FILE_NAME, PrefixFileError, read_file, read_header, write_file, write_folder
from ctkernels.tuning.storage import (
    LOCK,
    OutputError,
    atomic_file,
    atomic_write_bytes,
    locked,
    open_regular,
    remove_leftovers,
)


@contextmanager
def processes(*works: Callable[[], object]) -> Iterator[list[int]]:
    """Processes that begin their work together, and are killed at the end of the block."""
    wait, go = os.pipe()
    children = []
    for work in works:
        child = os.fork()
        if child == 0:
            try:
                os.close(go)
                os.read(wait, 1)
                work()
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    os.close(wait)
    os.close(go)
    try:
        yield children
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_several_writers_beside_a_reader(tmp_path):
    """Every read finds one whole adapter; in the end the card is that of the adapter beside it."""
    prefix = KVPrefix.from_tokens(make_model("llama", torch.float32), tokens(6), torch.tensor([0, 2, 6]))
    described, tensors = prefix.parts()

    def save(number: int, times: int) -> None:
        own = {**described, "metadata": {**described["metadata"], "model_id": f"writer/number-{number}"}}
        for _ in range(times):
            write_folder(tmp_path, own, {name: torch.full_like(x, number) for name, x in tensors.items()}, True)

    save(1, 1)
    seen = set()
    with processes(*(lambda number=number: save(number, 40) for number in (1, 2, 3, 4))) as writers:
        running = set(writers)
        while running:
            _, description, found = read_file(tmp_path, "adapter")
            number = int(description["metadata"]["model_id"][-1])
            seen.add(number)
            assert all(torch.equal(x, torch.full_like(x, number)) for x in found.values())
            for writer in list(running):
                if os.waitid(os.P_PID, writer, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                    running.remove(writer)
        assert all(os.waitid(os.P_PID, w, os.WEXITED | os.WNOWAIT).si_status == 0 for w in writers)
    last = read_header(tmp_path / FILE_NAME)["metadata"]["model_id"]
    assert f"# icl for {last}\n" in (tmp_path / "README.md").read_text() and len(seen) > 1
    assert sorted(os.listdir(tmp_path)) == ["README.md", FILE_NAME]


def test_a_mapped_file_beside_a_writer(tmp_path):
    """The header and the tensors are of one file, also without the checksum."""
    prefix = KVPrefix.from_tokens(make_model("llama", torch.float32), tokens(6), torch.tensor([0, 2, 6]))
    described, tensors = prefix.parts()
    path, contents = tmp_path / FILE_NAME, []
    for number in range(1, 5):
        own = {name: torch.full((2, number, 8), float(number)) for name in tensors}  # of other shapes, too
        write_file(path, "adapter", {**described, "number": number}, own)
        contents.append(path.read_bytes())

    def write() -> None:  # as `write_file`, but faster: nothing is flushed
        while True:
            for content in contents:
                (tmp_path / "new").write_bytes(content)
                (tmp_path / "new").replace(path)

    seen = set()
    with processes(write):
        for _ in range(400):
            _, description, found = read_file(path, "adapter", mapped=True, verify=False)
            number = description["number"]
            seen.add(number)
            assert all(torch.equal(x, torch.full((2, number, 8), float(number))) for x in found.values())
    assert len(seen) > 1


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_one_process_holds_a_folder(tmp_path):
    """The message names who; what a killed process held is free."""

    def hold() -> None:
        with locked(tmp_path / "out"):
            (tmp_path / "held").touch()
            time.sleep(600)

    with processes(hold) as (holder,):
        wait_for((tmp_path / "held").exists)
        with (
            pytest.raises(OutputError, match=rf"out is in use by process {holder} on {socket.gethostname()} \("),
            locked(tmp_path / "out"),
        ):
            raise AssertionError("two hold it")
        os.kill(holder, signal.SIGKILL)
        os.waitid(os.P_PID, holder, os.WEXITED | os.WNOWAIT)
        with (
            locked(tmp_path / "out"),
            pytest.raises(OutputError, match=rf"in use by process {os.getpid()} on"),
            locked(tmp_path / "out"),
        ):
            raise AssertionError("two parts of a process hold it")
    with locked(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path / "out") == [LOCK]


def test_a_temporary_file_lives_as_long_as_its_process(tmp_path):
    """Others leave it alone while it is written, and remove it when its process was killed."""
    (tmp_path / ".value.json.0123456789abcdef.tmp").write_text("of a process that was killed")
    (tmp_path / ".value.json.mine.tmp").write_text("of the user")

    def write() -> None:
        with atomic_file(tmp_path / "value.json") as temporary:
            temporary.write_text("new")
            (tmp_path / "writes").touch()
            time.sleep(600)

    with processes(write) as (writer,):
        wait_for((tmp_path / "writes").exists)
        remove_leftovers(tmp_path)
        (live,) = (name for name in os.listdir(tmp_path) if name.startswith(".value.json") and "mine" not in name)
        os.kill(writer, signal.SIGKILL)
        os.waitid(os.P_PID, writer, os.WEXITED | os.WNOWAIT)
        assert (tmp_path / live).read_text() == "new"
        remove_leftovers(tmp_path)
        assert sorted(os.listdir(tmp_path)) == [".value.json.mine.tmp", "writes"]


@pytest.fixture(params=["fifo", "device", "link to a file", "link to nothing", "folder", "socket"])
def no_file(request, tmp_path):
    path = tmp_path / "target"
    if request.param == "fifo":
        os.mkfifo(path)
    elif request.param == "device":
        try:
            os.mknod(path, 0o20666, os.makedev(1, 3))
        except PermissionError:  # then this one cannot be replaced by mistake, either
            return Path(os.devnull)
    elif request.param == "folder":
        path.mkdir()
    elif request.param == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    else:
        (tmp_path / "other").write_text("other") if "file" in request.param else None
        path.symlink_to(tmp_path / "other")
    return path


def test_only_regular_files_are_replaced(no_file, tmp_path):
    before = os.lstat(no_file)
    for write in (lambda: atomic_write_bytes(no_file, b"new"), lambda: write_file(no_file, "adapter", {}, {})):
        with pytest.raises(OutputError, match=r"must be a regular file, or not exist yet; it is a"):
            write()
    if not no_file.is_dir() or no_file.is_symlink():
        with pytest.raises(OutputError, match=r"must be a folder, or not exist yet; it is a"), locked(no_file):
            raise AssertionError("it is no folder")
    after = os.lstat(no_file)
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert set(os.listdir(tmp_path)) <= {"target", "other"}


def test_only_regular_files_are_read(no_file):
    """None of them is waited for."""
    for read in (lambda: read_file(no_file, "adapter"), lambda: read_file(no_file, "adapter", mapped=True)):
        with pytest.raises(
            PrefixFileError, match=r"(target|null).*: (must be a regular file; it is a|no such file)|damaged"
        ):
            read()


def test_a_link_to_a_file_is_read(tmp_path):
    """As in the cache of a hub, whose files are links."""
    (tmp_path / "there").write_bytes(b"content")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"content"


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="a part of this path is a file, not a folder"):
        atomic_write_bytes(tmp_path / "file" / "value.json", b"")
