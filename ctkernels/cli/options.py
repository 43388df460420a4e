"""What the commands can be told: flat settings, as flags or as keys of a YAML file.

`--lr 1e-3` on the command line is `lr: 1e-3` in the file; flags win over the file. An unknown key or flag is refused
with the nearest valid name.
"""

from __future__ import annotations

import contextlib
import difflib
import enum
import io
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from ctkernels.tuning.data.demonstrations import Demonstration, load_jsonl, load_metaicl
from ctkernels.tuning.data.formats import TextFormat
from ctkernels.tuning.train.settings import TrainSettings


class UsageError(ValueError):
    """A wrong command line or configuration file; the message is one line."""


class FailedRun(Exception):
    """A run that could not do all it was asked for; the message is one line."""


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is run."""

    model: str = ""
    """Directory or hub id of a causal language model with its tokenizer (required)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights; auto is the checkpoint's own."""
    device: str = "cpu"
    """Torch device, such as cpu or cuda:0."""
    threads: int | None = None
    """CPU threads; default: torch's choice."""


@dataclass(frozen=True)
class DataOptions:
    """The task: one JSONL file per split, or a folder in the MetaICL layout with task and seed."""

    train: Path | None = None
    """JSONL of the demonstrations: input, output and perhaps options on each line."""
    metaicl: Path | None = None
    """Folder with TASK/TASK_SHOTS_SEED_{train,dev,test}.jsonl, instead of JSONL files."""
    task: str = ""
    """Task in the MetaICL folder."""
    task_seed: int = 100
    """Seed in the MetaICL file names."""
    shots: int = 16
    """Shots in the MetaICL file names."""
    delimiter: str = " "
    """Text between input and output and between demonstrations; must be exactly one token."""
    max_pair_tokens: int = 256
    """Most tokens of one input/output pair; a longer input loses its end."""
    bos: bool | None = None
    """Start with the BOS token; default: as the tokenizer does."""

    def text_format(self) -> TextFormat:
        """How pairs become tokens."""
        return TextFormat(self.delimiter, self.max_pair_tokens, self.bos)

    def load(self, split: Literal["train", "test"], file: Path | None) -> list[Demonstration]:
        """The pairs of a split, from `file` or the MetaICL folder."""
        if (file is None) == (self.metaicl is None):
            raise UsageError(f"give either {split} (a JSONL file) or metaicl (a folder), and not both")
        if file is not None:
            return load_jsonl(file)
        if not self.task:
            raise UsageError("metaicl needs task, the name of one of its tasks")
        return load_metaicl(self.metaicl or "", self.task, self.task_seed, split, self.shots)


@dataclass(frozen=True)
class Preset:
    """Settings of the method; what is not given is the method's default."""

    preset: str | None = None
    """The paper's settings for a benchmark: nlp-lr, mmlu, bbh or arc."""

    def settings(self, method: str) -> TrainSettings:
        """The settings of `method`, those of the preset and the given ones in their place. Raises ValueError."""
        from ctkernels.tuning.methods import get_method

        return get_method(method).settings(self.preset, **self.given())

    def settings_of_each(self, methods: Sequence[str]) -> dict[str, TrainSettings]:
        """The settings of several methods, each with the given ones that it reads.

        Raises:
            ValueError: a given setting that none of them reads.
        """
        from ctkernels.tuning.methods import get_method

        given, table = self.given(), {name: get_method(name) for name in methods}
        unread = [name for name in given if table and not any(name in method.reads for method in table.values())]
        if unread:
            raise UsageError(f"none of {', '.join(table)} reads {', '.join(unread)}")
        return {
            name: method.settings(self.preset, **{key: given[key] for key in given if key in method.reads})
            for name, method in table.items()
        }

    def given(self) -> dict[str, Any]:
        """The settings that were given, by name."""
        values = {f.name: getattr(self, f.name) for f in fields(TrainSettings)}
        return {name: value for name, value in values.items() if value is not Unset.DEFAULT}


