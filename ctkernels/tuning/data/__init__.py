"""Tasks: demonstrations, their tokens, batches of rows, metrics, retrieval, and suites of tasks."""

from ctkernels.tuning.data.demonstrations import DataError, Demonstration, load_jsonl, load_metaicl
from ctkernels.tuning.data.formats import (
    EncodedContext,
    PairEncoder,
    Row,
    TextFormat,
    encode_context,
    encode_prompt,
    encode_rows,
)

__all__ = [
    "DataError",
    "Demonstration",
    "EncodedContext",
    "PairEncoder",
    "Row",
    "TextFormat",
    "encode_context",
    "encode_prompt",
    "encode_rows",
    "load_jsonl",
    "load_metaicl",
]
