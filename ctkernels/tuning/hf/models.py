"""The parts of a transformers model that a prefix is attached to, and what its configuration says about them.

find_decoder(model) -> Decoder     read off the model (`discover.py`), of a class that is proved (`served.py`)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ctkernels.attention import MAX_HEAD_DIM
from ctkernels.tuning.hf.discover import ALIBI as ALIBI  # for those who ask how a decoder encodes positions
from ctkernels.tuning.hf.discover import (
    LAYER_INDEX,
    ROTARY_TABLE,
    Borrower,
    Layout,
    Shape,
    find_layout,
    first_position_id,
    positions_of,
    reach_of,
    shape_of,
    unsupported,
    widest_head,
)
from ctkernels.tuning.hf.discover import LEARNED as LEARNED
from ctkernels.tuning.hf.discover import ROTARY as ROTARY
from ctkernels.tuning.hf.kinds import Reach, written_class
from ctkernels.tuning.hf.protocols import Origin
from ctkernels.tuning.hf.served import admit


@dataclass(frozen=True)
class Family:
    """What kind of decoder it is. causal: the model's class.  positions: how it encodes them (see `positions_of`)."""

    causal: str
    positions: str


@dataclass(frozen=True)
class Decoder:
    """The parts of a model.

    model: the class with the head, or the base itself.  base: the module that owns the layers.  layers, attentions:
    the layers with attention, and that.  borrowers: those that read another one's keys and values, and so its prefix.
    shapes: of what each of `attentions` caches.  reaches: what their masks hide.  first_position_id: what the position
    of a sequence's first token is called.  wrapped: whether another model inside of `model` calls `base`, as vision
    models call a text decoder.  keepers: modules that keep a state (`states.py`).
    """

    family: Family
    model: PreTrainedModel
    base: PreTrainedModel
    layers: tuple[nn.Module, ...]
    attentions: tuple[nn.Module, ...]
    borrowers: tuple[Borrower, ...]
    shapes: tuple[Shape, ...]
    reaches: tuple[Reach, ...]
    first_position_id: int = 0
    wrapped: bool = False
    keepers: tuple[nn.Module, ...] = ()

    @property
    def config(self) -> PreTrainedConfig:
        return self.base.config

    @property
    def kv_heads(self) -> int:
        """Of the first layer."""
        return self.shapes[0].heads

    @property
    def head_dim(self) -> int:
        """Of the first layer's keys."""
        return self.shapes[0].key_dim

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def prefix_dtype(self) -> torch.dtype:
        """fp32 master keys and values, fp64 for an fp64 model."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def device(self) -> torch.device:
        """Where token ids enter."""
        embeddings: torch.Tensor = self.base.get_input_embeddings().weight
        return embeddings.device

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Where each layer's keys and values belong: with its weights, or where token ids enter if those are offloaded
        (on meta) and come when they are needed."""
        found = [next(attention.parameters()).device for attention in self.attentions]
        return tuple(self.device if device.type == "meta" else device for device in found)

    @property
    def context_limit(self) -> int | None:
        """Most positions the model declares, or None where it declares none (ALiBi)."""
        name = "max_seq_len" if self.family.positions == ALIBI else "max_position_embeddings"
        limit = getattr(self.config, name, None)
        return None if limit is None else limit - self.first_position_id

    @property
    def position_limit(self) -> int | None:
        """Positions that a table of them has, None without one."""
        tabled = self.family.positions == LEARNED or hasattr(self.attentions[0], ROTARY_TABLE)
        return self.context_limit if tabled else None

    @property
    def cache_indices(self) -> tuple[int, ...]:
        """Where in a cache each layer's keys and values are."""
        return tuple(next(getattr(x, name) for name in LAYER_INDEX if hasattr(x, name)) for x in self.attentions)


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside a peft model, a compiled one or a `DataParallel` of one device, or `model` itself.
    Adapters that change its layers stay in force.

    Raises:
        ValueError: peft puts virtual tokens in front of what the model is given (prompt tuning, prefix tuning). A
            prefix would lie before them, and its keys and values would not depend on them, as those of a context do.
            Or a `DataParallel` copies the model to several devices.
    """
    if "_orig_mod" in model._modules:  # torch.compile(model)
        return unwrap(model.get_submodule("_orig_mod"))
    if isinstance(model, nn.DataParallel):
        if len(model.device_ids) > 1:
            raise ValueError(
                f"DataParallel copies the model to {len(model.device_ids)} devices in every forward, and copies have "
                "no prefix; use its module: model.module"
            )
        return unwrap(model.module)
    if not hasattr(model, "get_base_model"):
        return model
    adapter = getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        raise ValueError(
            f"{type(model).__name__} has virtual tokens of its own ({adapter.peft_type.value}), which peft puts before "
            "a context and an attached prefix would put behind it; use its base model: model.get_base_model()"
        )
    return model.get_base_model()


def find_decoder(model: nn.Module) -> Decoder:
    """The parts of `model`, which may be wrapped, see `unwrap`.

    The first time that a class, or a kind of configuration of it, is met that ctkernels was not shipped with, it is
    proved, which takes some seconds (`proof.py`).

    Raises:
        TypeError: not a transformers model, or a class whose attention cannot be served, or whose proof failed; the
            message names the class and the reason.
        ValueError: a variant that is not served (cross attention, and the like); or as `unwrap`.
    """
    inner = unwrap(model)
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(inner).__name__}")
    known = _known.get(inner)
    settings = str([item for item in vars(inner.config).items() if not item[0].startswith("_attn_implementation")])
    parts = known.layout.parts(inner) if known is not None and known.settings == settings else None
    if known is None or parts is None:
        layout = find_layout(inner)
        parts = layout.parts(inner)
        known = _Known(
            layout,
            settings,
            Family(written_class(type(inner)).__name__, positions_of(inner, parts)),
            tuple(shape_of(attention, parts.base.config) for attention in parts.attentions),
            tuple(reach_of(parts.base, attention) for attention in parts.attentions),
            first_position_id(parts.base),
            layout.is_wrapped(inner),
        )
        widest = max(map(widest_head, parts.attentions, known.shapes))
        if widest > MAX_HEAD_DIM:
            raise unsupported(inner, f"it has heads of dimension {widest}; the kernels have them up to {MAX_HEAD_DIM}")
        _check_variant(inner, parts.base.config)
        if admit(inner, layout):
            _known[inner] = known
    *owning, keepers = parts
    found = known.shapes, known.reaches, known.first_position_id, known.wrapped
    return Decoder(known.family, inner, *owning, *found, keepers)


@dataclass(frozen=True)
class _Known:
    """What was found out about a model, for as long as it does not change."""

    layout: Layout
    settings: str
    family: Family
    shapes: tuple[Shape, ...]
    reaches: tuple[Reach, ...]
    first_position_id: int
    wrapped: bool


_known: weakref.WeakKeyDictionary[PreTrainedModel, _Known] = weakref.WeakKeyDictionary()


def _check_variant(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    name = type(model).__name__
    for field, why in (
        ("add_cross_attention", "only decoders without cross attention are supported"),
        ("use_bidirectional_attention", "only causal attention is supported"),
        ("slow_but_exact", "emulated tensor parallelism is not supported"),
    ):
        if getattr(config, field, False) not in (None, False, "vision"):  # vision: only between tokens of an image
            raise ValueError(f"{name} with config.{field}={getattr(config, field)}: {why}")


# Fields of a configuration that do not change what the weights make of tokens in a context: how it is trained and run,
# names and ids, and sizes of the vocabulary, which may grow behind a prefix.
_NO_ARCHITECTURE = {
    "vocab_size",
    "vocab_size_per_layer_input",
    "unpadded_vocab_size",
    "use_cache",
    "tie_word_embeddings",
    "pretraining_tp",
    "output_router_logits",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "router_jitter_noise",
    "initializer_range",
    "init_std",
    "initializer_factor",
    "gradient_checkpointing",
    "quantization_config",
    "num_logits_to_keep",
    "layerdrop",
}
_NO_ARCHITECTURE_ENDINGS = ("token_id", "token_ids", "token_index", "dropout", "_pdrop", "_dropout_prob")


def architecture(config: PreTrainedConfig) -> dict[str, Any]:
    """What a configuration says about the function that the weights compute, by field, as JSON values.

    Models of one architecture may read each other's prefixes. All fields that the class of the configuration declares
    count, multipliers, scales and lists of layers without positions among them, but those that change nothing; of a
    class that declares none, all that it has.
    """
    declares = "__dataclass_fields__" in vars(type(config))
    names = {f.name for f in dataclasses.fields(config)} if declares else {n for n in vars(config) if n[0] != "_"}
    names -= {f.name for f in dataclasses.fields(PreTrainedConfig)} | _NO_ARCHITECTURE
    counts = (name for name in names if not name.endswith(_NO_ARCHITECTURE_ENDINGS))
    values = {"model_type": config.model_type, **{name: vars(config).get(name) for name in sorted(counts)}}
    if config.is_heterogeneous:
        values["per_layer_config"] = config.to_dict()["per_layer_config"]
    nested = {name: architecture(x) for name, x in values.items() if isinstance(x, PreTrainedConfig)}
    return dict(json.loads(json.dumps({**values, **nested}, default=str)))


def other_architecture(made_for: Origin, own: PreTrainedConfig | Origin) -> str | None:
    """How a model, or that of another prefix, differs from the one that a prefix was made for, field by field; None if
    it does not.

    Fields that only one of the two knows are those of other releases of transformers, and do not count.
    """
    recorded, config = made_for.architecture, isinstance(own, PreTrainedConfig)
    fields = architecture(own) if config else own.architecture
    if not recorded or not fields:  # of an older file
        same = made_for.config_hash == (config_hash(own) if config else own.config_hash)
        return None if same else "another configuration, of which the prefix holds no more than a hash"
    names = [name for name in recorded if name in fields and recorded[name] != fields[name]]
    if "model_type" in names:
        names = ["model_type"]
    return ", ".join(f"{name} {_brief(fields[name])} instead of {_brief(recorded[name])}" for name in names) or None


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# What older files hold a hash of, instead of the architecture.
HASHED_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "ffn_dim",
    "n_inner",
    "word_embed_proj_dim",
    "max_position_embeddings",
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "layer_norm_epsilon",
    "layer_norm_eps",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "layer_types",
    "original_max_position_embeddings",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "do_layer_norm_before",
    "use_parallel_residual",
    "apply_residual_connection_post_layernorm",
    "use_bidirectional_attention",
)


def config_hash(config: PreTrainedConfig) -> str:
    """Hash of HASHED_FIELDS."""
    fields = {name: _field(config, name) for name in HASHED_FIELDS}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _field(config: PreTrainedConfig, name: str) -> Any:
    """Like `config.name`, but of a field that differs between layers what most of them have."""
    own = config.attribute_map.get(name, name)
    return vars(config)[own] if own in vars(config) else getattr(config, name, None)


def rope_switch(config: PreTrainedConfig, prefix_positions: int) -> int | None:
    """Position that rows after a prefix of `prefix_positions` must not pass, or None.

    "longrope" and "dynamic" scaling choose the rotary frequencies of all keys by the length of the sequence. Keys of a
    prefix were rotated when the sequence was the prefix, so a longer one would mix two rotations.
    """
    switches = []
    for parameters in _rope_parameters(getattr(config, "rope_parameters", None)):
        kind = parameters["rope_type"]
        if "dynamic" not in kind and kind != "longrope":
            continue
        at = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
        # longrope knows two sets of frequencies, and a prefix beyond the switch already has the second
        if kind != "longrope" or prefix_positions <= at:
            switches.append(at)
    return min(switches, default=None)


def _rope_parameters(parameters: Any) -> Iterator[Mapping[str, Any]]:
    """The rotary settings of a config: one set for all layers, or one for each layer type."""
    if isinstance(parameters, Mapping):
        if "rope_type" in parameters:
            yield parameters
        else:
            for value in parameters.values():
                yield from _rope_parameters(value)
