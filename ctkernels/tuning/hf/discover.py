"""Where the decoder, its layers and their attention are in a transformers model, read off the model itself.

    attention   modules whose forward looks up transformers' table of attention functions, the registry
    base        the PreTrainedModel that owns them: it gets token ids, positions and the mask
    layers      the elements of its ModuleList that hold them
    shapes      KV heads and head dimensions of what each attention caches
    positions   rotary, learned, ALiBi or none, and what the first token's position is called

What is found here is an assumption. A class is served only after its proof (`proof.py`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from dis import get_instructions
from functools import cache
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ctkernels.tuning.hf.kinds import Reach, class_name, is_latent, written_class
from ctkernels.tuning.hf.numbering import own_table
from ctkernels.tuning.hf.own import OWN, Own

LEARNED, ROTARY, ALIBI, NONE = "learned", "rotary", "alibi", "none"
REGISTRY = "ALL_ATTENTION_FUNCTIONS"  # the name of the table in modeling files
ROTARY_TABLE = "embed_positions"  # sines and cosines of each position, in attention that has no rotary_emb
# attention that calls the registry twice, with either half of its values' heads in place of both
TWO_HALVES = {"transformers.models.diffllama.modeling_diffllama.DiffLlamaAttention"}
# methods of caches that keep states (states.py)
KEEPS_STATE = frozenset({"update_conv_state", "update_recurrent_state"})
CACHE_ARGUMENTS = frozenset({"past_key_values", "cache_params"})  # what modules that keep states call the cache
# and what else is neither keys nor values
KEEPS_MORE = frozenset({"set_linear_cache", "update_indexer", "update_index", "store_compression_weights"})
LAYER_INDEX = ("layer_idx", "layer_id", "layer_number")  # what a layer and its attention call their place
PLACES = (*LAYER_INDEX, "num_fwd_mem_blocks", "block_id")  # and more that differs in models of another depth alone
CROSS_ATTENTION = re.compile(r"cross|encoder_attn")  # paths of what reads other things than a decoder's own tokens
IN_LIST = re.compile(r"(?P<stack>.+?)\.(?P<index>\d+)(\.|$)")


class Shape(NamedTuple):
    """Of a layer's keys `[heads, P, key_dim]` and values `[heads, P, value_dim]`."""

    heads: int
    key_dim: int
    value_dim: int


Look = tuple[tuple[str, str], ...]  # (name, value) of the settings of a layer


@dataclass(frozen=True)
class Layout:
    """Where the parts are. base, stack: paths in the model of the owner of the layers and of the ModuleList, which has
    `count` elements.  attentions: of each attention, the index of its layer there, its path in it and its class.
    bare: names of the classes of elements without attention.  looks: what is set on each kind of layer and
    its attention, by name.  keepers: path in the model and class of each module that keeps a state."""

    base: str
    stack: str
    count: int
    attentions: tuple[tuple[int, str, type[nn.Module]], ...]
    bare: tuple[str, ...]
    looks: tuple[Look, ...]
    keepers: tuple[tuple[str, type[nn.Module]], ...] = ()

    def parts(self, model: nn.Module) -> Parts | None:
        """The modules, or None if the model has changed since."""
        try:
            base, stack = model.get_submodule(self.base), model.get_submodule(self.stack)
            layers = tuple(stack[index] for index, *_ in self.attentions)
            paths = (path for _, path, _ in self.attentions)
            attentions = tuple(attrgetter(path)(layer) for path, layer in zip(paths, layers, strict=True))
            keepers = tuple(model.get_submodule(path) for path, _ in self.keepers)
        except (AttributeError, IndexError):
            return None
        same = len(stack) == self.count and all(
            type(attention) is kind for attention, (_, _, kind) in zip(attentions, self.attentions, strict=True)
        )
        same = same and all(type(keeper) is kind for keeper, (_, kind) in zip(keepers, self.keepers, strict=True))
        return _parts(base, layers, attentions, keepers) if same else None

    def is_wrapped(self, model: nn.Module) -> bool:
        """Whether another model than `model` itself calls the one that owns the layers, and may make masks for it."""
        path = self.base.split(".")
        between = (model.get_submodule(".".join(path[:depth])) for depth in range(1, len(path)))
        return any(isinstance(module, PreTrainedModel) for module in between)

    def classes(self) -> list[str]:
        """Names of the classes of attention, of what keeps states, and of layers without attention."""
        return sorted({*(class_name(kind) for *_, kind in (*self.attentions, *self.keepers)), *self.bare})


