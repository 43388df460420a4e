"""The GPUs that kernels are compiled for without being here: what their multiprocessors hold."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """A GPU architecture.

    name: as compilers write it.  backend, arch: as Triton names the target.  warp: lanes of a warp.
    shared_limit: bytes of shared memory that one block may have; shared_total: bytes of a multiprocessor.
    shared_reserved: bytes that the system takes of each block.  registers: 32-bit registers of a multiprocessor.
    threads: most threads of a multiprocessor.  multiprocessors: of its largest common GPU.
    """

    name: str
    backend: str
    arch: int | str
    warp: int
    shared_limit: int
    shared_total: int
    shared_reserved: int
    registers: int
    threads: int
    multiprocessors: int

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability as torch reports it; CDNA 3 is (9, 4)."""
        return divmod(self.arch, 10) if isinstance(self.arch, int) else (9, 4)

    def blocks(self, registers: int, shared: int, warps: int) -> int:
        """Blocks that a multiprocessor holds at once, 0 if not even one fits."""
        granule = 256 if self.backend == "cuda" else 8 * self.warp  # registers are given out in such steps per warp
        per_warp = -(-registers * self.warp // granule) * granule
        by_registers = self.registers // max(1, per_warp * warps)
        by_shared = self.shared_total // max(1, shared + self.shared_reserved) if shared <= self.shared_limit else 0
        return min(by_registers, by_shared, self.threads // (self.warp * warps))


KIB = 1024


def _nvidia(number: int, limit: int, total: int, threads: int, multiprocessors: int) -> Architecture:
    name = f"sm_{number}"
    return Architecture(name, "cuda", number, 32, limit * KIB, total * KIB, KIB, 65536, threads, multiprocessors)


# Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD CDNA 3 ISA.
ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        _nvidia(80, 163, 164, 2048, 108),  # A100
        _nvidia(86, 99, 100, 1536, 84),  # A40
        _nvidia(89, 99, 100, 1536, 142),  # L40S
        _nvidia(90, 227, 228, 2048, 132),  # H100
        _nvidia(100, 227, 228, 2048, 148),  # B200
        _nvidia(120, 99, 100, 1536, 170),  # RTX 5090
        # MI300X: four vector units with 512 registers per lane each
        Architecture("gfx942", "hip", "gfx942", 64, 64 * KIB, 64 * KIB, 0, 4 * 512 * 64, 2048, 304),
    )
}
