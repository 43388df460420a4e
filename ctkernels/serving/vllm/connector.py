"""The two halves of the connector: in vLLM's scheduler (which tokens to load) and in each worker (loading them).

    KVTransferConfig(kv_connector="PrefixConnector", kv_connector_module_path="ctkernels.serving.vllm.connector",
                     kv_role="kv_consumer", kv_connector_extra_config={"store": "prefixes"})

    store          folder of a PrefixStore
    memory_bytes   what a worker keeps of prefixes in host memory (default 1 GiB)
    weights        fingerprint of the model's weights as three values (whole, body, vocabulary); without it they are not
                   compared

Keys and values are written by the attention layer's own function, so that the layout of the cache, its type (fp8 too)
and its scales are vLLM's business.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import AutoConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.logger import init_logger

from ctkernels.serving.vllm.files import PrefixFiles, folder_of_store
from ctkernels.serving.vllm.loads import Load, Plan
from ctkernels.serving.vllm.memory import PrefixMemory, layers_of_rank, share
from ctkernels.serving.vllm.salts import MARK, Placed
from ctkernels.tuning.hf.fingerprint import Weights

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

logger = init_logger(f"vllm.{__name__}")  # vLLM shows what is below its own name
LAYER = re.compile(r"(?:^|\.)(\d+)\.")  # of its name, such as model.layers.3.self_attn.attn
MEMORY_BYTES = 1 << 30


@dataclass
class Loads(KVConnectorMetadata):
    """What the workers load before a step."""

    loads: list[Load] = field(default_factory=list)


class PrefixConnector(KVConnectorBase_V1):
    """Stored prefixes in the place of a prompt's first tokens.

    Raises:
        ValueError: a setting of vLLM that it does not work with, named.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._block_size: int = vllm_config.cache_config.block_size
        self._plan = Plan()
        self._failed: set[int] = set()  # blocks
        self._own: list[str] = []  # names of this rank's layers with a cache
        self._numbers: list[int] = []  # theirs in the model
        _check(vllm_config, kv_cache_config)
        if role is KVConnectorRole.WORKER:
            self._start_worker(vllm_config)

    def _start_worker(self, vllm_config: VllmConfig) -> None:
        extra, parallel = self._kv_transfer_config.kv_connector_extra_config, vllm_config.parallel_config
        weights = Weights(*extra["weights"]) if "weights" in extra else None
        config = text_config(vllm_config.model_config)
        self._files = PrefixFiles(folder_of_store(extra["store"]), config, weights)
        self._memory: PrefixMemory[Placed] = PrefixMemory(extra.get("memory_bytes", MEMORY_BYTES), self._read)
        self._whole = parallel.pipeline_parallel_size == 1
        self._ranks = parallel.tensor_parallel_size
        self._rank = get_tensor_model_parallel_rank()
        self._dtype = vllm_config.model_config.dtype

    # in the scheduler

    def on_new_request(self, request: Request) -> None:
        """Prompt log-probabilities make vLLM compute all tokens anew, placeholders too: such a request must fail."""
        if (request.cache_salt or "").startswith(MARK) and request.skip_reading_prefix_cache:
            request.skip_reading_prefix_cache = False
            self._plan.refuse(request.request_id, "prompt_logprobs cannot be had behind a prefix")

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many of a prefix's tokens vLLM does not have; they are loaded within the step."""
        counts = request.num_tokens, request.num_prompt_tokens, num_computed_tokens
        return self._plan.matched(request.request_id, request.cache_salt, *counts), False

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Note where they go."""
        if num_external_tokens > 0:
            self._plan.allocated(request.request_id, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Loads:
        """The loads of this step."""
        return Loads(self._plan.take())

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Its blocks may be freed at once."""
        self._plan.forget(request.request_id)
        return False, None

    # in a worker

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """Which layers of this rank have a cache."""
        found = {name: LAYER.search(name) for name in kv_caches}
        unknown = [name for name, number in found.items() if number is None]
        if unknown:
            raise ValueError(f"the model has a cache of which no prefix holds the keys: {unknown[0]}")
        self._own, self._numbers = list(found), [int(number[1]) for number in found.values() if number]

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Load the prefixes of this step. One that cannot be loaded fails its own requests and no other."""
        for load in self._get_connector_metadata().loads:
            try:
                self._load(load, forward_context.no_compile_layers)
            except Exception as error:  # anything else than a failed request would end the engine
                logger.error("request %s fails: %s", load.request, error, exc_info=not isinstance(error, ValueError))
                self._failed.update(load.touched(self._block_size))

    def _load(self, load: Load, layers: dict[str, Any]) -> None:
        if load.prefix is None or load.refused:
            raise ValueError(load.refused)
        pairs, slots = self._memory.get(load.prefix), load.slots(self._block_size)
        for name, pair in zip(self._own, pairs, strict=True):
            layer = layers[name]
            device = layer.kv_cache.device
            key, value = (x[load.first : load.first + load.count].to(device) for x in pair)
            if key.shape[1:] != (layer.num_kv_heads, layer.head_size):
                raise ValueError(
                    f"layer {name} has {layer.num_kv_heads} KV heads of dimension {layer.head_size}, the prefix "
                    f"{key.shape[1]} of {key.shape[2]}"
                )
            slots = slots.to(device)
            layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, slots)

    def _read(self, prefix: Placed) -> list[tuple[Tensor, Tensor]]:
        """This rank's part of a prefix, in the order of its layers."""
        found = self._files.read(prefix)

        def own(x: Tensor) -> Tensor:
            return share(x, self._rank, self._ranks, self._dtype)

        layers = layers_of_rank(len(found), self._numbers, self._whole)
        return [(own(found[at][0]), own(found[at][1])) for at in layers]

    def get_block_ids_with_load_errors(self) -> set[int]:
        """The blocks of requests that vLLM must fail."""
        failed, self._failed = self._failed, set()
        return failed

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: a step's loads are done before it begins."""

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""


def text_config(model_config: Any) -> Any:
    """The configuration of the engine's language model, as transformers reads it; vLLM may change its own copy."""
    config = AutoConfig.from_pretrained(
        model_config.hf_config_path or model_config.model,
        revision=model_config.revision,
        trust_remote_code=model_config.trust_remote_code,
    )
    text = config.get_text_config()
    text.name_or_path = model_config.model
    return text


def _check(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig | None) -> None:
    parallel, transfer = vllm_config.parallel_config, vllm_config.kv_transfer_config
    groups = [] if kv_cache_config is None else kv_cache_config.kv_cache_groups
    speculative = vllm_config.speculative_config
    faults = {
        "kv_load_failure_policy must be 'fail': recomputing would run placeholder tokens": (
            transfer.kv_load_failure_policy != "fail"
        ),
        "the cache has several groups of layers; give --disable-hybrid-kv-cache-manager": len(groups) > 1,
        "latent attention keeps no keys and values of heads": vllm_config.model_config.use_mla,
        "context parallelism spreads a prompt over ranks": max(
            parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size
        )
        > 1,
        "a draft model has layers that no prefix holds; use speculation by n-grams": (
            speculative is not None and speculative.method not in ("ngram", "suffix")
        ),
    }
    for fault, found in faults.items():
        if found:
            raise ValueError(f"vLLM cannot serve prefixes with these settings: {fault}")
