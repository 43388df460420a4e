"""What training rows see: leave-one-out in its variants, exemptions from token dropout."""

from dataclasses import dataclass

import pytest
import torch

from ctkernels.mask import ContextMask
from ctkernels.testing.tasks import DEMONSTRATIONS, char_tokenizer
from ctkernels.tuning.data.batches import make_batch
from ctkernels.tuning.data.formats import encode_context, encode_rows
from ctkernels.tuning.train.masks import Dropout, LeaveOneOut, context_mask
from ctkernels.tuning.train.options import Options

ROWS = encode_rows(char_tokenizer(), DEMONSTRATIONS)
CONTEXT = encode_context(char_tokenizer(adds_bos=True), DEMONSTRATIONS)  # one BOS token, then the segments
LENGTH, SEGMENTS = len(CONTEXT.input_ids), CONTEXT.segments
K = len(DEMONSTRATIONS)


@dataclass(frozen=True)
class Both(LeaveOneOut, Dropout):
    """What decides about masks."""


def visible(picked=tuple(range(K)), epoch=4, length=LENGTH, **settings) -> torch.Tensor:
    settings = Both(**settings)
    mask = context_mask(settings, SEGMENTS, make_batch(ROWS, list(picked)), settings.dropout_seed(epoch), length)
    return mask.dense(len(picked), length)


def shown_demonstrations(seen: torch.Tensor) -> torch.Tensor:
    """bool [B, K]; fails if a demonstration is shown in part."""
    parts = [seen[:, SEGMENTS[i] : SEGMENTS[i + 1]] for i in range(K)]
    assert all((part.all(1) | ~part.any(1)).all() for part in parts)
    return torch.stack([part.all(1) for part in parts], dim=1)


def test_none_self_and_suffix():
    assert visible(leave_one_out="none").all()
    own = shown_demonstrations(visible(leave_one_out="self"))
    assert torch.equal(own, ~torch.eye(K, dtype=torch.bool))
    before = shown_demonstrations(visible(leave_one_out="suffix"))
    assert torch.equal(before, torch.ones(K, K, dtype=torch.bool).tril(-1))
    for hide in ("self", "suffix"):
        assert visible(leave_one_out=hide)[:, 0].all()  # BOS is no demonstration
        assert visible(leave_one_out=hide, length=LENGTH + 3)[:, -3:].all()  # nor is what comes behind them


def test_power_shows_random_subsets_of_the_others():
    draws = torch.stack([shown_demonstrations(visible(leave_one_out="power", epoch=e)) for e in range(200)])
    assert not draws[:, torch.arange(K), torch.arange(K)].any()
    others = draws.float().mean(0)[~torch.eye(K, dtype=torch.bool)]
    assert ((others - 0.5).abs() < 0.15).all()  # four standard deviations
    assert len({tuple(row.tolist()) for row in draws[:, 0]}) == 2 ** (K - 1)  # each subset occurs
    assert (
        visible(leave_one_out="power")[:, 0].all() and visible(leave_one_out="power", length=LENGTH + 2)[:, -2:].all()
    )
    # a row sees the same subset in whatever batch it runs
    assert torch.equal(visible((3, 1), leave_one_out="power"), visible(leave_one_out="power")[[3, 1]])
    # and the subsets are not those of token dropout's stream
    dropped = ContextMask(drop_p=0.5, seed=Options().dropout_seed(4)).dense(K, K)
    assert not torch.equal(draws[4] | torch.eye(K, dtype=torch.bool), dropped | torch.eye(K, dtype=torch.bool))


def test_adaptive_leave_one_out_needs_enough_demonstrations():
    assert visible(leave_one_out="self", leave_one_out_from=K + 1).all()
    hidden = visible(leave_one_out="self", leave_one_out_from=K)
    assert torch.equal(hidden, visible(leave_one_out="self"))


def test_a_class_without_leave_one_out_hides_nothing():
    mask = context_mask(Dropout(), SEGMENTS, make_batch(ROWS, range(K)), 0, LENGTH)
    assert mask.dense(K, LENGTH).all()


@pytest.mark.parametrize("hide", ["none", "self", "power"])
def test_exempt_tokens_are_never_dropped_and_all_others_as_before(hide):
    whole = visible(leave_one_out=hide, drop_p=0.6)
    exempt = visible(leave_one_out=hide, drop_p=0.6, drop_from=9)
    kept = visible(leave_one_out=hide)
    assert torch.equal(exempt[:, 9:], whole[:, 9:])
    assert torch.equal(exempt[:, :9], kept[:, :9])
    assert not torch.equal(exempt, whole)


def test_no_demonstrations_nothing_to_hide():
    settings = Both(leave_one_out="self")
    mask = context_mask(settings, torch.tensor([7]), make_batch(ROWS, [0, 1]), 0, 7)
    assert mask.dense(2, 7).all()


def test_in_a_row_the_context_has_its_own_length():
    settings = Both(leave_one_out="self", drop_p=0.2)
    for in_row, length in ((True, LENGTH), (False, None)):
        mask = context_mask(settings, SEGMENTS, make_batch(ROWS, [0]), 0, LENGTH, in_row)
        assert mask.length == length
