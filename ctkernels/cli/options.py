"""What the commands can be told: flat settings, as flags or as keys of a YAML file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from tyro.conf import arg

from ctkernels.cli.parse import Unset, UsageError
from ctkernels.tuning.adapters.peft_export import Kind
from ctkernels.tuning.data.demonstrations import Demonstration, load_jsonl, load_metaicl
from ctkernels.tuning.data.formats import TextFormat
from ctkernels.tuning.evaluation.calibration import Calibrate
from ctkernels.tuning.evaluation.sweep.spec import MethodSpec, split_words
from ctkernels.tuning.methods import METHODS, PRESETS, get_method
from ctkernels.tuning.methods.settings import SETTINGS, Setting
from ctkernels.tuning.train.options import Options, choices, either

_NAMES = either(tuple(METHODS))
_FREE = f"No --train for {either([name for name, m in METHODS.items() if not m.needs_demonstrations])} alone."
PresetName = Annotated[
    str | None,
    arg(help=f"The paper's settings for {either(tuple(PRESETS))}; the suite bbh also takes its text format."),
]


def unescaped(text: str) -> str:
    """A text from a shell, where `\\n` is a line break and `\\t` a tab."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


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
    allow_other_weights: bool = False
    """Take a prefix that was made for other weights, and a checkpoint that lacks weights or has others."""


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
    """Text between input and output and between demonstrations; must be exactly one token. \\n is a line break."""
    max_pair_tokens: int = 256
    """Most tokens of one input/output pair; a longer input loses its end."""
    bos: bool | None = None
    """Start with the BOS token; default: as the tokenizer does."""
    instruction: str = ""
    """Text before all demonstrations."""
    template: str = ""
    """Text around an input and before an output, such as "Q: {input} A: {output}"; default: the delimiter."""

    def text_format(self) -> TextFormat:
        """How pairs become tokens."""
        delimiter, instruction, template = map(unescaped, (self.delimiter, self.instruction, self.template))
        return TextFormat(delimiter, self.max_pair_tokens, self.bos, instruction, template)

    def load(self, split: Literal["train", "dev", "test"], file: Path | None) -> list[Demonstration]:
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

    preset: PresetName = None

    def settings(self, method: str) -> Options:
        """The settings of `method`, those of the preset and the given ones in their place. Raises ValueError."""
        return get_method(method).settings(self.preset, **self.given())

    def settings_of_each(self, methods: Sequence[str]) -> dict[str, tuple[MethodSpec, Options]]:
        """The methods of some words, apart or joined by commas, perhaps with settings of their own, and the settings of
        each: its own ones above the given ones that it reads.

        Raises:
            ValueError: an unknown method; a given setting that none of them reads; what is for sweeps alone.
        """
        given = self.given()
        specs = [MethodSpec.parse(word) for word in split_words(tuple(methods))]
        unread = [name for name in given if specs and not any(name in spec.method.reads for spec in specs)]
        if unread:
            raise UsageError(f"none of {', '.join(spec.name for spec in specs)} reads {', '.join(unread)}")
        for spec in specs:
            if names := ", ".join(spec.protocol.changed()):
                raise UsageError(f"{spec}: {names} is for the tasks of a suite; add --suite")
        return {str(spec): (spec, spec.settings(self.preset, **given)) for spec in specs}

    def given(self) -> dict[str, Any]:
        """The settings that were given, by name."""
        values = {name: getattr(self, name) for name in SETTINGS}
        return {name: value for name, value in values.items() if value is not Unset.DEFAULT}


def _values(kind: Any) -> str:
    """What a flag of a type takes, for its help text."""
    if choices(kind):
        return "{" + ",".join("none" if value is None else str(value) for value in choices(kind)) + "}"
    if kind is bool:
        return "{True,False}"
    if get_origin(kind) is tuple:
        return "NAME [NAME ...]"
    if get_origin(kind) in (Union, UnionType):
        return "|".join("none" if part is NoneType else _values(part) for part in get_args(kind))
    return {"str": "NAME"}.get(kind.__name__, kind.__name__.upper())


def _meaning(setting: Setting) -> str:
    """Its help text: a sentence, and which methods read it unless all that train do."""
    text = setting.meaning[0].upper() + setting.meaning[1:]
    return f"{text} [{setting.readers}]" if setting.readers else text


# a flag for every setting of the methods, without a default of its own
TrainOptions = make_dataclass(
    "TrainOptions",
    [
        (
            s.name,
            Annotated[
                s.kind | Unset,
                arg(help=_meaning(s), metavar=_values(s.kind), help_behavior_hint=f"(default: {s.defaults})"),
            ],
            field(default=Unset.DEFAULT),
        )
        for s in SETTINGS.values()
    ],
    bases=(Preset,),
    frozen=True,
)


