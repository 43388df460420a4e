"""Sequences that do not fit into the model's context: an error before anything runs. They are never cut or dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ctkernels.tuning.data.demonstrations import DataError
from ctkernels.tuning.data.formats import Row
from ctkernels.tuning.hf.models import find_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_context_length(model: PreTrainedModel, length: int) -> None:
    """Raise DataError for a context of `length` tokens that is longer than the model's."""
    limit = find_decoder(model).context_limit
    if limit is not None and length > limit:
        raise DataError(
            f"the demonstrations have {length} tokens, more than the model's context of {limit}; "
            "use fewer of them, or a smaller max_pair_tokens"
        )


def check_row_lengths(model: PreTrainedModel, length: int, rows: Sequence[Row]) -> None:
    """Raise DataError for a row that does not fit into the model's context after `length` positions."""
    limit = find_decoder(model).context_limit
    for row in rows:
        if limit is not None and length + len(row.tokens) > limit:
            raise DataError(
                f"{f'{row.source}: ' if row.source else ''}a row of {len(row.tokens)} tokens behind a prefix of "
                f"{length} exceeds the model's context of {limit}; use fewer demonstrations, or a smaller "
                "max_pair_tokens"
            )