class Borrower(NamedTuple):
    """A layer whose attention reads keys and values that another one has made; which, as an index among those."""

    layer: nn.Module
    attention: nn.Module
    source: int


class Parts(NamedTuple):
    """The modules of a `Layout`. layers, attentions: those that make keys and values, and so have a prefix."""

    base: PreTrainedModel
    layers: tuple[nn.Module, ...]
    attentions: tuple[nn.Module, ...]
    borrowers: tuple[Borrower, ...]
    keepers: tuple[nn.Module, ...]


def _parts(
    base: PreTrainedModel,
    layers: tuple[nn.Module, ...],
    attentions: tuple[nn.Module, ...],
    keepers: tuple[nn.Module, ...],
) -> Parts:
    if not getattr(base.config, "num_kv_shared_layers", None):
        return Parts(base, layers, attentions, (), keepers)
    own: list[tuple[nn.Module, nn.Module]] = []
    borrowers, latest = [], dict[str | None, int]()  # by kind of layer
    for layer, attention in zip(layers, attentions, strict=True):
        kind = getattr(attention, "layer_type", None)
        if getattr(attention, "is_kv_shared_layer", False):
            if kind not in latest:
                raise unsupported(base, "it reads keys and values that another model has made")
            borrowers.append(Borrower(layer, attention, latest[kind]))
        else:
            latest[kind] = len(own)
            own.append((layer, attention))
    owning = tuple(layer for layer, _ in own), tuple(attention for _, attention in own)
    return Parts(base, *owning, tuple(borrowers), keepers)


def find_layout(model: PreTrainedModel) -> Layout:
    """Raises TypeError: a model without one decoder whose attention can be reached; the message says why."""
    owners: dict[str, dict[str, nn.Module]] = {}
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            prefix = f"{path}." if path else ""
            own = {at: child for at, child in _own_modules(module, prefix) if _reads_own_tokens(at, child)}
            if own:
                owners[path] = own
    if len(owners) > 1:  # such as the towers of other modalities
        decoder = model.get_decoder()
        owners = {path: own for path, own in owners.items() if model.get_submodule(path) is decoder} or owners
    if not owners:
        raise unsupported(model, _without_registry(model))
    if len(owners) > 1:
        kinds = (type(model.get_submodule(path)).__name__ for path in owners)
        raise unsupported(model, f"it has several decoders ({', '.join(kinds)})")
    base, own = next(iter(owners.items()))
    inside = [(path, m) for path, m in model.get_submodule(base).named_modules(prefix=base)]
    more = dict.fromkeys(type(m).__name__ for _, m in inside if keeps(type(m), KEEPS_MORE))
    if more:
        raise unsupported(model, f"it caches more than a prefix holds ({', '.join(more)})")
    keepers = {path: m for path, m in inside if keeps(type(m), KEEPS_STATE)}
    for keeper in keepers.values():
        if CACHE_ARGUMENTS.isdisjoint(inspect.signature(keeper.forward).parameters):
            raise unsupported(model, f"its {type(keeper).__name__} keeps a state in no cache that it is given")
    places = {path: IN_LIST.match(path) for path in own}
    stacks = sorted({place["stack"] if place else path for path, place in places.items()})
    if len(stacks) > 1 or not all(places.values()):
        raise unsupported(model, f"it keeps its layers in several places ({', '.join(stacks)})")
    stack = model.get_submodule(stacks[0])
    at = {path: int(place["index"]) for path, place in places.items() if place}
    ordered = sorted(own, key=at.__getitem__)  # of several in one layer, the first comes first
    looks = {_look(stack[at[path]], own[path]) for path in ordered}
    looks |= {_look(keeper, keeper) for keeper in keepers.values()}
    return Layout(
        base,
        stacks[0],
        len(stack),
        tuple((at[path], path.removeprefix(f"{stacks[0]}.{at[path]}."), type(own[path])) for path in ordered),
        tuple(type(layer).__name__ for index, layer in enumerate(stack) if index not in at.values()),
        tuple(sorted(looks)),
        tuple((path, type(keeper)) for path, keeper in keepers.items()),
    )