@dataclass(frozen=True)
class TuneConfig(TrainOptions, DataOptions, ModelOptions):
    """Adapt a model to the demonstrations of a task and save the adapter.

    Writes OUT/prefix (the prefix, and what else the method made), OUT/history.jsonl (a line after each epoch: loss,
    learning rate, gradient norm, seconds), OUT/history.json (the same at the end), OUT/config.yaml (these settings) and
    OUT/checkpoint; with a search OUT/search.json (its trials and their losses of held-out demonstrations). `--config
    FILE` reads settings from a YAML file; flags win. Ctrl-C and SIGTERM end the run with its epoch and a checkpoint, a
    second one at once.
    """

    out: Path | None = None
    """Folder of the results (required)."""
    method: Annotated[str, arg(help=f"{_NAMES}.")] = "ct-kv"
    start_from: Path | None = None
    """Folder of another task's adapter, or of its run, to start from."""
    checkpoint_every: int = 5
    """Replace the checkpoint after so many epochs."""
    holdout: Annotated[
        int | Literal["auto"] | None,
        arg(
            help="Hold demonstrations out of training and keep the epoch with their lowest loss. A number: so many are "
            "held out for good. auto: learning rate and epochs are searched for on parts of the demonstrations that "
            "are held out in turn, and all of them are trained at the end."
        ),
    ] = None
    budget: int | None = None
    """Search within so many forward passes of a row (a trained row is three); default: 500 for each demonstration with
    --holdout auto, no search with a number."""
    patience: int | None = None
    """With a number held out: end after so many epochs without a lower loss."""
    resume: bool = False
    """Continue from OUT/checkpoint, if there is one; the result has the same bits as an uninterrupted run."""
    overwrite: bool = False
    """Replace the run that lies in OUT; other files there stay."""
    log_with: Annotated[tuple[str, ...], arg(metavar="{tensorboard,wandb}")] = ()
    """Also log every epoch (loss, learning rate, gradient norm, held-out loss) there, through accelerate's trackers:
    tensorboard writes OUT/tensorboard. Needs ctkernels[tensorboard] or ctkernels[wandb]."""


@dataclass(frozen=True)
class EvalConfig(TrainOptions, DataOptions, ModelOptions):
    """Evaluate methods or saved prefixes on the test items of a task.

    Items with options are scored by option loss (macro-F1 or accuracy as in MetaICL), others by greedy generation and
    exact match. Prints a table; `--out FILE.json` also writes the scores with all predictions. `--config FILE` reads
    settings from a YAML file; flags win. Many tasks and seeds at once: `ctkernels eval --suite SUITE --help`.
    """

    test: Path | None = None
    """JSONL of the test items."""
    methods: Annotated[
        tuple[str, ...],
        arg(
            help=f"Methods to run and evaluate, apart or joined by commas: {_NAMES}; with settings: ct-kv:lr=1e-3. "
            f"{_FREE}"
        ),
    ] = ()
    prefix: tuple[Path, ...] = ()
    """Folders of saved prefixes or of runs of tune to evaluate, with the text format they were tuned with."""
    by: Literal["options", "generation"] | None = None
    """How to evaluate; default: by options if every item has some."""
    calibrate: Calibrate | None = None
    """Report scores with an offset for each option, too: its mean loss over the test inputs (batch) or over inputs
    without content (content-free), or fitted to validation items (dev); default: offsets stored with a prefix."""
    dev: Path | None = None
    """JSONL of the validation items that --calibrate=dev reads."""
    keep_offsets: bool = False
    """Store the offsets that --calibrate finds in the folders of --prefix, for later evaluations."""
    max_new_tokens: int = 32
    """Longest generated answer."""
    limit: int | None = None
    """Evaluate only the first so many items."""
    out: Path | None = None
    """JSON file of the scores."""


@dataclass(frozen=True)
class ExportConfig(ModelOptions):
    """Write a saved adapter for another program: in peft's format, which `PeftModel.from_pretrained` loads, or as a
    slot file, which llama-server restores.

    The model is needed for llama-server, and for peft with a prefix whose rows do not begin right behind it.
    """

    adapter: Path | None = None
    """Folder of a saved adapter or prefix, or of a run of tune (required)."""
    out: Path | None = None
    """Folder for peft, or slot file for llama-server (required)."""
    to: Literal["peft", "llama-server"] = "peft"
    """Which program reads it."""
    kind: Kind | None = None
    """For peft: what to write; default: prompt-tuning for a soft prompt, else cartridge. Required for a LoRA update."""
    template: Path | None = None
    """For llama-server: a slot file that your server saved when it had processed as many tokens as the prefix has."""
    overwrite: bool = False
    """For llama-server: replace the slot file that lies at OUT."""


@dataclass(frozen=True)
class ImportConfig(ModelOptions):
    """Read an adapter that peft saved (CARTRIDGE, PREFIX_TUNING, PROMPT_TUNING or LORA) and save it as ours."""

    adapter: Path | None = None
    """Folder that peft wrote (required)."""
    out: Path | None = None
    """Folder of the adapter (required)."""
    allow_pickle: bool = False
    """Also read adapter_model.bin, a pickle, if you trust who made it."""
