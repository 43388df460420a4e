"""Which model classes are served: the table that this package ships, and proofs that were made on this machine.

    admit(model, layout)    the table, else the user's cache, else a proof, whose verdict is kept
    served.json             verdicts for the causal language models of one release of transformers, written by
                            `make test-models`

A verdict holds for a class, a release of transformers and a kind of configuration (`tiny.kind_of`). One that is not in
the table holds for the source code of this folder as well, and for that of the class if it is not of transformers.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

import ctkernels
from ctkernels.tuning.hf.discover import Layout, unsupported
from ctkernels.tuning.hf.kinds import class_name, written_class
from ctkernels.tuning.hf.tiny import kind_of
from ctkernels.tuning.storage import OutputError, atomic_write_json

TABLE = Path(__file__).with_name("served.json")


@dataclass(frozen=True)
class Verdict:
    """What a proof has shown.

    reason: why it is refused; None if it is served.  differences: the largest one of each check, relative to the
    largest result.  effect: how much another context of the same length changes, and so would a mistake.
    """

    reason: str | None = None
    differences: Mapping[str, float] = field(default_factory=dict)
    effect: float = 0.0

    @property
    def difference(self) -> float:
        return max(self.differences.values(), default=0.0)


Prover = Callable[[type[PreTrainedModel], PreTrainedConfig, Layout], Verdict]
_provers: list[Prover] = []  # the one of proof.py, which attaches prefixes itself and so stands above this file
_verdicts: dict[str, Verdict] = {}  # of this process
_trusted = threading.local()


def register_prover(prover: Prover) -> None:
    """Say what proves a class."""
    _provers[:] = [prover]


@contextlib.contextmanager
def trusting() -> Iterator[None]:
    """Within the block models are served without a proof in this thread: for proofs themselves."""
    before = getattr(_trusted, "on", False)
    _trusted.on = True
    try:
        yield
    finally:
        _trusted.on = before


def admit(model: PreTrainedModel, layout: Layout) -> bool:
    """Whether `model` is served; False means that it was not asked, see `trusting`.

    Raises:
        TypeError: a class that is not served, or not with this configuration; the message says why.
    """
    if getattr(_trusted, "on", False):
        return False
    verdict = find_verdict(written_class(type(model)), model.config, layout)
    if verdict.reason is not None:
        raise unsupported(model, verdict.reason)
    return True


def find_verdict(model_class: type[PreTrainedModel], config: PreTrainedConfig, layout: Layout) -> Verdict:
    """From the table, from the cache, or by a proof."""
    try:
        kind = kind_digest(model_class, config, layout)
    except Exception as error:  # of whatever the class checks in its configurations
        return Verdict(f"no tiny instance of it can be made to prove it: {in_a_line(error)}")
    shipped = table().get(kind)
    if shipped is not None:
        return shipped
    key = digest([kind, transformers.__version__, ctkernels.__version__, _sources(), _own_source(model_class)])
    if key not in _verdicts:
        _verdicts[key] = _cached(key) or _proved(key, model_class, config, layout)
    return _verdicts[key]


def kind_digest(model_class: type[PreTrainedModel], config: PreTrainedConfig, layout: Layout) -> str:
    """What two models have in common that a verdict on one holds for the other. Raises what `kind_of` raises."""
    return digest([class_name(model_class), kind_of(config), layout.classes(), layout.looks])


@cache
def table() -> Mapping[str, Verdict]:
    """Verdicts of the shipped table by kind; none if it was made with another release of transformers."""
    content = shipped()
    if content["transformers"] != transformers.__version__:
        return {}
    rows = (row for entry in content["models"].values() for row in entry["configurations"])
    return {row["kind"]: Verdict(row["reason"]) for row in rows if row["kind"] is not None}


def shipped() -> dict[str, Any]:
    """The shipped table: `transformers`, its version, and `models` by model type: `class` and `configurations`, whose
    first is the default one. Each has `name`, `kind`, `reason` (None if it is served), `difference` and `effect`."""
    return dict(json.loads(TABLE.read_text(encoding="utf-8")))


def proved_here() -> list[dict[str, Any]]:
    """What was proved on this machine for the installed transformers: `class` and the fields of a `Verdict`."""
    found = []
    for path in sorted((cache_directory() / "proofs").glob("*.json")):
        with contextlib.suppress(OSError, ValueError):
            found.append(json.loads(path.read_bytes()))
    return [entry for entry in found if entry.get("transformers") == transformers.__version__]


def cache_directory() -> Path:
    """Where verdicts are kept: CTKERNELS_CACHE, or `ctkernels` in the user's cache directory."""
    own, general = os.environ.get("CTKERNELS_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else (Path(general) if general else Path.home() / ".cache") / "ctkernels"


def digest(value: Any) -> str:
    """Of JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def in_a_line(error: Exception) -> str:
    """Type and message of an exception."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _proved(key: str, model_class: type[PreTrainedModel], config: PreTrainedConfig, layout: Layout) -> Verdict:
    verdict = _provers[0](model_class, config, layout)
    about = {"class": class_name(model_class), "transformers": transformers.__version__}
    with contextlib.suppress(OSError, OutputError):  # a verdict that cannot be kept is found again
        atomic_write_json(_file(key), {**about, **asdict(verdict)})
    return verdict


def _cached(key: str) -> Verdict | None:
    try:
        kept = json.loads(_file(key).read_bytes())
        return Verdict(kept["reason"], kept["differences"], kept["effect"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _file(key: str) -> Path:
    return cache_directory() / "proofs" / f"{key}.json"


@cache
def _sources() -> str:
    """Digest of the code that serves models."""
    return digest([path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))])


@cache
def _own_source(model_class: type[PreTrainedModel]) -> str:
    """Digest of the files of a class and its ancestors that are not of transformers."""
    own = [kind for kind in model_class.__mro__ if not kind.__module__.startswith(("transformers.", "torch."))]
    texts = []
    for kind in own:
        with contextlib.suppress(OSError, TypeError):  # classes of a prompt, or built in
            texts.append(inspect.getsource(inspect.getmodule(kind) or kind))
    return digest(texts)