def unsupported(model: nn.Module, why: str) -> TypeError:
    """The error that says why no prefix can be attached to a model."""
    return TypeError(f"model class {written_class(type(model)).__name__} is not supported: {why}")


@cache
def calls_registry(kind: type[nn.Module]) -> bool:
    """Whether the forward of a module class, or of one that it is made from, looks up the registry."""
    forwards = (vars(each)["forward"] for each in kind.__mro__ if "forward" in vars(each))
    codes = (getattr(inspect.unwrap(forward), "__code__", None) for forward in forwards)
    return any(code is not None and REGISTRY in code.co_names for code in codes)


@cache
def passes_keywords(layer: type[nn.Module]) -> bool:
    """Whether the forward of a layer class makes use of further keyword arguments that it is given."""
    code = inspect.unwrap(layer.forward).__code__
    if not code.co_flags & inspect.CO_VARKEYWORDS:
        return False
    name = inspect.getargs(code).varkw
    return any(i.opname.startswith("LOAD") and name in (i.argval, *_pair(i.argval)) for i in get_instructions(code))


def _pair(names: object) -> tuple[object, ...]:
    """Names of an instruction that loads two."""
    return names if isinstance(names, tuple) else ()


@cache
def keeps(kind: type[nn.Module], methods: frozenset[str]) -> bool:
    """Whether a module class calls one of these methods of a cache."""
    if kind.__module__.startswith("torch."):
        return False
    codes = (getattr(inspect.unwrap(x), "__code__", None) for x in vars(kind).values() if inspect.isfunction(x))
    return any(not methods.isdisjoint(code.co_names) for code in codes if code is not None)


def own_attention(attention: nn.Module) -> Own | None:
    """How the core of an attention that does not call the registry is reached; None for all others."""
    names = (class_name(kind) for kind in type(attention).__mro__)
    return next((OWN[name] for name in names if name in OWN), None)


@cache
def attends_in_halves(attention: type[nn.Module]) -> bool:
    """Whether a class of attention is one of TWO_HALVES."""
    return any(class_name(kind) in TWO_HALVES for kind in attention.__mro__)


def positions_of(model: PreTrainedModel, parts: Parts) -> str:
    """How a decoder encodes positions: LEARNED (a table of them, also a fixed one), ROTARY, ALIBI or NONE.

    Raises:
        TypeError: they are computed where a prefix cannot shift them.
    """
    base, own = parts.base, own_attention(parts.attentions[0])
    if own is not None and own.slopes is not None:
        return ALIBI
    if getattr(base.config, "alibi", False):
        raise unsupported(model, "it rounds its position bias (ALiBi) to bfloat16, which the kernels do not")
    if own_table(base) is not None:
        return LEARNED
    if "position_ids" not in inspect.signature(base.forward).parameters:
        raise unsupported(model, f"its {type(base).__name__} takes no position_ids, which a prefix has to shift")
    if any(path.rpartition(".")[2] == "rotary_emb" for path, _ in base.named_modules()):
        return ROTARY
    if hasattr(parts.attentions[0], ROTARY_TABLE):
        return ROTARY
    limit, inputs = getattr(base.config, "max_position_embeddings", None), base.get_input_embeddings()
    tables = [m.weight for m in base.modules() if isinstance(m, nn.Embedding) and m is not inputs]
    tables += [m.weights for m in base.modules() if isinstance(getattr(m, "weights", None), Tensor)]  # sinusoidal ones
    return LEARNED if limit is not None and any(len(table) >= limit for table in tables) else NONE


def first_position_id(base: PreTrainedModel) -> int:
    """The position id of a sequence's first token: 0, but in RoBERTa and its relatives the one behind the padding's."""
    for module in base.children():
        if hasattr(module, "create_position_ids_from_inputs_embeds"):
            return int(module.padding_idx) + 1
    return 0


def widest_head(attention: Any, shape: Shape) -> int:
    """The largest head dimension that its attention function gets; shape: what it caches."""
    if is_latent(attention):
        return max(attention.qk_head_dim, attention.v_head_dim)
    return max(shape.key_dim, shape.value_dim)


