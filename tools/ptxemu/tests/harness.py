"""Builds one PTX module from many small kernels, each trying one instruction.

A case's body computes ``%d`` from ``%a``, ``%b`` and ``%c``, which every thread loads from element
``%tid.x`` of three arrays; the result goes to the same element of an output array.
"""

from dataclasses import dataclass, field

import numpy as np
import ptxemu
import pytest

HEADER = ".version 8.7\n.target sm_100a\n.address_size 64\n"
REGISTER = {1: "b16", 2: "b16", 4: "b32", 8: "b64"}


@dataclass
class Case:
    name: str
    body: str
    inputs: list
    result: np.dtype
    expected: object  # array
    tolerance: float = 0.0
    registers: str = ""
    outputs: dict = field(default_factory=dict)

    @property
    def kernel(self):
        return "k_" + "".join(ch if ch.isalnum() else "_" for ch in self.name)

    def ptx(self):
        parameters = ", ".join(f".param .u64 p{n}" for n in range(len(self.inputs) + 1))
        lines = [
            f".visible .entry {self.kernel}({parameters}) {{",
            ".reg .b64 %ptr<9>; .reg .b32 %tid_;",
        ]
        lines.append(".reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<40>; .reg .b64 %rd<9>;" + self.registers)
        lines.append("mov.u32 %tid_, %tid.x;")
        for n, (register, array) in enumerate(zip("abc", self.inputs, strict=False)):
            size = array.itemsize
            lines.append(f".reg .{REGISTER[size]} %{register}; ld.param.u64 %ptr{n}, [p{n}];")
            lines.append(f"mad.wide.u32 %ptr{n}, %tid_, {size}, %ptr{n};")
            lines.append(f"ld.global.b{size * 8} %{register}, [%ptr{n}];")
        size = np.dtype(self.result).itemsize
        n = len(self.inputs)
        lines.append(f".reg .{REGISTER[size]} %d; ld.param.u64 %ptr8, [p{n}];")
        lines.append(f"mad.wide.u32 %ptr8, %tid_, {size}, %ptr8;")
        lines += [self.body, f"st.global.b{size * 8} [%ptr8], %d;", "ret;", "}"]
        return "\n".join(lines)

    def run(self, module):
        threads = len(self.inputs[0])
        out = np.zeros(threads, self.result)
        module.launch(self.kernel, 1, threads, [*self.inputs, out], shared_bytes=4096)
        expected = np.asarray(self.expected)
        if self.tolerance == 0:
            # NaNs of any payload are equal
            np.testing.assert_array_equal(out, expected.astype(out.dtype), err_msg=self.body)
        else:
            np.testing.assert_allclose(out, expected, rtol=self.tolerance, atol=self.tolerance, err_msg=self.body)


def build(cases, extra=""):
    names = [c.kernel for c in cases]
    assert len(set(names)) == len(names), sorted(n for n in names if names.count(n) > 1)
    return ptxemu.compile_ptx(HEADER + extra + "\n".join(c.ptx() for c in cases))


def expect(kind, words, launch):
    """`launch()` ends in a fault of this kind (or of one of several), whose text has these words. None: it ends well."""
    if kind is None:
        launch()
        return
    with pytest.raises(ptxemu.KernelFault) as caught:
        launch()
    assert caught.value.kind in ([kind] if isinstance(kind, str) else kind), str(caught.value)
    for word in words:
        assert word in str(caught.value)
