"""Packing, padding, splitting by a token budget, and the reduction of the loss."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from ctkernels.tuning.data.batches import answer_losses, make_batch, split_by_tokens
from ctkernels.tuning.data.formats import Row

# prompts of 3, 1, 2 tokens; answers of 1, 3, 2
ROWS = [Row((5, 6, 7), ((8,),), 0), Row((9, 10, 11), ((10, 11, 12),), 1), Row((13, 14, 15), ((15, 16),), 2)]
# two answers that differ in their last token, and a row of its own for the third
SHARED = [Row((5, 6, 7), ((7, 8), (7, 9))), Row((5, 6), ((4,),))]


def test_packed_batch():
    batch = make_batch(ROWS, [0, 2])
    assert batch.input_ids.tolist() == [[5, 6, 7, 13, 14, 15]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2]]
    assert batch.cu_seqlens.tolist() == [0, 3, 6] and batch.cu_seqlens.dtype == torch.int32
    assert batch.attention_mask is None
    assert batch.row_ids.tolist() == [0, 2] and batch.held_out.tolist() == [0, 2]
    assert batch.logit_positions.tolist() == [2, 4, 5]
    assert batch.labels.tolist() == [8, 15, 16] and batch.answer_sizes == (1, 2)


@pytest.mark.parametrize("row", [*ROWS, Row((5, 6, 7, 8, 9), ((6, 8),), 1, predicted_at=(0, 2))])
def test_an_example_has_the_labels_that_the_row_is_scored_by(row):
    """transformers compares the logits of a position with the label of the next one."""
    example, batch = row.example(), make_batch([row], [0], "padded")
    logits = torch.randn(1, len(example["input_ids"]), 20, dtype=torch.float64)
    actual = cross_entropy(logits[0, :-1], torch.tensor(example["labels"][1:]))
    torch.testing.assert_close(answer_losses(logits[:, batch.logit_positions], batch)[0], actual)
    assert example["held_out"] == row.held_out and tuple(example["input_ids"][: len(row.tokens)]) == row.tokens


def test_a_row_of_several_answers_is_no_example():
    with pytest.raises(ValueError, match="a row must have one answer to be an example, got 2"):
        SHARED[0].example()


def test_padded_batch():
    rows = [Row((5,), ((6,),)), Row((7, 8, 9), ((8, 9, 10),))]
    batch = make_batch(rows, [0, 1], "padded")
    assert batch.input_ids.tolist() == [[5, 0, 0], [7, 8, 9]]
    assert batch.attention_mask.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert batch.cu_seqlens is None
    assert batch.logit_positions.tolist() == [0, 1, 2]
    assert batch.label_index.tolist() == [0, 3, 4, 5]  # row 0 at its position 0, row 1 at 0, 1, 2


def test_room_for_a_soft_prompt():
    packed, padded = (make_batch(ROWS, [0, 2], layout, lead=2) for layout in ("packed", "padded"))
    assert packed.cu_seqlens.tolist() == [0, 5, 10] and packed.position_ids.tolist() == [[0, 1, 2, 3, 4] * 2]
    assert packed.logit_positions.tolist() == [4, 8, 9] and padded.logit_positions.tolist() == [3, 4]
    prompt, tokens = torch.tensor([[-1.0], [-2.0]]), [[5, 6, 7], [13, 14, 15]]
    for batch in (packed, padded):
        filled = batch.with_prompt(batch.input_ids[..., None].float(), prompt)
        assert filled.shape == (*batch.input_ids.shape, 1)
        assert filled.view(2, 5).tolist() == [[-1, -2, *row] for row in tokens]


def test_answers_that_lie_apart():
    """Two answers of an in-context sequence are one answer of the row: their tokens' mean, not the mean of means."""
    row = Row((5, 6, 7, 8, 9, 10), ((7, 8, 11),), predicted_at=(1, 2, 5))
    batch = make_batch([ROWS[0], row], [0, 1])
    assert batch.logit_positions.tolist() == [2, 4, 5, 8] and batch.answer_sizes == (1, 3)
    logits = torch.randn(1, 9, 20, dtype=torch.float64)
    losses = answer_losses(logits[:, batch.logit_positions], batch)
    expected = cross_entropy(logits[0, [4, 5, 8]], torch.tensor([7, 8, 11]))
    torch.testing.assert_close(losses[1], expected)


def test_answers_that_share_tokens_share_logits():
    batch = make_batch(SHARED, [0, 1])
    assert batch.logit_positions.tolist() == [1, 2, 4]
    assert batch.label_index.tolist() == [0, 1, 0, 1, 2]
    assert batch.labels.tolist() == [7, 8, 7, 9, 4] and batch.answer_sizes == (2, 2, 1)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("rows", [ROWS, SHARED], ids=["one answer", "shared"])
def test_answer_losses_are_means_over_the_tokens_of_each_answer(layout, rows):
    batch = make_batch(rows, range(len(rows)), layout)
    logits = torch.randn(*batch.input_ids.shape, 20, dtype=torch.float64)
    losses = answer_losses(logits[:, batch.logit_positions], batch)
    expected = []
    starts = batch.cu_seqlens.tolist() if layout == "packed" else [0] * len(rows)
    for b, row in enumerate(rows):
        line = logits[0, starts[b] :] if layout == "packed" else logits[b]
        for answer in row.answers:
            at = line[len(row.tokens) - len(answer) : len(row.tokens)]
            expected.append(cross_entropy(at, torch.tensor(answer)))
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_low_precision_logits_are_reduced_in_fp32():
    batch = make_batch(ROWS, [0, 1])
    logits = torch.randn(1, 4, 20, dtype=torch.bfloat16)
    losses = answer_losses(logits, batch)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, answer_losses(logits.float(), batch), rtol=0, atol=0)


@given(
    sizes=st.lists(st.integers(1, 9), max_size=12),
    budget=st.integers(1, 25),
    layout=st.sampled_from(["packed", "padded"]),
    lead=st.sampled_from([0, 4]),
)
def test_split_by_tokens(sizes, budget, layout, lead):
    rows = [Row((0,) * size, ((0,),)) for size in sizes]
    groups = split_by_tokens(rows, budget, layout, lead)
    assert [i for group in groups for i in group] == list(range(len(sizes)))

    def cost(group):
        picked = [lead + sizes[i] for i in group]
        return sum(picked) if layout == "packed" else max(picked) * len(picked)

    assert all(cost(group) <= budget or len(group) == 1 for group in groups)
    # as few as a greedy split allows: no group could have taken the next row
    assert all(cost([*a, b[0]]) > budget for a, b in pairwise(groups))


def test_budget_must_be_positive():
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        split_by_tokens(ROWS, 0)
