"""The proof that a model class computes with an attached prefix what it computes behind the whole context.

A tiny random instance (`tiny.py`), in fp64 throughout (`exact.py`), is run both ways; every check yields the largest
difference, relative to the largest result. Right ones are below 1e-12, and what is wrong changes results by 1e-3 and
more: another context by `effect`, which is measured as well.

    stock       model([context | row])                      eager attention, nothing attached: the truth
    attached    prefix of the context; model(row)           lengths around windows and chunks, padding on either side,
                                                            packed rows, cached steps, generate, the prefix's gradient
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from ctkernels.tuning.hf.attach import Attachment
from ctkernels.tuning.hf.discover import ALIBI, Layout, find_layout
from ctkernels.tuning.hf.encode import encode
from ctkernels.tuning.hf.exact import full_precision
from ctkernels.tuning.hf.models import Decoder, architecture, find_decoder
from ctkernels.tuning.hf.served import Verdict, in_a_line, register_prover, trusting
from ctkernels.tuning.hf.states import cache_for, states_of
from ctkernels.tuning.hf.tiny import REACH, VOCABULARY, WINDOW, make_tiny, shrink, unknown_lengths

EQUAL = 1e-9  # most difference of a class that is served
FELT = 1e-3  # least effect of another context
CONTEXT = 2 * WINDOW + 3
ROWS = (4, WINDOW + 3, 1)
STEPS = 3
STOCK = "the stock model"


class Prefix:
    """Keys and values of a context for the model under proof (a `PrefixLike`)."""

    def __init__(self, decoder: Decoder, context: Tensor) -> None:
        keys, values, self.states = encode(decoder.model, context)
        self.keys, self.values = ([x.requires_grad_() for x in kind] for kind in (keys, values))
        for state in self.states.values():
            state.requires_grad_()
        self.length = self.first_position = len(context)
        name = type(decoder.model).__name__
        self.metadata = SimpleNamespace(
            model_class=name, model_id="", architecture=architecture(decoder.config), settings={}
        )

    def parameters(self) -> list[Tensor]:
        return [*self.keys, *self.values, *self.states.values()]


class Bench:
    """The tiny model, a context and some rows, and what the stock model makes of them."""

    prefix: Prefix  # of the context, as soon as it has been made

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.decoder = model, find_decoder(model)
        self._generator = torch.Generator().manual_seed(1)
        self.context, self.rows = self.tokens(CONTEXT), [self.tokens(n) for n in ROWS]
        self.stock = [self.run(torch.cat((self.context, row)), CONTEXT) for row in self.rows]

    def tokens(self, count: int) -> Tensor:
        return torch.randint(3, VOCABULARY, (count,), generator=self._generator)

    def forward(self, **inputs: Any) -> tuple[list[Tensor], Any]:
        """Results of all tokens, `[B, S, ...]` each: the decoder's, and logits, if there are some; and the decoder's
        output."""
        seen: list[Any] = []
        handle = self.decoder.base.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            output = self.model(**inputs)
        finally:
            handle.remove()
        logits, (inner,) = getattr(output, "logits", None), seen
        per_token = logits is not None and logits.shape[:2] == inner[0].shape[:2]
        return [inner[0], *([logits] if per_token else [])], inner

    @torch.no_grad()
    def run(self, tokens: Tensor, start: int = 0) -> list[Tensor]:
        """Results of one sequence from token `start` on, `[S, ...]` each."""
        return [x[0, start:] for x in self.forward(input_ids=tokens[None])[0]]

    def padded(self, side: str) -> tuple[Tensor, Tensor]:
        """The rows as input_ids and attention_mask, int64 `[B, S]`."""
        ids = torch.zeros(len(ROWS), max(ROWS), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(self.rows):
            at = slice(0, len(row)) if side == "right" else slice(max(ROWS) - len(row), max(ROWS))
            ids[index, at], mask[index, at] = row, 1
        return ids, mask


def difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest one, relative to the largest result; infinite for NaN."""
    worst = (float((a - e).abs().max() / e.abs().max()) for a, e in zip(actual, expected, strict=True))
    return max(x if x == x else float("inf") for x in worst)


def lengths(bench: Bench) -> Iterator[float]:
    """Contexts around the windows and chunks, and behind lengths that may be some."""
    reach = max(unknown_lengths(bench.decoder.config).values(), default=0)
    far = [2 * reach - 4] if reach else []
    for length in (1, WINDOW - 1, WINDOW, WINDOW + 1, CONTEXT, *far):
        context = torch.cat((bench.context, bench.tokens(max(0, length - CONTEXT))))[:length]
        with Attachment(Prefix(bench.decoder, context), bench.model):
            own = bench.run(bench.rows[1])
        yield difference(own, bench.run(torch.cat((context, bench.rows[1])), length))


