"""Log-likelihoods of options that continue one input, which is run once.

    pass 1   the rows, padded on the left, into a cache         _ x _ y          y: the row's own output
    pass 2   branches behind them, from copies of the cache           z         z: another option

Outputs at the ends of rows are then in the same columns, and the output head runs on no others.

A branch is an option without its last token, which predicts nothing. It sees its row up to where the output begins, and
the prefix under its row's mask. An option of one token needs no branch, nor does one that the output begins with.
Branches of similar length run together: the longest of a group has at most twice the tokens of the shortest, so that
less than half of a group is padding.

A model with layers that keep a state (hybrid models) runs each branch behind its input again: its caches hold the state
at the end of a row alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ctkernels import ContextMask
from ctkernels.tuning.data.batches import Batch, make_batch
from ctkernels.tuning.data.formats import Row, Score, Tokens
from ctkernels.tuning.hf.attach import Attachment
from ctkernels.tuning.hf.forward import Forward, kept_logits
from ctkernels.tuning.hf.models import find_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Scored:
    """What the rows of a batch give.

    labels: cross-entropy of each label, `[M]`.
    scores: of each option of each choice, `[C, O]`, -inf where a choice has fewer options.  right: bool `[C, O]`.
    choices_of_rows: number of choices of each row; their sum is C.
    """

    labels: Tensor
    scores: Tensor
    right: Tensor
    choices_of_rows: list[int]


@dataclass
class _Reads:
    """Tokens whose log-likelihoods a pass gives: index of the logits, the token, and its place among all tokens."""

    logits: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)

    def of(self, logits: Tensor) -> Tensor:
        """The log-likelihoods, from logits `[N, V]`."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits[self.logits, self.tokens] - logits.logsumexp(dim=-1)[self.logits]


@dataclass
class _Branch:
    """Tokens behind the first `start` positions (those of a soft prompt, too) of row `row` of a batch."""

    row: int
    start: int
    tokens: Tokens
    reads: list[tuple[int, int, int]] = field(default_factory=list)  # (own position, token, place)


def score_options(forward: Forward, score: Score) -> Scored:
    """The scores of all options of a padded batch, and the losses of its labels. Gradient checkpointing is off: it
    drops caches.

    Raises:
        ValueError: a packed batch, whose rows cannot be continued.
    """
    batch = forward.batch
    if batch.attention_mask is None:
        raise ValueError("options continue the rows of a padded batch, got a packed one")
    whole, branches, sizes, labelled = _plan(batch)
    again = bool(find_decoder(forward.model).keepers)
    with _caching(forward.model):
        cache = DynamicCache()  # without a config every layer keeps all positions
        padding = batch.attention_mask.shape[1] - batch.attention_mask.sum(dim=1)
        logits = _labelled_logits(forward) if again else _run_rows(forward, cache, padding, labelled)
        found, places = [whole.of(logits)], [*whole.places]
        groups = list(_groups(branches))
        # of passes that are asked for and not needed nothing is read: their gradient is zero
        groups += [[_Branch(0, 1, (int(batch.input_ids[0, 0]),))]] * (forward.passes - 1 - len(groups))
        for group in groups:
            reads = _Reads()
            length = max(len(branch.tokens) for branch in group)
            for number, branch in enumerate(group):
                for own, token, place in branch.reads:
                    reads.logits.append(number * length + own)
                    reads.tokens.append(token)
                    reads.places.append(place)
            run = _run_again(forward, group) if again else _run_branches(forward, cache, padding, group)
            found.append(reads.of(run.flatten(0, 1)))
            places += reads.places
    order = torch.tensor(places, device=logits.device).argsort()
    labels, *tokens = torch.cat(found)[order].split([len(batch.labels), *sizes])
    values = pad_sequence(tokens, batch_first=True) if tokens else labels.new_zeros(0, 1)  # [options, tokens]
    total = values.sum(dim=1)
    scores = total if score == "sum" else total / torch.tensor(sizes, device=total.device).to(total.dtype)
    choices = [choice for row in batch.choices for choice in row]
    right = torch.zeros(len(choices), max((len(c.options) for c in choices), default=1), dtype=torch.bool)
    for number, choice in enumerate(choices):
        right[number, list(choice.right)] = True
    by_choice = scores.split([len(choice.options) for choice in choices])
    empty = scores.new_zeros(0, 1)
    return Scored(
        labels=-labels,
        scores=pad_sequence(list(by_choice), batch_first=True, padding_value=-torch.inf) if choices else empty,
        right=right.to(scores.device),
        choices_of_rows=[len(row) for row in batch.choices],
    )


