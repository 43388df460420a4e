"""Moving keys to other positions without the model's weights.

How keys are rotated depends on the class, the head dimension and the configuration, not on weights: a model of the same
class and configuration with one narrow head tells it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ctkernels.tuning.adapters.compose import check_movable, moved_keys
from ctkernels.tuning.hf.models import Decoder, find_decoder

WIDTH = 16  # of what is not a head
ONE_HEAD = ("num_attention_heads", "num_key_value_heads")
NARROW = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "vocab_size")
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


class Mover:
    """Moves keys of models of one configuration.

    Raises:
        ValueError: a model whose keys cannot be moved (learned positions, ALiBi, a rotation that depends on the
            sequence's length), or of which a small one cannot be made.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self._decoder = _small(config)
        check_movable(self._decoder)

    def moved(self, keys: Sequence[Tensor], steps: int) -> list[Tensor]:
        """Keys `[Hk, P, D]` of every layer, moved by `steps` positions."""
        return moved_keys(self._decoder, keys, steps)


def _small(config: PreTrainedConfig) -> Decoder:
    """A random model with all layers, and one narrow head of the same dimension in each."""
    small = copy.deepcopy(config)
    dimension = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = {"hidden_size": dimension, "head_dim": dimension}
    sizes |= dict.fromkeys(ONE_HEAD, 1) | dict.fromkeys(NARROW, WIDTH) | dict.fromkeys(TOKENS, None)
    for name, size in sizes.items():
        if hasattr(small, name):
            setattr(small, name, size)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return find_decoder(AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval())
    except Exception as error:  # what a class needs besides is its own business
        raise ValueError(
            f"keys of {type(config).__name__} cannot be moved without its model ({error}); store the prefix moved: "
            "store.put(name, moved(prefix, model, prefix.length))"
        ) from error