@torch.no_grad()
def padding(bench: Bench, side: str) -> Iterator[float]:
    """A batch of rows of several lengths."""
    ids, mask = bench.padded(side)
    with Attachment(bench.prefix, bench.model):
        results, _ = bench.forward(input_ids=ids, attention_mask=mask)
    for row, expected in enumerate(bench.stock):
        yield difference([x[row][mask[row].bool()] for x in results], expected)


@torch.no_grad()
def packed(bench: Bench) -> Iterator[float]:
    """All rows in one sequence."""
    offsets = torch.tensor([0, *ROWS]).cumsum(0).int()
    with Attachment(bench.prefix, bench.model, cu_seqlens=offsets):
        results, _ = bench.forward(input_ids=torch.cat(bench.rows)[None], use_cache=False)
    for row, expected in enumerate(bench.stock):
        yield difference([x[0, offsets[row] : offsets[row + 1]] for x in results], expected)


@torch.no_grad()
def continued(bench: Bench) -> Iterator[float]:
    """A row in pieces, through a cache."""
    cache, pieces = None, []
    with Attachment(bench.prefix, bench.model):
        for piece in bench.rows[1].split((4, 1, WINDOW - 2)):
            results, output = bench.forward(input_ids=piece[None], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append([x[0] for x in results])
    yield difference([torch.cat(parts) for parts in zip(*pieces, strict=True)], bench.stock[1])


@torch.no_grad()
def generation(bench: Bench) -> Iterator[float]:
    """`generate` on a batch padded on the left, token by token."""
    if not bench.model.can_generate():
        return
    ids, mask = bench.padded("left")
    settings = GenerationConfig(
        max_new_tokens=STEPS, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    with Attachment(bench.prefix, bench.model):
        output = bench.model.generate(ids, attention_mask=mask, generation_config=settings)
    for row, tokens in enumerate(bench.rows):
        new = output.sequences[row, ids.shape[1] :]
        whole = torch.cat((bench.context, tokens, new[:-1]))
        yield difference([torch.stack(output.logits)[:, row]], bench.run(whole, CONTEXT + len(tokens) - 1)[-1:])


@torch.no_grad()
def alone(bench: Bench) -> float:
    """How much a cache changes what the stock model computes, without a prefix."""
    tokens, results = torch.cat((bench.context, bench.rows[1])), []
    cache = None
    for piece in (*tokens[:-2].split(WINDOW), *tokens[-2:].split(1)):
        found, output = bench.forward(input_ids=piece[None], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        results.append(found[0][0])
    return difference([torch.cat(results)], bench.run(tokens)[:1])


def gradient(bench: Bench) -> Iterator[float]:
    """The prefix's gradient, which the stock model carries on to the context's embeddings: there the truth has one."""
    row, decoder = bench.rows[1], bench.decoder
    embed = decoder.base.get_input_embeddings()
    context = embed(bench.context)[None].requires_grad_()
    with _embedded(embed, torch.cat((context, embed(row)[None]), dim=1)):
        results, _ = bench.forward(input_ids=torch.cat((bench.context, row))[None])
    weights = torch.randn(1, len(row), results[0].shape[-1], generator=bench._generator).double()
    (expected,) = torch.autograd.grad((results[0][:, CONTEXT:] * weights).sum(), context)

    cache, first = cache_for(decoder), decoder.first_position_id
    positions = {} if decoder.family.positions == ALIBI else {"position_ids": first + torch.arange(CONTEXT)[None]}
    mask = torch.ones(1, CONTEXT, dtype=torch.int64)
    with _embedded(embed, context.clone()):
        ids = bench.context[None]
        decoder.base(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **positions)
    with Attachment(bench.prefix, bench.model):
        results, _ = bench.forward(input_ids=row[None], use_cache=False)
        own = torch.autograd.grad((results[0] * weights).sum(), bench.prefix.parameters())
    layers = [cache.layers[index] for index in decoder.cache_indices]
    made = [*(layer.keys for layer in layers), *(layer.values for layer in layers), *states_of(cache).values()]
    (actual,) = torch.autograd.grad(made, context, [x[None] for x in own])
    yield difference([actual], [expected])


@contextmanager
def _embedded(embed: nn.Module, embeddings: Tensor) -> Iterator[None]:
    """Within the block the tokens of a model have these embeddings. (Some models need ids besides.)"""
    handle = embed.register_forward_hook(lambda module, args, output: embeddings)
    try:
        yield
    finally:
        handle.remove()


def effect(bench: Bench) -> float:
    """How much another context changes what is computed."""
    with Attachment(Prefix(bench.decoder, bench.tokens(CONTEXT)), bench.model):
        return difference(bench.run(bench.rows[1]), bench.stock[1])


CHECKS: Mapping[str, Callable[[Bench], Iterator[float]]] = {
    "rows behind contexts of several lengths": lengths,
    "right padding": partial(padding, side="right"),
    "left padding": partial(padding, side="left"),
    "packed rows": packed,
    "cached steps": continued,
    "generation": generation,
    "the prefix's gradient": gradient,
}


def prove(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, layout: Layout, checks: Sequence[str] = tuple(CHECKS)
) -> Verdict:
    """Whether models of `model_class` with configurations like `config`, laid out like `layout`, can be served.

    In a thread of its own, where no gradient mode, autocast or device of the caller holds. Raises nothing.

    Args:
        checks: names of CHECKS; a class is admitted by all of them alone.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_prove, model_class, config, layout, checks).result()


def _prove(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, layout: Layout, checks: Sequence[str]
) -> Verdict:
    differences: dict[str, float] = {}
    with full_precision(), torch.device("cpu"), trusting():
        try:
            model = make_tiny(model_class, shrink(config))
        except Exception as error:  # of whatever the class may check
            return Verdict(f"no tiny instance of it can be made to prove it: {in_a_line(error)}")
        check = STOCK
        try:
            unlike = _unlike(model, layout)
            if unlike is not None:
                return Verdict(unlike)
            bench = Bench(model)
            check = "making a prefix"
            bench.prefix = Prefix(bench.decoder, bench.context)
            felt = effect(bench)
            for check in checks:
                differences[check] = max(CHECKS[check](bench), default=0.0)
                if differences[check] > EQUAL:
                    return Verdict(_wrong(check, differences[check], layout, bench), differences, felt)
        except Exception as error:  # as above
            return Verdict(_failed(check, error), differences)
    if felt < FELT:
        return Verdict(
            f"another context changes its results by {felt:.0e} alone, which proves nothing", differences, felt
        )
    return Verdict(None, differences, felt)


def _unlike(model: PreTrainedModel, layout: Layout) -> str | None:
    """Why nothing follows from this tiny model for the one that is to be served."""
    decoder, own = find_decoder(model), find_layout(model)
    if own.classes() != layout.classes():
        return f"its class has layers of {', '.join(own.classes())}, this model of {', '.join(layout.classes())}"
    names = {name for look in own.looks for name, _ in look}  # others are somebody else's
    for look in ({(name, x) for name, x in look if name in names} for look in layout.looks):
        nearest = min((look - set(each) for each in own.looks), key=len)
        if nearest:
            what = ", ".join(f"{name.lstrip('.')} {x}" for name, x in sorted(nearest))
            return f"some of its layers have {what}, which no tiny instance of it has"
    for name, value in unknown_lengths(decoder.config).items():
        if value > REACH:
            return f"config.{name}, {value}, is not known to ctkernels and may be a length beyond which all differs"
    return None


def _wrong(check: str, by: float, layout: Layout, bench: Bench) -> str:
    if (check in ("cached steps", "generation") or layout.keepers) and alone(bench) > EQUAL:
        return f"{check}: the stock model itself gives other results with its cache than without"
    without = f"; some layers have no attention ({', '.join(sorted(set(layout.bare)))})" if layout.bare else ""
    kinds = ", ".join(dict.fromkeys(kind.__name__ for _, kind in layout.keepers))
    state = f"; some layers keep a state ({kinds}), with which they may not begin" if kinds else ""
    return f"{check}: results differ by {by:.1g} from those behind the whole context{state or without}"


def _failed(check: str, error: Exception) -> str:
    if check == STOCK:
        return f"a tiny instance of it does not run, even without a prefix ({in_a_line(error)})"
    frames = (Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__))
    *_, place = (file for file in frames if file.name != "exact.py" and "torch" not in file.parts)
    if Path(__file__).parents[2] in place.parents:
        return f"{check} failed: {in_a_line(error)}"
    return (
        f"{check}: its own code does not run on rows with a prefix, whose extents it gets in place of a mask "
        f"({in_a_line(error)})"
    )


register_prover(prove)
