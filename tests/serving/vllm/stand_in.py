"""vLLM's modules that the connector imports, and the part of its configuration that it reads: names, no behaviour."""

import enum
import sys
from types import ModuleType, SimpleNamespace


class Role(enum.Enum):
    SCHEDULER = 0
    WORKER = 1


class Base:
    def __init__(self, vllm_config, role, kv_cache_config):
        self._kv_transfer_config = vllm_config.kv_transfer_config

    def bind_connector_metadata(self, metadata):
        self._metadata = metadata

    def _get_connector_metadata(self):
        return self._metadata


def install(monkeypatch, rank: int = 0) -> None:
    """Put them in the place of vLLM's until the test ends."""
    log = SimpleNamespace(error=lambda *args, **options: None)
    parts = {
        "vllm": {},
        "vllm.logger": {"init_logger": lambda name: log},
        "vllm.distributed": {"get_tensor_model_parallel_rank": lambda: rank},
        "vllm.distributed.kv_transfer": {},
        "vllm.distributed.kv_transfer.kv_connector": {},
        "vllm.distributed.kv_transfer.kv_connector.v1": {},
        "vllm.distributed.kv_transfer.kv_connector.v1.base": {
            "KVConnectorBase_V1": Base,
            "KVConnectorMetadata": object,
            "KVConnectorRole": Role,
        },
    }
    for name, members in parts.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "ctkernels.serving.vllm.connector", raising=False)


def configuration(store, model, ranks: int = 1, block_size: int = 4, **changes) -> SimpleNamespace:
    """The part of vLLM's configuration that the connector reads."""
    import torch

    transfer = SimpleNamespace(
        kv_load_failure_policy="fail", kv_connector_extra_config={"store": str(store), "memory_bytes": 1 << 20}
    )
    parallel = SimpleNamespace(
        tensor_parallel_size=ranks,
        pipeline_parallel_size=1,
        decode_context_parallel_size=1,
        prefill_context_parallel_size=1,
    )
    about = SimpleNamespace(
        use_mla=False,
        dtype=torch.bfloat16,
        hf_config_path=None,
        model=str(model),
        revision=None,
        trust_remote_code=False,
    )
    whole = SimpleNamespace(
        kv_transfer_config=transfer,
        parallel_config=parallel,
        model_config=about,
        cache_config=SimpleNamespace(block_size=block_size),
        speculative_config=None,
    )
    for name, value in changes.items():
        part, _, field = name.partition("__")
        setattr(getattr(whole, part), field, value) if field else setattr(whole, part, value)
    return whole