def passes(batch: Batch) -> int:
    """How often `score_options` has to run the model for a batch."""
    return 1 + sum(1 for _ in _groups(_plan(batch)[1]))


def _plan(batch: Batch) -> tuple[_Reads, list[_Branch], list[int], list[tuple[int, int]]]:
    """What to read of the rows themselves (first all labels, then tokens of options), the branches to run besides, the
    number of tokens of each option of each choice, and the row and the position that predict each label, in order."""
    labels = batch.labels.tolist()
    whole = _Reads(list(range(len(labels))), labels, list(range(len(labels))))
    positions = batch.logit_positions[batch.label_index % len(batch.logit_positions)].tolist()
    branches: list[_Branch] = []
    sizes: list[int] = []
    labelled: list[tuple[int, int]] = []
    first, place = 0, len(labels)  # of the row's labels; of the option's tokens
    for row, (choices, count) in enumerate(zip(batch.choices, batch.answer_sizes, strict=True)):
        labelled += [(row, position) for position in positions[first : first + count]]
        for choice in choices:
            at = first + choice.at
            own = {tokens: _Branch(row, positions[at] + 1, tokens) for tokens in choice.branches()}
            branches += own.values()
            for option in choice.options:
                branch = own.get(option[:-1])
                for number, token in enumerate(option):
                    if number == 0 or branch is None:
                        whole.logits.append(at + number)
                        whole.tokens.append(token)
                        whole.places.append(place)
                    else:
                        branch.reads.append((number - 1, token, place))
                    place += 1
                sizes.append(len(option))
        first += count
    return whole, branches, sizes, labelled


def _groups(branches: Sequence[_Branch]) -> Iterator[list[_Branch]]:
    """The branches that run together, shortest first."""
    group: list[_Branch] = []
    for branch in sorted(branches, key=lambda b: len(b.tokens)):
        if group and len(branch.tokens) > 2 * len(group[0].tokens):
            yield group
            group = []
        group.append(branch)
    if group:
        yield group


def _run_rows(forward: Forward, cache: DynamicCache, padding: Tensor, labelled: Sequence[tuple[int, int]]) -> Tensor:
    """Logits `[M, V]` at a row and position each; the keys and values of the rows go into the cache.

    padding: int `[B]`, the number of columns before each row.
    """
    batch, model = forward.batch, forward.model
    forward.attachment.cu_seqlens = None
    B, S = batch.input_ids.shape
    position = torch.arange(S, device=padding.device) - padding[:, None]  # [B, S], of each column in its row
    moved = torch.arange(B, device=padding.device)[:, None], position % S
    tokens = {"input_ids": batch.input_ids[moved]}
    if forward.prompt is not None:
        embedded = model.get_input_embeddings()(batch.input_ids)
        tokens = {"inputs_embeds": batch.with_prompt(embedded, forward.prompt.to(embedded.dtype))[moved]}
    before = padding.tolist()
    columns = [at + before[row] for row, at in labelled]
    kept = {column: place for place, column in enumerate(sorted(set(columns)))}
    logits = model(
        **tokens,
        attention_mask=(position >= 0).long(),
        position_ids=position.clamp(min=0),
        logits_to_keep=torch.tensor(list(kept), device=padding.device),
        past_key_values=cache,
        use_cache=True,
    ).logits
    return logits[[row for row, _ in labelled], [kept[column] for column in columns]]


