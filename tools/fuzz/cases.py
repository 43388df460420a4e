"""One case: a call of the op, drawn from its number, and what its results are held against."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Tensor

from ctkernels.testing.backends import Backend
from ctkernels.testing.calls import Call, cotangents_for, pack, run, visibility
from ctkernels.testing.compare import Judge
from ctkernels.testing.generate import Sizes, random_call
from tools.fuzz.guard import Guard

# most of the time goes into fp64 and eager PyTorch: head dimensions around those of the vectors, a few large ones
SIZES = Sizes(heads=(1, 2, 8, 15, 16, 17, 24, 32, 40, 48, 64, 64, 80, 96, 128, 130), groups=(1, 1, 2, 3, 7))
INTERPRETED = Sizes(3, (0, 1, 3, 9, 17), (0, 1, 16, 33, 70), (1, 8, 17, 40, 64), (1, 2, 3))
OPTIONS = ("hidden", "keep", "drop_p", "length", "row_ids", "prefix_index", "prefix_lens", "seq_lens", "scale")
OPTIONS += ("window", "softcap", "alibi_slopes", "prefix_bias", "sinks")


@dataclass(frozen=True)
class Case:
    """A call and how it is made.

    call: as the judge gets it.  given: the call that runs, which holds NaN in what no query sees, if `poisoned`.
    cotangents: gradients of out and lse; None runs the forward pass alone.  wanted: the tensors whose gradients are
    asked for.  at_end: whether all memory ends before a page that cannot be read, or begins behind one.
    """

    number: int
    types: str
    call: Call
    given: Call
    cotangents: tuple[Tensor, Tensor] | None
    given_cotangents: tuple[Tensor, Tensor] | None
    wanted: tuple[str, ...]
    at_end: bool
    poisoned: bool

    @classmethod
    def draw(cls, number: int, types: list[str], sizes: Sizes = SIZES) -> Case:
        """The case of this number; the same one everywhere for the same types and sizes."""
        chance = Random(number)
        kind = chance.choice(types)
        call = random_call(chance, kind, sizes=sizes)
        cotangents = cotangents_for(call, number, chance.choice(["plain", "transposed", "expanded"]))
        backward, some, poisoned, at_end = (chance.randrange(n) for n in (6, 4, 4, 3))
        names = tuple(call.tensors)
        wanted = names if some else tuple(chance.sample(names, chance.randint(1, len(names))))
        case = cls(number, kind, call, call, cotangents, cotangents, wanted, bool(at_end), not poisoned)
        if case.poisoned:
            given, given_cotangents = with_nan(call, cotangents)
            case = replace(case, given=given, given_cotangents=given_cotangents)
        return case if backward else replace(case, cotangents=None, given_cotangents=None, wanted=())

    def traits(self) -> list[str]:
        """What is on in this case, by name."""
        on = {*self.call.tensors, *self.call.options, *(self.call.mask or ())}
        q, k, v = (self.call.tensors[name] for name in "qkv")
        return [
            "packed rows" if self.call.cu_seqlens is not None else "padded rows",
            *(name for name in OPTIONS if name in on),
            *["not causal"] * ("causal" in on),
            *["fewer queries than keys"] * (self.call.cu_seqlens is None and q.shape[2] < k.shape[2]),
            *["values of their own width"] * (q.shape[-1] != v.shape[-1]),
            *["forward alone"] * (self.cotangents is None),
            *["some gradients"] * (0 < len(self.wanted) < len(self.call.tensors)),
            *["NaN in what no query sees"] * self.poisoned,
            "memory ends before a guard page" if self.at_end else "memory begins behind a guard page",
        ]


def with_nan(call: Call, cotangents: tuple[Tensor, Tensor]) -> tuple[Call, tuple[Tensor, Tensor]]:
    """NaN in the keys and values that no query sees, in padding queries, and in the gradients that arrive for them."""
    seen, _ = visibility(call)
    t, P = dict(call.tensors), call.tensors["prefix_k"].shape[-2]
    (B, S, _), index = seen.shape, call.options.get("prefix_index")
    read = torch.zeros(t["prefix_k"].shape[0] if t["prefix_k"].dim() == 4 else 1, P, dtype=torch.bool)
    for g in range(len(read)):  # a prefix of several rows is read where one of them does
        rows = torch.arange(B) if index is None else (index == g).nonzero()[:, 0]
        read[g] = seen[rows][..., :P].flatten(0, 1).any(0)
    read = read[:, None] if t["prefix_k"].dim() == 4 else read
    for name in ("prefix_k", "prefix_v"):
        t[name] = t[name].masked_fill(~read[..., None], torch.nan)
    own, lens = seen[..., P:].any(1)[:, None], None if call.cu_seqlens is None else call.cu_seqlens.diff().tolist()
    for name in ("k", "v"):
        hidden = ~(own if lens is None else pack(own, lens))[..., None]
        t[name] = t[name].masked_fill(hidden, torch.nan)
    if call.cu_seqlens is not None:  # which has no padding
        return replace(call, tensors=t), cotangents
    T, row_lens = call.tensors["k"].shape[2], call.options.get("seq_lens")
    ends = torch.full((B, 1), T) if row_lens is None else row_lens[:, None].long()
    padding = (torch.arange(S) + (0 if T == S else ends - S) >= ends).expand(B, S)[:, None]
    t["q"] = t["q"].masked_fill(padding[..., None], torch.nan)
    dout, dlse = cotangents
    return replace(call, tensors=t), (
        dout.masked_fill(padding[..., None], torch.nan),
        dlse.masked_fill(padding, torch.nan),
    )


def check(case: Case, builds: list[Backend], guard: Guard, select, judged: dict[str, float]) -> list[str]:
    """Runs a case on some builds. Returns what is wrong, a line per build; the largest error of each result, as a part
    of what is allowed, goes to `judged`.

    select: called with a build before it runs.
    """
    judge, wrong = Judge(case.call, case.cotangents), []
    placed = guard.place_call(case.given, case.at_end)
    cotangents = case.given_cotangents
    if cotangents is not None:
        dout, dlse = (guard.place(n, x, case.at_end) for n, x in zip(("dout", "dlse"), cotangents, strict=True))
        cotangents = dout, dlse
    for build in builds:
        select(build)
        try:
            got = run(placed, build, cotangents, case.wanted)
            for name, part in judge.check(got, got.keys()).items():
                judged[name] = max(judged.get(name, 0.0), part)
        except Exception as error:  # whatever it is, the next case must run
            wrong.append(f"case {case.number} on {build}, {case.types}: {type(error).__name__}: {error}")
    return wrong