class Unset(enum.Enum):
    """A setting that was not given. None is a value of some settings."""

    DEFAULT = enum.auto()


# a flag for every setting, without a default of its own; help texts come from the docstring
TrainOptions = make_dataclass(
    "TrainOptions",
    [(name, kind | Unset, field(default=Unset.DEFAULT)) for name, kind in get_type_hints(TrainSettings).items()],
    bases=(Preset,),
    frozen=True,
)
TrainOptions.__doc__ = re.sub(r"(?m)^( {8}\w+: )(\w)", lambda m: m[1] + m[2].upper(), TrainSettings.__doc__ or "")


@dataclass(frozen=True)
class TuneConfig(TrainOptions, DataOptions, ModelOptions):
    """Adapt a model to the demonstrations of a task and save the adapter.

    Writes OUT/prefix (the prefix, and what else the method made), OUT/history.json (loss, learning rate, gradient norm
    and seconds per epoch), OUT/config.yaml (these settings) and OUT/checkpoint. `--config FILE` reads settings from a
    YAML file; flags win.
    """

    out: Path | None = None
    """Folder of the results (required)."""
    method: str = "ct-kv"
    """zero-shot, icl, prompt-tuning, prefix-tuning, ipt, ct-prompt, ct-kv, ttt, ttt+ct-kv, deep-thinking or cpt."""
    start_from: Path | None = None
    """Folder of another task's adapter (OUT/prefix of its run) to start from."""
    checkpoint_every: int = 5
    """Replace the checkpoint after so many epochs."""
    resume: bool = False
    """Continue from OUT/checkpoint, if there is one; the result has the same bits as an uninterrupted run."""


@dataclass(frozen=True)
class EvalConfig(TrainOptions, DataOptions, ModelOptions):
    """Evaluate methods or saved prefixes on the test items of a task.

    Items with options are scored by option loss (macro-F1 or accuracy as in MetaICL), others by greedy generation and
    exact match. Prints a table; `--out FILE.json` also writes the scores with all predictions. `--config FILE` reads
    settings from a YAML file; flags win. Many tasks and seeds at once: `ctkernels eval --suite SUITE --help`.
    """

    test: Path | None = None
    """JSONL of the test items."""
    methods: tuple[str, ...] = ()
    """Methods to run and evaluate (see `ctkernels tune --help`); all but zero-shot need demonstrations."""
    prefix: tuple[Path, ...] = ()
    """Folders of saved prefixes to evaluate, with the text format they were tuned with."""
    by: Literal["options", "generation"] | None = None
    """How to evaluate; default: by options if every item has some."""
    max_new_tokens: int = 32
    """Longest generated answer."""
    limit: int | None = None
    """Evaluate only the first so many items."""
    out: Path | None = None
    """JSON file of the scores."""


@dataclass(frozen=True)
class ExportConfig(ModelOptions):
    """Write a saved adapter in peft's format, which `PeftModel.from_pretrained` loads.

    The model is needed only for a prefix whose rows do not begin right behind it.
    """

    adapter: Path | None = None
    """Folder of a saved adapter or prefix (required)."""
    out: Path | None = None
    """Folder for peft (required)."""
    kind: Literal["cartridge", "prefix-tuning", "prompt-tuning", "lora"] | None = None
    """What to write; default: prompt-tuning for a soft prompt, else cartridge. Required for a LoRA update."""


@dataclass(frozen=True)
class ImportConfig(ModelOptions):
    """Read an adapter that peft saved (CARTRIDGE, PREFIX_TUNING, PROMPT_TUNING or LORA) and save it as ours."""

    adapter: Path | None = None
    """Folder that peft wrote (required)."""
    out: Path | None = None
    """Folder of the adapter (required)."""


Config = TypeVar("Config", bound=ModelOptions)


