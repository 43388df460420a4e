"""The CPU kernels' use of matrix units (AMX): who else uses them on the same thread, and a system that denies them."""

import ctypes
import mmap
import subprocess
import sys

import pytest
import torch

import ctkernels as ct
from ctkernels import dispatch

# In a process of its own: the kernel answers EPERM to the question for the state of the tile registers, arch_prctl
# ARCH_REQ_XCOMP_PERM, as container runtimes may make it do.
DENIED = """
import ctypes, struct
libc = ctypes.CDLL(None, use_errno=True)
NUMBER, FIRST_ARGUMENT, ARCH_PRCTL, ASK, EPERM = 0, 16, 158, 0x1023, 1
steps = [(0x20, 0, 0, NUMBER), (0x15, 0, 3, ARCH_PRCTL), (0x20, 0, 0, FIRST_ARGUMENT), (0x15, 0, 1, ASK),
         (0x06, 0, 0, 0x00050000 | EPERM), (0x06, 0, 0, 0x7FFF0000)]
program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
filter = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(program))
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, filter, 0, 0) == 0
import torch, ctkernels as ct
from ctkernels import dispatch
x, prefix = torch.ones(1, 1, 4, 64).bfloat16(), torch.ones(1, 40, 64).bfloat16()
assert (ct.prefix_attention(x, x, x, prefix, prefix, backend="cpu") == 1).all()
print(*dispatch.load("cpu").isas())
"""

needs_amx = pytest.mark.skipif("amx" not in dispatch.cpu_info()["isa_available"], reason="this CPU has no AMX")


def test_a_system_that_denies_amx_gets_the_next_best():
    isas = dispatch.load("cpu").isas()
    told = subprocess.run([sys.executable, "-c", DENIED], check=True, capture_output=True, text=True).stdout.split()
    assert told[1:] == [isa for isa in isas[1:] if isa != "amx"] and told[0] == told[1]


def _instruction(code: str):
    """A function of one pointer that runs one instruction and returns."""
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(bytes.fromhex(code) + b"\xc3")
    run = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
    run.page = page
    return run


@needs_amx
def test_the_tile_registers_of_others_are_put_back():
    """Libraries may remember how they set up a thread's tile registers, and do so again only if that changes."""
    load, store = _instruction("c4e2784907"), _instruction("c4e2794907")  # ldtilecfg [rdi], sttilecfg [rdi]
    theirs = ctypes.create_string_buffer(bytes([1, *[0] * 15, 8, *[0] * 31, 3, *[0] * 15]), 64)  # one tile, 3 x 8 bytes
    found, none = ctypes.create_string_buffer(64), ctypes.create_string_buffer(64)
    q, prefix = torch.randn(2, 4, 33, 64).bfloat16().requires_grad_(), torch.randn(4, 70, 64).bfloat16()
    in_use, threads = dispatch.cpu_info()["isa"], torch.get_num_threads()
    dispatch.set_cpu_isa("amx")
    torch.set_num_threads(1)
    try:
        out = ct.prefix_attention(q, q, q, prefix, prefix, backend="cpu").sum()
        load(theirs)
        ct.prefix_attention(q, q, q, prefix, prefix, backend="cpu")
        store(found)
        assert found.raw == theirs.raw
        load(theirs)
        out.backward()
        store(found)
        assert found.raw == theirs.raw
    finally:
        load(none)
        dispatch.set_cpu_isa(in_use)
        torch.set_num_threads(threads)
