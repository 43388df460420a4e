"""Counters of a launch: exact counts of what the kernel executed.

Memory traffic follows the rules that profilers document: 32 banks of 4 bytes for shared memory,
32-byte sectors for global memory.  Counters say nothing about time.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass, field

# Columns of the runtime's per-instruction statistics.
STATS = (
    "shared_requests", "shared_wavefronts", "shared_ideal",
    "global_requests", "global_sectors", "global_ideal", "global_bytes",
)  # fmt: skip


def _ratio(value, ideal):
    return value / ideal if ideal else 1.0


@dataclass
class Counters:
    """What one launch executed.

    instructions: thread-level instruction counts by class (divide by 32 for full warps).
    warp_instructions: mma, ldmatrix and stmatrix per warp, wgmma per warpgroup.
    matrix_flops: multiplications and additions in mma and wgmma; scalar_flops: all others.
    shared_wavefronts / shared_ideal: passes over the banks, and passes if there were no conflict;
        loads, stores, atomics, ldmatrix, stmatrix and the writes of cp.async.
    global_sectors / global_ideal: 32-byte sectors requested per warp instruction, and the fewest
        that could hold the same bytes.
    global_bytes_read / written / touched: unique bytes of the registered buffers over the launch.
    shared_bytes: static plus dynamic allocation; shared_bytes_touched: last byte written, plus 1.
    lines: per PTX instruction that executed: a dict with location, count and memory statistics.
    """

    instructions: dict[str, int]
    warp_instructions: dict[str, int]
    matrix_flops: int
    scalar_flops: int
    shared_requests: int
    shared_wavefronts: int
    shared_ideal: int
    global_requests: int
    global_sectors: int
    global_ideal: int
    global_bytes_read: int
    global_bytes_written: int
    global_bytes_touched: int
    shared_bytes: int
    shared_bytes_touched: int
    lines: list[dict] = field(repr=False, default_factory=list)

    @property
    def bank_conflict_ratio(self):
        """Wavefronts over conflict-free wavefronts; 1.0 means no conflicts."""
        return _ratio(self.shared_wavefronts, self.shared_ideal)

    @property
    def coalescing_ratio(self):
        """Requested sectors over the fewest possible; 1.0 means fully coalesced."""
        return _ratio(self.global_sectors, self.global_ideal)

    @property
    def total_instructions(self):
        return sum(self.instructions.values())

    @property
    def atomics(self):
        return self.instructions.get("atomic", 0)

    @property
    def barriers(self):
        return self.instructions.get("barrier", 0)

    @classmethod
    def collect(cls, infos, executed, stats, config, shared_bytes):
        by_class = collections.Counter()
        collectives = collections.Counter()
        matrix_flops = scalar_flops = 0
        lines = []
        for info, count, row in zip(infos, executed.tolist(), stats.tolist(), strict=False):
            if not count:
                continue
            by_class[info.kind] += count
            if info.kind in ("mma", "wgmma", "ldmatrix", "stmatrix"):
                collectives[info.kind] += count // info.threads
                matrix_flops += count // info.threads * info.matrix_flops
            scalar_flops += count * info.scalar_flops
            lines.append(
                {
                    "location": info.location,
                    "opcode": info.opcode,
                    "class": info.kind,
                    "count": count,
                }
                | dict(zip(STATS, row, strict=False))
            )
        totals = dict(zip(STATS, stats.sum(axis=0).tolist(), strict=False))
        totals.pop("global_bytes")
        return cls(
            instructions=dict(by_class),
            warp_instructions=dict(collectives),
            matrix_flops=matrix_flops,
            scalar_flops=scalar_flops,
            global_bytes_read=config.bytes_read,
            global_bytes_written=config.bytes_written,
            global_bytes_touched=config.bytes_touched,
            shared_bytes=shared_bytes,
            shared_bytes_touched=config.max_shared_touched,
            lines=lines,
            **totals,
        )

    def of_class(self, *kinds):
        """Memory statistics summed over the instructions of some classes."""
        rows = [line for line in self.lines if line["class"] in kinds]
        out = {"count": sum(r["count"] for r in rows)}
        out |= {s: sum(r[s] for r in rows) for s in STATS}
        out["bank_conflict_ratio"] = _ratio(out["shared_wavefronts"], out["shared_ideal"])
        out["coalescing_ratio"] = _ratio(out["global_sectors"], out["global_ideal"])
        return out

    def worst_bank_conflicts(self, limit=5):
        rows = [r for r in self.lines if r["shared_wavefronts"] > r["shared_ideal"]]
        return sorted(rows, key=lambda r: r["shared_ideal"] - r["shared_wavefronts"])[:limit]

    def worst_coalescing(self, limit=5):
        rows = [r for r in self.lines if r["global_sectors"] > r["global_ideal"]]
        return sorted(rows, key=lambda r: r["global_ideal"] - r["global_sectors"])[:limit]

    def summary(self):
        """A table for people."""
        out = ["instructions (per thread):"]
        for kind, count in sorted(self.instructions.items(), key=lambda x: -x[1]):
            out.append(f"  {kind:<18}{count:>14,}")
        for kind, count in self.warp_instructions.items():
            unit = "warpgroup" if kind == "wgmma" else "warp"
            out.append(f"  {kind} per {unit}: {count:,}")
        out.append(f"matrix flops {self.matrix_flops:,}, scalar flops {self.scalar_flops:,}")
        out.append(
            f"shared memory: {self.shared_bytes:,} bytes allocated, "
            f"{self.shared_requests:,} requests, "
            f"{self.shared_wavefronts:,} wavefronts, {self.shared_ideal:,} without conflicts "
            f"(ratio {self.bank_conflict_ratio:.2f})"
        )
        out.append(
            f"global memory: {self.global_requests:,} requests, {self.global_sectors:,} sectors, "
            f"{self.global_ideal:,} ideal (ratio {self.coalescing_ratio:.2f}); unique bytes read "
            f"{self.global_bytes_read:,}, written {self.global_bytes_written:,}"
        )
        for title, rows, value, ideal in (
            ("bank conflicts", self.worst_bank_conflicts(3), "shared_wavefronts", "shared_ideal"),
            ("uncoalesced", self.worst_coalescing(3), "global_sectors", "global_ideal"),
        ):
            for r in rows:
                out.append(f"  {title}: {r[value]:,} instead of {r[ideal]:,} at {r['location'].describe()}")
        return "\n".join(out)