def _run_branches(forward: Forward, cache: DynamicCache, padding: Tensor, branches: Sequence[_Branch]) -> Tensor:
    """Logits `[N, L, V]` of branches of at most L tokens. What comes after a shorter one is seen by none of it.

    padding: int `[B]`, the number of columns before each row in the cache.
    """
    device = forward.batch.input_ids.device
    rows, starts = (torch.tensor([getattr(b, name) for b in branches], device=device) for name in ("row", "start"))
    input_ids = pad_sequence([torch.tensor(b.tokens) for b in branches], batch_first=True).to(device)
    N, L = input_ids.shape
    longest = max(b.start for b in branches)
    seen = starts[:, None] - longest + torch.arange(longest, device=device)  # [N, T]: the row's position at each key
    last = torch.tensor([len(b.tokens) - 1 for b in branches], device=device)
    own = torch.arange(L, device=device).minimum(last[:, None])  # padding stays within the model's positions
    with _rows_of(forward.attachment, rows):
        return forward.model(
            input_ids=input_ids,
            attention_mask=torch.cat((seen >= 0, seen.new_ones(N, L, dtype=torch.bool)), dim=1).long(),
            position_ids=starts[:, None] + own,
            past_key_values=_copies(cache, rows, seen.clamp(min=0) + padding[rows, None]),
            use_cache=True,
        ).logits


def _labelled_logits(forward: Forward) -> Tensor:
    """Logits `[M, V]` that predict the labels of a batch, padded on the right."""
    logits = kept_logits(forward.model, forward.attachment, forward.batch, forward.prompt)
    return logits.flatten(0, 1).index_select(0, forward.batch.label_index)


def _run_again(forward: Forward, branches: Sequence[_Branch]) -> Tensor:
    """As `_run_branches`, with the positions before each branch run again."""
    batch = forward.batch
    rows = [
        Row((*batch.input_ids[b.row, batch.lead : b.start].tolist(), *b.tokens), ((0,) * len(b.tokens),))
        for b in branches
    ]
    longer = make_batch(rows, range(len(rows)), "padded", batch.lead).to(batch.input_ids.device)
    with _rows_of(forward.attachment, torch.tensor([b.row for b in branches], device=batch.input_ids.device)):
        logits = _labelled_logits(replace(forward, batch=longer))
    return pad_sequence(list(logits.split([len(b.tokens) for b in branches])), batch_first=True)


@contextmanager
def _rows_of(attachment: Attachment, rows: Tensor) -> Iterator[None]:
    """Within the block the attachment is that of some rows of its batch, int `[N]`."""
    mask, index = attachment.mask, attachment.prefix_index
    attachment.mask = _of_rows(mask, rows)
    attachment.prefix_index = None if index is None else index[rows.to(index.device)]
    try:
        yield
    finally:
        attachment.mask, attachment.prefix_index = mask, index


def _copies(cache: DynamicCache, rows: Tensor, columns: Tensor) -> DynamicCache:
    """A cache with the keys and values of some rows, int `[N]`, at some columns of each, int `[N, T]`."""
    copied = copy.copy(cache)
    copied.layers = []
    for layer in cache.layers:
        new = DynamicLayer()
        picked = rows.to(layer.keys.device)[:, None], columns.to(layer.keys.device)
        # by indexing: its derivative adds in a fixed order on every device
        keys, values = (x.transpose(1, 2)[picked].transpose(1, 2) for x in (layer.keys, layer.values))
        new.lazy_initialization(keys, values)
        new.keys, new.values = keys, values
        copied.layers.append(new)
    return copied


def _of_rows(mask: ContextMask | None, rows: Tensor) -> ContextMask | None:
    """The mask of some rows of a batch, int `[N]`."""
    if mask is None:
        return None
    hidden, keep, row_ids = (None if x is None else x[rows] for x in (mask.hidden, mask.keep, mask.row_ids))
    return replace(mask, hidden=hidden, keep=keep, row_ids=rows if row_ids is None else row_ids)


@contextmanager
def _caching(model: PreTrainedModel) -> Iterator[None]:
    """Within the block no layer is checkpointed: a checkpointed layer gets no cache."""
    before = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    training = [module.training for module in before]
    try:
        for module in before:
            module.training = False
        yield
    finally:
        for module, flag in zip(before, training, strict=True):
            module.training = flag
