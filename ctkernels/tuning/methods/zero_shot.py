"""The model alone: no demonstrations, no training."""

import torch

from ctkernels.tuning.adapters.adapter import Adapter
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.methods.base import Method, Run
from ctkernels.tuning.train.options import Options


def start_prefix(run: Run[Options]) -> KVPrefix:
    """What every sequence starts with, and no demonstration."""
    start = torch.tensor(run.start_tokens, dtype=torch.long)
    segments = torch.tensor([len(start)])
    return KVPrefix.from_tokens(run.model, start, segments, run.tokenizer, run.method, run.recorded)


def fit(run: Run[Options]) -> Adapter:
    return Adapter(start_prefix(run))


ZERO_SHOT = Method(
    name="zero-shot",
    summary="the model alone, without demonstrations",
    options=Options,
    fit=fit,
    needs_demonstrations=0,
)
