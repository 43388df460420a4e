"""What training starts from: the KV of the demonstrations in several encodings, and of nothing in particular.

    context     one pass over the concatenated demonstrations                      segment i has read 0 .. i-1
    separate    every demonstration encoded on its own, at its position            segment i has read nothing else
    permuted    averaged over random orders; keys without their rotary embedding, which is put back on afterwards
    pooled      the context, neighbouring tokens of a demonstration merged          keys averaged in the same way
    labels      the context, tokens of the outputs alone
    prefix-lm   one pass in which all tokens see each other, later ones too         segment i has read all others

In front of the demonstrations come BOS (where the tokenizer has it so), a prefix transferred from another task, the
instruction, and learned tokens; they are no demonstration and never hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ctkernels.tuning.adapters.prefix import KVPrefix, PrefixMetadata
from ctkernels.tuning.data.demonstrations import DataError
from ctkernels.tuning.data.formats import OUTPUT, PairEncoder
from ctkernels.tuning.hf.both_ways import encode_both_ways
from ctkernels.tuning.hf.encode import Encoded, encode, encode_tokens
from ctkernels.tuning.hf.limits import check_context_length
from ctkernels.tuning.hf.models import ALIBI, Decoder, find_decoder
from ctkernels.tuning.hf.rotary import check_fixed_rotation, rotated, unrotated
from ctkernels.tuning.hf.states import copies
from ctkernels.tuning.train.options import Options

if TYPE_CHECKING:
    from ctkernels.tuning.methods.base import Run

Layers = list[Tensor]  # [Hk, P, D] per layer

# what each kind of start can be
OfDemonstrations = Literal["context", "separate", "permuted", "pooled", "labels", "prefix-lm"]
OfPrefix = Literal["vocabulary", "first-ids", "normal"]
OfPrompt = Literal["vocabulary", "first-ids", "uniform"]


@dataclass(frozen=True)
class Start(Options):
    """What training starts from.

    Args:
        start: what training starts from. ct-kv: "context" (one pass over the demonstrations), "separate" (each
            demonstration encoded on its own), "permuted" (averaged over orders), "pooled" or "labels" (compressed),
            "prefix-lm" (one pass in which tokens also see later ones; where the model's attention can).
            Prefixes and prompts without demonstrations: "vocabulary" (random tokens), "first-ids" (token ids
            0, 1, 2, ...), "normal" or "uniform" (random numbers of the model's own scale).
    """

    start: OfDemonstrations | OfPrefix | OfPrompt = "context"


@dataclass(frozen=True)
class ContextStart(Start):
    """A prefix that starts from the demonstrations.

    Args:
        permutations: orders that a "permuted" start averages over.
        pooled_tokens: neighbouring tokens of a demonstration that a "pooled" start merges into one.
        front_tokens: learned tokens in front of the demonstrations, visible to every row.
    """

    start: OfDemonstrations = "context"
    permutations: int = 8
    pooled_tokens: int = 4
    front_tokens: int = 0

    def check(self) -> None:
        self.at_least(1, "permutations", "pooled_tokens")
        self.at_least(0, "front_tokens")


@dataclass(frozen=True)
class TokensStart(Start):
    """A prefix or soft prompt that starts from nothing in particular.

    Args:
        prompt_tokens: length of a prefix or soft prompt that does not start from demonstrations.
    """

    prompt_tokens: int = 32

    def check(self) -> None:
        self.at_least(1, "prompt_tokens")


@dataclass(frozen=True)
class PrefixStart(TokensStart):
    """A prefix of `prompt_tokens` tokens."""

    start: OfPrefix = "vocabulary"


@dataclass(frozen=True)
class PromptStart(TokensStart):
    """A soft prompt of `prompt_tokens` tokens."""

    start: OfPrompt = "vocabulary"


def metadata(run: Run) -> PrefixMetadata:
    """What a prefix made by this run records."""
    return PrefixMetadata.of(run.model, run.tokenizer, run.method, run.recorded)


def demonstrations_prefix(run: Run[ContextStart]) -> KVPrefix:
    """The prefix that ct-kv starts from: `run.settings.start` says how the demonstrations are encoded."""
    decoder, start = find_decoder(run.model), run.settings.start
    base = None if run.start_from is None else run.start_from.prefix
    if start == "prefix-lm" and base is not None:
        raise ValueError("start='prefix-lm' encodes a context of its own alone, so that start_from must be None")
    base_length, base_end = (0, 0) if base is None else (base.length, base.first_position)
    own = run.start_tokens if base is None else run.start_tokens[len(run.bos_tokens) :]
    lead = torch.tensor([*own, *random_ids(run, run.settings.front_tokens)])
    lead = lead.long()  # an empty list has no integers
    first = len(run.start_tokens)
    body, segments = run.context.input_ids[first:], run.context.segments - first
    before, end = base_length + len(lead), base_end + len(lead) + len(body)
    check_context_length(run.model, end)
    run.check_rows(end, run.rows)
    if start == "context":
        encoded = encode(run.model, torch.cat((lead, body)), behind=base)
        return _joined(run, base, encoded, segments + before, end, torch.cat((lead, body)))
    if start == "prefix-lm":
        encoded = encode_both_ways(run.model, torch.cat((lead, body)))
        return _joined(run, None, encoded, segments + before, end, torch.cat((lead, body)))
    if start in ("permuted", "pooled"):
        check_fixed_rotation(decoder, f"start={start!r}")
    encoded = encode_tokens(run.model, lead, behind=base)
    front = _joined(run, base, encoded, torch.tensor([before]), base_end + len(lead))
    if start == "separate":
        encoded = _separate(run, front, body, segments)
    elif start == "permuted":
        encoded = _permuted(run, decoder, front, body, segments)
    else:
        encoded = encode_tokens(run.model, body, behind=front)
        if start == "pooled":
            encoded, segments = _pooled(decoder, encoded, segments, front.first_position, run.settings.pooled_tokens)
        else:
            encoded, segments = _labels(encoded, segments, run.context.kinds[first:])
    if decoder.family.positions == ALIBI:  # distances count keys, so that a compressed prefix ends earlier
        end = front.length + encoded[0][0].shape[1]
    return _joined(run, front, encoded, segments + before, end)


def tokens_prefix(run: Run[PrefixStart]) -> KVPrefix:
    """The prefix that prefix tuning starts from: `prompt_tokens` tokens behind BOS, or another task's prefix."""
    if run.start_from is not None:
        other = run.start_from.prefix
        run.check_rows(other.first_position, run.rows)
        keys, values = ([x.detach().clone() for x in layers] for layers in (other.keys, other.values))
        segments = other.segments[:1] * 0
        return KVPrefix(
            keys, values, segments, other.first_position, metadata(run), copies(other.states), other.context
        )
    ids = [*run.start_tokens, *_prompt_ids(run)]
    check_context_length(run.model, len(ids))
    run.check_rows(len(ids), run.rows)
    context = torch.tensor(ids)
    prefix = _joined(run, None, encode(run.model, context), torch.tensor([len(ids)]), len(ids), context)
    if run.settings.start == "normal":
        generator = torch.Generator().manual_seed(run.settings.seed)
        with torch.no_grad():
            for parameter in (*prefix.keys, *prefix.values):
                drawn = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.copy_(drawn.to(parameter.device) * parameter.std() + parameter.mean())
    return prefix


def prompt_embeddings(run: Run[PromptStart]) -> Tensor:
    """Embeddings `[m, E]` that a soft prompt without demonstrations starts from: `prompt_tokens` tokens behind BOS."""
    embedding = run.model.get_input_embeddings()
    dtype = find_decoder(run.model).prefix_dtype
    ids = torch.tensor([*run.start_tokens, *_prompt_ids(run)], device=embedding.weight.device)
    with torch.no_grad():
        start = embedding(ids).to(dtype)
        if run.settings.start == "uniform":
            generator = torch.Generator().manual_seed(run.settings.seed)
            drawn = torch.rand(start.shape, generator=generator, dtype=dtype).to(start.device)
            start = start.mean() + (2 * drawn - 1) * start.std() * 3**0.5
    return start


def random_ids(run: Run, count: int) -> list[int]:
    """`count` different random token ids that are not special tokens."""
    special = set(run.tokenizer.all_special_ids)
    rows = run.model.get_input_embeddings().weight.shape[0]
    ordinary = [i for i in range(min(len(run.tokenizer), rows)) if i not in special]
    if count > len(ordinary):
        raise DataError(f"{count} random tokens were asked of a vocabulary of {len(ordinary)}")
    generator = torch.Generator().manual_seed(run.settings.seed)
    return [ordinary[i] for i in torch.randperm(len(ordinary), generator=generator)[:count].tolist()]


def _prompt_ids(run: Run[TokensStart]) -> list[int]:
    count = run.settings.prompt_tokens
    return list(range(count)) if run.settings.start == "first-ids" else random_ids(run, count)


def _joined(
    run: Run,
    front: KVPrefix | None,
    encoded: Encoded | tuple[Layers, Layers],
    segments: Tensor,
    first_position: int,
    context: Tensor | None = None,
) -> KVPrefix:
    keys, values, states = encoded if isinstance(encoded, Encoded) else (*encoded, {})
    if front is not None:
        if context is not None:
            context = None if front.context is None else torch.tensor([*front.context, *context])
        keys = [torch.cat((a.detach(), b), dim=1) for a, b in zip(front.keys, keys, strict=True)]
        values = [torch.cat((a.detach(), b), dim=1) for a, b in zip(front.values, values, strict=True)]
    return KVPrefix(keys, values, segments, first_position, metadata(run), states, context)


def _separate(run: Run, front: KVPrefix, body: Tensor, segments: Tensor) -> tuple[Layers, Layers]:
    parts = [
        encode_tokens(run.model, body[start:end], behind=front, position=front.first_position + start)
        for start, end in pairwise(segments.tolist())
    ]
    keys, values = zip(*parts, strict=True)
    return [torch.cat(x, dim=1) for x in zip(*keys, strict=True)], [
        torch.cat(x, dim=1) for x in zip(*values, strict=True)
    ]


def _permuted(
    run: Run[ContextStart], decoder: Decoder, front: KVPrefix, body: Tensor, segments: Tensor
) -> tuple[Layers, Layers]:
    """A demonstration's leading delimiter is part of it; the first one has none and gets one where it comes later."""
    offsets, count = segments.tolist(), len(segments) - 1
    encoder = PairEncoder(run.tokenizer, run.text_format)
    delimiter = torch.tensor([encoder.delimiter])
    generator = torch.Generator().manual_seed(run.settings.seed)
    own = front.first_position + torch.arange(len(body), device=decoder.device)
    keys: Layers | None = None
    values: Layers = []
    for _ in range(run.settings.permutations):
        pieces, where, total = [], torch.empty(len(body), dtype=torch.long), 0
        for i in torch.randperm(count, generator=generator).tolist():
            if i == 0 and pieces and not encoder.leads:
                pieces.append(delimiter)
                total += 1
            pieces.append(body[offsets[i] : offsets[i + 1]])
            where[offsets[i] : offsets[i + 1]] = torch.arange(total, total + len(pieces[-1]))
            total += len(pieces[-1])
        check_context_length(run.model, front.first_position + total)
        new_keys, new_values = encode_tokens(run.model, torch.cat(pieces), behind=front)
        where = where.to(decoder.device)
        at = front.first_position + where
        new_keys = [unrotated(decoder, i, k[:, where.to(k.device)], at) for i, k in enumerate(new_keys)]
        new_values = [v[:, where.to(v.device)] for v in new_values]
        keys = new_keys if keys is None else [a + b for a, b in zip(keys, new_keys, strict=True)]
        values = new_values if not values else [a + b for a, b in zip(values, new_values, strict=True)]
    n = run.settings.permutations
    return [rotated(decoder, i, k / n, own) for i, k in enumerate(keys or [])], [v / n for v in values]


def _pooled(
    decoder: Decoder, encoded: tuple[Layers, Layers], segments: Tensor, first: int, count: int
) -> tuple[tuple[Layers, Layers], Tensor]:
    """Runs of `count` tokens of a demonstration become their mean, at the position of the last of them."""
    ends, offsets = [], [0]
    for start, end in pairwise(segments.tolist()):
        ends += [min(e, end) for e in range(start + count, end + count, count)]
        offsets.append(len(ends))
    edges = torch.tensor([0, *ends])
    device, sizes = encoded[0][0].device, edges.diff().tolist()
    positions = first + torch.arange(int(edges[-1]), device=device)
    last = first + edges[1:].to(device) - 1

    def mean(x: Tensor) -> Tensor:  # not by index_add_, which sums in any order on a GPU
        return torch.stack([part.mean(dim=1) for part in x.split(sizes, dim=1)], dim=1)

    keys = [rotated(decoder, i, mean(unrotated(decoder, i, k, positions)), last) for i, k in enumerate(encoded[0])]
    return (keys, [mean(v) for v in encoded[1]]), torch.tensor(offsets)


def _labels(encoded: tuple[Layers, Layers], segments: Tensor, kinds: Tensor) -> tuple[tuple[Layers, Layers], Tensor]:
    kept = kinds == OUTPUT
    offsets = torch.cat((torch.zeros(1, dtype=torch.long), kept.long().cumsum(0)))[segments]
    keys, values = ([x[:, kept.to(x.device)] for x in layers] for layers in encoded)
    return (keys, values), offsets
