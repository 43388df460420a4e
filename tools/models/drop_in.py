#!/usr/bin/env python3
"""`attn_implementation="ctkernels"` on every causal-LM and encoder-decoder class of the installed transformers, against
what transformers would run by itself: tiny random models in fp64, no call too small for the op.

    python -m tools.models.drop_in                    all classes, a quarter of an hour; writes tools/models/results
    python -m tools.models.drop_in llama gemma4_text  prints what these give

Each class runs in a process of its own with a time limit. A class is right if logits, generated logits and gradients
are equal in every use that transformers serves, and refused in none of them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from ctkernels.testing.classes import COMPLETE, Case, build
from ctkernels.tuning.hf import IMPLEMENTATION, plain
from ctkernels.tuning.hf.exact import full_precision
from ctkernels.tuning.hf.tiny import make_tiny, shrink
from tools.models.page import write_page
from tools.models.sweeps import each_in_a_process, write_table

RESULTS = Path(__file__).parent / "results" / "drop_in.json"
SECONDS = 400  # most time for a class, on a busy machine
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}  # of the largest value
NEW = 5  # generated tokens
MOST_PARAMETERS = 20e6  # of a tiny model: more means sizes that `hf/tiny.py` does not know
NOT_BUILT = "not built"

Use = Callable[[PreTrainedModel], Tensor]


def classes() -> dict[str, tuple[str, bool]]:
    """Model type -> (class, whether it is an encoder-decoder)."""
    found = {kind: (name, True) for kind, name in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.items()}
    causal = {kind: (name, False) for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}
    both = {f"{kind} (decoder)": causal.pop(kind) for kind in set(found) & set(causal)}
    return dict(sorted({**found, **causal, **both}.items()))


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(seed))


def padding(S: int) -> dict[str, Tensor]:
    """Attention masks `[2, S]` whose second row is padded."""
    masks = {side: torch.ones(2, S, dtype=torch.int64) for side in ("left", "right", "holes")}
    masks["left"][1, :4] = masks["right"][1, -4:] = masks["holes"][1, [2, 4]] = 0
    return masks


def uses(pair: bool) -> Iterator[tuple[str, Use]]:
    """What is tried: name -> a function of the model."""
    give = _of_pair if pair else _of_decoder
    for S in (6, 24):
        yield f"plain {S}", give(S)
        for name, mask in padding(S).items():
            yield f"{name} {S}", give(S, attention_mask=mask)
    half = torch.arange(12).repeat(2)[None].expand(2, -1)
    if not pair:
        yield "packed", give(24, position_ids=half, use_cache=False)
        dense = torch.ones(24, 24, dtype=torch.bool).tril().expand(2, 1, 24, 24).clone()
        dense[:, :, 5:, 3] = False
        yield "4D mask", give(24, attention_mask=dense, use_cache=False)
    start = {"decoder_start_token_id": 1} if pair else {}
    yield "generate", _generate(**start)
    yield "static cache", _generate(cache_implementation="static", disable_compile=True, **start)
    yield "gradient", _gradient(pair)


def _of_decoder(S: int, **given: Any) -> Use:
    def run(model: PreTrainedModel) -> Tensor:
        with torch.no_grad():
            logits = model(input_ids=tokens(2, S), **given).logits
        mask = given.get("attention_mask")
        return logits[mask.bool()] if mask is not None and mask.dim() == 2 else logits

    return run


def _of_pair(S: int, **given: Any) -> Use:
    def run(model: PreTrainedModel) -> Tensor:
        with torch.no_grad():
            target = tokens(2, S, seed=2)
            mask = given.get("attention_mask", torch.ones_like(target))
            decoder = {"decoder_input_ids": target, "decoder_attention_mask": mask}
            logits = model(input_ids=tokens(2, S), **decoder, **given).logits
        return logits[mask.bool()]

    return run


def _generate(**settings: Any) -> Use:
    def run(model: PreTrainedModel) -> Tensor:
        settings.update(min_new_tokens=NEW, max_new_tokens=NEW, do_sample=False)
        settings.update(return_dict_in_generate=True, output_logits=True)
        out = model.generate(tokens(2, 14), attention_mask=padding(14)["left"], **settings)
        return torch.stack(out.logits, dim=1)

    return run


def _gradient(pair: bool) -> Use:
    def run(model: PreTrainedModel) -> Tensor:
        embeddings = model.get_input_embeddings()(tokens(2, 14)).detach().requires_grad_()
        target = {"decoder_input_ids": tokens(2, 9, seed=2)} if pair else {}
        mask = padding(14)["left"]
        logits = model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False, **target).logits
        (logits if pair else logits[mask.bool()]).square().mean().backward()
        return embeddings.grad[mask.bool()]

    return run


def sweep(kind: str) -> dict[str, Any]:
    """Everything about one class."""
    with full_precision():
        result = _sweep(kind, torch.float64)
    return result if result["verdict"] != BOTH else _sweep(kind, torch.float32)  # a class that wants fp32


def tiny_of(kind: str) -> PreTrainedModel:
    """A tiny random fp64 model of a model type of `classes`. Raises whatever its class says of its configuration."""
    name, pair = classes()[kind]
    model_type = kind.removesuffix(" (decoder)")
    complete = COMPLETE.get(model_type, {})
    model_class, config = build(Case(model_type, "default", name, complete))
    config = shrink(CONFIG_MAPPING[model_type](**complete) if pair else config)
    for each in (config, *(getattr(config, sub) for sub in config.sub_configs)):
        if each is not None:
            each._attn_implementation = None  # transformers chooses
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in model_class(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"it would have {count / 1e6:.0f} million parameters")
    return make_tiny(model_class, config)


def _sweep(kind: str, dtype: torch.dtype) -> dict[str, Any]:
    name, pair = classes()[kind]
    try:
        model = tiny_of(kind).to(dtype)
    except Exception as error:
        return {"class": name, "verdict": NOT_BUILT, "why": _short(error)}
    expected = dict(_results(model, pair))
    through: set[str] = set()
    with _every_call_to_the_op(through):
        model.set_attn_implementation(IMPLEMENTATION)
        actual = dict(_results(model, pair))
    through |= {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")}
    found = {use: compare(actual[use], expected[use]) for use in expected}
    numbers = [x for x in found.values() if isinstance(x, float)]
    verdict = "right" if numbers else BOTH
    if any(isinstance(x, str) and x.startswith(REFUSED) for x in found.values()):
        verdict = "refused"
    if not all(x <= TOLERANCE[model.dtype] for x in numbers):
        verdict = "wrong"
    return {
        "class": name,
        "verdict": verdict,
        "through": sorted(through - {IMPLEMENTATION}),
        "largest": float(f"{max(numbers):.0e}") if numbers else None,
        **({} if numbers else {"why": next(x for x in expected.values() if isinstance(x, str))}),
        "uses": {use: x if isinstance(x, str) else float(f"{x:.1e}") for use, x in found.items()},
    }


BOTH, REFUSED, ALONE = "both refuse", "refused", "runs where transformers does not"


def compare(actual: Tensor | str, expected: Tensor | str) -> float | str:
    """The largest difference as a fraction of the largest value, or in words which of the two is an error."""
    if isinstance(expected, str):
        return BOTH if isinstance(actual, str) else ALONE
    if isinstance(actual, str):
        return f"{REFUSED}: {actual}"
    if actual.shape != expected.shape:
        return float("inf")
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    difference = torch.where(same, 0.0, (actual - expected).double()).abs().max()
    return float(difference / expected.nan_to_num(0, 0, 0).abs().max().clamp(min=1e-9))


def _results(model: PreTrainedModel, pair: bool) -> Iterator[tuple[str, Tensor | str]]:
    for name, use in uses(pair):
        torch.manual_seed(0)
        try:
            yield name, use(model)
        except Exception as error:
            yield name, _short(error)


@contextmanager
def _every_call_to_the_op(through: set[str]) -> Iterator[None]:
    """No call is too small; what serves one is added to `through`."""
    op, stock = plain.prefix_attention, plain.stock_function

    def counted_op(*args: Any, **kwargs: Any) -> Any:
        through.add("op")
        return op(*args, **kwargs)

    def counted_stock(module: torch.nn.Module, name: str) -> Any:
        through.add(name)
        return stock(module, name)

    with (
        mock.patch.object(plain, "SMALL", dict.fromkeys(plain.SMALL, 0)),
        mock.patch.object(plain, "FEW_KEYS", 0),
        mock.patch.object(plain, "prefix_attention", counted_op),
        mock.patch.object(plain, "stock_function", counted_stock),
    ):
        yield


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="model types; default: all")
    kinds = parser.parse_args().kinds
    results = {}
    for kind, answer in each_in_a_process(sweep, kinds or list(classes()), SECONDS):
        result = answer or {"class": classes()[kind][0], "verdict": NOT_BUILT, "why": f"no answer in {SECONDS} s"}
        results[kind] = result
        print(kind, json.dumps(result if kinds else {k: v for k, v in result.items() if k != "uses"}), flush=True)
    bad = [kind for kind, result in results.items() if result["verdict"] in ("wrong", "refused")]
    if not kinds:
        versions = {name: importlib.metadata.version(name) for name in ("transformers", "torch")}
        rows = {kind: {k: v for k, v in result.items() if k != "uses"} for kind, result in results.items()}
        write_table(RESULTS, {"versions": versions}, "classes", rows)
        write_page()
    sys.exit(f"not right: {bad}" if bad else 0)


if __name__ == "__main__":
    main()
