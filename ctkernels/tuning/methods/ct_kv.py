"""CT-KV: the demonstrations' KV cache, trained on the demonstrations themselves.

Lu, Teehan, Yang, Ren: "Context Tuning for In-Context Optimization", arXiv 2507.04221. Each demonstration is a row that
reads the prefix minus its own segment (leave-one-out) and minus a random set of tokens (token dropout).
"""

from types import MappingProxyType

from torch import Tensor

from ctkernels.mask import ContextMask
from ctkernels.tuning.batches import Batch
from ctkernels.tuning.methods.base import Method
from ctkernels.tuning.settings import TrainSettings


def leave_one_out(settings: TrainSettings, segments: Tensor, batch: Batch, seed: int) -> ContextMask:
    """Hide each row's own demonstration, if the settings say so, and drop tokens."""
    if settings.leave_one_out:
        return ContextMask.leave_one_out(segments, batch.held_out, settings.drop_p, seed, batch.row_ids)
    return ContextMask(drop_p=settings.drop_p, seed=seed, row_ids=batch.row_ids)


CT_KV = Method(
    name="ct-kv",
    summary="the demonstrations' KV cache, tuned with leave-one-out and token dropout",
    trains="prefix",
    starts_from="context",
    mask=leave_one_out,
    defaults=MappingProxyType({"lr": 3e-3, "epochs": 25, "drop_p": 0.05, "leave_one_out": True}),
)
