"""Deep-Thinking: the demonstrations' KV cache, refined by forward passes alone.

Yang and others: "Iterative Forward Tuning Boosts In-Context Learning in Language Models", arXiv 2305.13016. In each
round the demonstrations are encoded again, at the same positions, reading the cache of the round before in front of
their own keys; the cache then moves towards the result:  KV <- eta * KV_new + (1 - eta) * KV.

With ALiBi, where distances count keys, there are no same positions: such models are refused. A sliding window counts
keys, too, the cache's among them, so that late tokens of a long context read less of it in their windowed layers.
"""

from dataclasses import dataclass

import torch

from ctkernels.tuning.adapters.adapter import Adapter
from ctkernels.tuning.hf.encode import encode_tokens
from ctkernels.tuning.hf.models import ALIBI, find_decoder
from ctkernels.tuning.methods.base import Method, Run
from ctkernels.tuning.methods.icl import context_prefix
from ctkernels.tuning.train.options import Options


@dataclass(frozen=True)
class DeepThinkingOptions(Options):
    """What deep-thinking reads.

    Args:
        rounds: passes over the demonstrations.
        eta: share of the new keys and values in each round, in (0, 1].
    """

    rounds: int = 5
    eta: float = 0.1

    def check(self) -> None:
        self.at_least(1, "rounds")
        self.require(0 < self.eta <= 1, "eta", "in (0, 1]")


@torch.no_grad()
def fit(run: Run[DeepThinkingOptions]) -> Adapter:
    decoder = find_decoder(run.model)
    if decoder.family.positions == ALIBI:
        raise ValueError(
            f"{run.method} encodes demonstrations again at the same positions, which {type(decoder.model).__name__} "
            "does not have: with ALiBi distances count keys"
        )
    prefix = context_prefix(run)
    for _ in range(run.settings.rounds):
        keys, values = encode_tokens(run.model, run.context.input_ids, behind=prefix, position=0)
        for old, new in zip([*prefix.keys, *prefix.values], [*keys, *values], strict=True):
            old.lerp_(new, run.settings.eta)
    return Adapter(prefix)


DEEP_THINKING = Method(
    name="deep-thinking",
    summary="the demonstrations' KV cache, refined by forward passes alone",
    options=DeepThinkingOptions,
    fit=fit,
)