def shape_of(attention: Any, config: PreTrainedConfig) -> Shape:
    """The shape of what a layer's attention caches, as its class usually says it; the proof compares."""
    if is_latent(attention):  # in place of keys the latents, in place of values the part of keys that is rotated
        return Shape(1, attention.kv_lora_rank, attention.qk_rope_head_dim)
    heads = config.num_attention_heads
    own = {name: getattr(attention, name, None) for name in ("head_dim", "v_head_dim")}
    key_dim = own["head_dim"] or getattr(config, "head_dim", None) or config.hidden_size // heads
    projection = getattr(attention, "k_proj", None)
    core = own_attention(attention)
    if core is not None and core.kv_heads is not None:
        kv_heads = core.kv_heads(attention)
    elif hasattr(projection, "out_features"):
        kv_heads = projection.out_features // key_dim
    else:
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return Shape(kv_heads, key_dim, own["v_head_dim"] or key_dim)


def reach_of(base: PreTrainedModel, attention: nn.Module) -> Reach:
    """Windows and chunks that `base` puts into the mask of a layer without its attention passing them on, and whether
    that scales queries."""
    makes = inspect.unwrap(type(base).forward).__code__.co_names
    kinds = getattr(base.config, "layer_types", None)
    if kinds and attention.layer_idx is None:
        raise unsupported(base, f"several of its layers share one {type(attention).__name__}")
    kind = kinds[attention.layer_idx] if kinds else None
    tempered = bool(getattr(attention, "attn_temperature_tuning", False)) and not attention.use_rope  # Llama 4
    if "create_chunked_causal_mask" in makes and kind == "chunked_attention":
        return Reach(None, base.config.attention_chunk_size, tempered)
    windowed = "create_sliding_window_causal_mask" in makes and kind in ("sliding_attention", None)
    if windowed and not names_keyword(type(attention), "sliding_window"):
        return Reach(base.config.sliding_window, None, tempered)
    return Reach(tempered=tempered)


@cache
def names_keyword(kind: type[nn.Module], name: str) -> bool:
    """Whether the forward of a module class calls something with a keyword argument of that name."""
    constants = inspect.unwrap(kind.forward).__code__.co_consts
    return any(name in names for names in constants if isinstance(names, tuple))


def _look(layer: nn.Module, attention: nn.Module) -> Look:
    """What is set on a layer and its attention: switches and names as they are, of numbers whether they are 0, 1, more
    or less. Layers that look alike compute alike."""
    settings = {
        f"{kind}.{name}": x for kind, m in (("", layer), ("attention", attention)) for name, x in vars(m).items()
    }
    return tuple(sorted((name, _bucket(x)) for name, x in settings.items() if _counts(name, x)))


def _counts(name: str, value: object) -> bool:
    own = name.partition(".")[2]
    passing = own.startswith("_") or "drop" in own or own in ("training", "gradient_checkpointing", *PLACES)
    return not passing and (value is None or isinstance(value, (bool, int, float, str)))


def _bucket(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return repr(value)
    return str(int(value)) if value in (0, 1) else "more" if value > 0 else "less"


def _own_modules(owner: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules below `owner`, by path, that are not below another PreTrainedModel."""
    for name, child in owner.named_children():
        if not isinstance(child, PreTrainedModel):
            yield prefix + name, child
            yield from _own_modules(child, f"{prefix}{name}.")


def _reads_own_tokens(path: str, module: nn.Module) -> bool:
    known = calls_registry(type(module)) or own_attention(module) is not None
    return known and getattr(module, "is_causal", True) is not False and not CROSS_ATTENTION.search(path)


def _without_registry(model: PreTrainedModel) -> str:
    """Why no attention was found, in words."""
    both_ways = [m for m in model.modules() if calls_registry(type(m)) and getattr(m, "is_causal", True) is False]
    kinds = dict.fromkeys(type(m).__name__ for m in model.modules() if "Attention" in type(m).__name__)
    inside = {type(m).__name__ for m in model.modules() for found in m.modules() if found in set(both_ways)}
    own = [kind for kind in kinds if kind not in inside]
    if both_ways and not own:
        return f"its attention is not causal ({type(both_ways[0]).__name__}.is_causal is False)"
    if own:
        return f"it computes attention itself ({', '.join(own)}) instead of calling transformers' attention functions"
    return "it has no attention whose keys and values could be a prefix"