def parse(kind: type[Config], prog: str, argv: Sequence[str]) -> Config:
    """A configuration from flags and, with `--config FILE`, a YAML file below them.

    Raises:
        UsageError: an unknown flag or key, a value of the wrong type, or a file that is not a flat mapping.
        SystemExit: with status 0, after --help.
    """
    import tyro

    file, flags = take_config_flag(list(argv))
    arguments = _spell_none((yaml_arguments(kind, file) if file else []) + flags)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            config, unknown = tyro.cli(kind, prog=prog, args=arguments, return_unknown_args=True)
    except SystemExit as stop:
        if stop.code:
            raise UsageError(_first_sentence(complaint.getvalue())) from None
        raise
    if unknown:
        name = unknown[0].split("=")[0]
        if not name.startswith("--"):
            raise UsageError(f"unexpected argument {name!r}")
        raise UsageError(f"unknown option {name}{_nearest(name[2:].replace('-', '_'), kind, '--')}")
    return config


def read_yaml(path: str) -> dict[str, Any]:
    """The names and values of a YAML file.

    Raises:
        UsageError: a file that cannot be read, or that is no mapping.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path} must map names to values, got {type(values).__name__}")
    return values


def yaml_arguments(kind: type, path: str) -> list[str]:
    """The keys of a YAML file as command-line arguments, so that one parser types and checks both."""
    values = read_yaml(path)
    types = get_type_hints(kind)
    names = {f.name for f in fields(kind)}
    arguments: list[str] = []
    for key, value in values.items():
        if key not in names:
            raise UsageError(f"{path}: unknown key {key!r}{_nearest(str(key), kind, '')}")
        if isinstance(value, dict):
            raise UsageError(f"{path}: {key} must be a plain value, got a mapping")
        if value is None and type(None) not in get_args(types[key]):
            continue  # the default
        if types[key] is bool and isinstance(value, bool):
            arguments.append(f"--{key}" if value else f"--no_{key}")
        elif isinstance(value, list):
            arguments += [f"--{key}", *map(str, value)]
        else:
            arguments.append(f"--{key}={value}")
    return arguments


def as_yaml(config: ModelOptions) -> str:
    """The configuration as a YAML file that `--config` accepts."""
    import yaml

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    given = {name: plain(value) for name, value in asdict(config).items() if value is not Unset.DEFAULT}
    return yaml.safe_dump(given, sort_keys=False)


def take_config_flag(argv: list[str]) -> tuple[str | None, list[str]]:
    """The file of `--config FILE`, if it is there, and the other arguments."""
    for i, arg in enumerate(argv):
        if arg.startswith("--config="):
            return arg.removeprefix("--config="), argv[:i] + argv[i + 1 :]
        if arg == "--config":
            if i + 1 == len(argv):
                raise UsageError("--config needs a file")
            return argv[i + 1], argv[:i] + argv[i + 2 :]
    return None, argv


def _spell_none(arguments: list[str]) -> list[str]:
    """`none` as the flag parser has it, `None`, where a setting may be None."""
    nullable = {name for name, kind in get_type_hints(TrainSettings).items() if type(None) in get_args(kind)}
    spelled: list[str] = []
    for word in arguments:
        flag, equals, value = word.partition("=")
        if not equals:
            flag, value = (spelled[-1] if spelled else ""), word
        if value == "none" and flag.lstrip("-").replace("-", "_") in nullable:
            word = word.removesuffix("none") + "None"
        spelled.append(word)
    return spelled


def _first_sentence(box: str) -> str:
    """The message of the flag parser, which draws it into a box with help texts below a rule."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    end = next((i for i, line in enumerate(lines) if not line or line.startswith("──")), len(lines))
    return " ".join(lines[:end]) or "wrong usage"


def _nearest(name: str, kind: type, dashes: str) -> str:
    close = difflib.get_close_matches(name, [f.name for f in fields(kind)] + ["config"], n=1)
    return f"; did you mean {dashes}{close[0].replace('_', '-') if dashes else close[0]}?" if close else ""
