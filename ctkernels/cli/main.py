"""The command `ctkernels`: `tune`, `eval`, `serve`, `export`, `import`, `models` and `env`.

Exit status: 0 done; 1 the run failed (a full disk, a loss that is not finite, cells of a sweep without a result);
2 wrong usage or unusable data, said in one line; 130 interrupted (Ctrl-C); 143 ended by SIGTERM.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctkernels.cli.model import load_model, print_scores
from ctkernels.cli.models import models_command
from ctkernels.cli.parse import CommandLine, FailedRun, UsageError, as_yaml, plain_values
from ctkernels.cli.signals import Terminated, ends_with_epoch, terminable

if TYPE_CHECKING:
    from torch import nn

    from ctkernels.cli.options import ExportConfig, ImportConfig, TuneConfig
    from ctkernels.tuning.data.demonstrations import Demonstration
    from ctkernels.tuning.train.options import Options
    from ctkernels.tuning.train.trainer import EpochRecord

HELP = """usage: ctkernels COMMAND [OPTIONS]

  tune   adapt a model to the demonstrations of a task and save the adapter
  eval   evaluate methods or saved prefixes on test items, or methods on all tasks of a suite (--suite)
  serve  a model and its stored prefixes behind OpenAI's API, and a page to tune and try them
  export write a saved adapter in peft's format, or as a slot file of llama-server
  import save an adapter of peft as ours
  models which model classes are served, and why others are not
  env    versions, CPU features, and which backends are available

`ctkernels COMMAND --help` lists the options; `--config FILE` reads them from a YAML file. `ctkernels --version` prints
the version. `python -m ctkernels` is the same command."""
ENV_HELP = """usage: ctkernels env

Versions of this package and of those it works with, features of the CPU, and each backend with the reason if it is
unavailable."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    sys.exit(run(sys.argv[1:] if argv is None else list(argv)))


def run(argv: list[str]) -> int:
    """Run the command line; returns the exit status."""
    try:
        status = _run(argv)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # who read the output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at exit
        return 128 + signal.SIGPIPE


def _run(argv: list[str]) -> int:
    if argv == ["--version"]:
        import ctkernels

        print(f"ctkernels {ctkernels.__version__}")
        return 0
    if argv[:1] == ["help"]:  # `help tune` is `tune --help`
        argv = [*argv[1:], "--help"]
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return 0 if argv else 2
    name, rest = argv[0], argv[1:]
    commands = {"tune": tune_command, "eval": eval_command, "export": export_command}
    commands |= {"serve": serve_command, "import": import_command, "models": models_command, "env": env_command}
    try:
        if name not in commands:
            raise UsageError(f"unknown command {name!r}; the commands are {', '.join(commands)}")
        with _plain_warnings(), terminable():
            commands[name](rest)
    except KeyboardInterrupt as interrupt:
        how = "continue with --resume, from the last checkpoint" if name == "tune" else "finished cells are kept"
        return _complain(f"interrupted; {how}", 143 if isinstance(interrupt, Terminated) else 130)
    except (ValueError, TypeError) as error:
        return _complain(error, 2)
    except BrokenPipeError:
        raise
    except OSError as error:
        how = "; what was saved before is whole: continue with --resume" if name == "tune" else ""
        return _complain(f"{_without_number(error)}{how}", 1)
    except (ArithmeticError, FailedRun, ImportError) as error:
        return _complain(error, 1)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return _complain(f"out of memory: {str(error).splitlines()[0] if str(error) else 'no more can be had'}", 1)
    return 0


def tune_command(argv: list[str]) -> None:
    """`ctkernels tune`: train, save the prefix and its history."""
    from ctkernels.cli.options import TuneConfig

    config = CommandLine("ctkernels tune", argv).parse(TuneConfig)
    if config.out is None:
        raise UsageError("out is required: the folder of the results (--out)")
    settings = config.settings(config.method)
    demonstrations = config.load("train", config.train)

    from ctkernels.cli import search, trackers
    from ctkernels.cli.outputs import check_run
    from ctkernels.tuning.train.distributed import folder_of_run

    search.check(config)
    names = trackers.checked(config.log_with)
    with folder_of_run(config.out):
        check_run(config.out, config.resume, config.overwrite)
        _tune(config, settings, demonstrations, names)


def _tune(
    config: TuneConfig, settings: Options, demonstrations: Sequence[Demonstration], log_with: Sequence[str]
) -> None:
    from ctkernels.cli import search
    from ctkernels.cli.outputs import remove_run
    from ctkernels.cli.progress import EpochLog, epoch_bar
    from ctkernels.cli.trackers import trackers
    from ctkernels.tuning.adapters.adapter import Adapter
    from ctkernels.tuning.methods import get_method
    from ctkernels.tuning.storage import atomic_write_bytes, atomic_write_json
    from ctkernels.tuning.train.distributed import launched, local_device

    device = local_device(config.device)
    with launched(device) as group:
        first = group is None or group.rank() == 0
        model, tokenizer = load_model(replace(config, device=device))
        start_from = (
            None
            if config.start_from is None
            else Adapter.from_pretrained(config.start_from, model, tokenizer, config.allow_other_weights)
        )
        written = config.out / "config.yaml"
        if first and config.overwrite:
            remove_run(config.out)
        log = EpochLog(config.out / "history.jsonl")
        trains = get_method(config.method).trains != "nothing"
        with (
            trackers(log_with if first else (), config.out, {**plain_values(config), **asdict(settings)}) as track,
            epoch_bar(settings, enabled=None if first else False) as show,
            ends_with_epoch() if trains else contextlib.nullcontext() as ends,
        ):

            def accepted() -> None:
                if first and not written.exists():  # the run may be killed and resumed from now on
                    atomic_write_bytes(written, as_yaml(config).encode())

            def on_epoch(record: EpochRecord, module: nn.Module) -> None:
                accepted()
                if first:
                    track(record, log.add(record))
                show(record, module)

            def show_trial(line: str) -> None:
                accepted()
                if first:
                    print(line, file=sys.stderr)

            result = search.run(
                config,
                model,
                tokenizer,
                demonstrations,
                settings,
                show_trial,
                start_from=start_from,
                checkpoint_dir=config.out / "checkpoint",
                checkpoint_every=config.checkpoint_every,
                resume=config.resume,
                on_epoch=on_epoch,
                group=group,
                ends=ends,
            )
    if not first:
        return
    atomic_write_bytes(written, as_yaml(config).encode())
    result.adapter.save_pretrained(config.out / "prefix")
    atomic_write_json(config.out / "history.json", [asdict(record) for record in result.history])
    if result.history:
        first_epoch, last = result.history[0], result.history[-1]
        seconds = sum(record.seconds for record in result.history)
        print(f"loss {first_epoch.loss:.4f} -> {last.loss:.4f} in {len(result.history)} epochs, {seconds:.1f} s")
        if curve := result.held_out:
            print(f"held-out loss {curve[0]:.4f} -> {min(curve):.4f}, kept: epoch {curve.index(min(curve))}")
    extra = " and a LoRA update of the weights" if result.adapter.lora else ""
    print(f"saved {config.out / 'prefix'}: {result.prefix.length} tokens{extra}")


def eval_command(argv: list[str]) -> None:
    """`ctkernels eval`: scores of methods and saved prefixes, as a table and JSON; with `--suite` a sweep."""
    line = CommandLine("ctkernels eval", argv)
    if line.has("suite"):
        from ctkernels.cli.sweep import sweep_command

        return sweep_command(line)
    from ctkernels.cli.options import EvalConfig
    from ctkernels.cli.outputs import check_scores

    config = line.parse(EvalConfig)
    if not config.methods and not config.prefix:
        raise UsageError("give methods (such as zero-shot icl ct-kv) or prefix (saved folders), or both")
    if config.limit is not None and config.limit < 1:
        raise UsageError(f"limit must be at least 1, got {config.limit}")
    if config.keep_offsets and (config.calibrate in (None, "none") or not config.prefix):
        raise UsageError("keep_offsets stores what calibrate finds in folders of prefix; give both")
    settings, given = config.settings_of_each(config.methods), config.given()
    labels: list[str | Path] = [*settings, *config.prefix]
    items = config.load("test", config.test)[: config.limit]
    if config.out is not None:
        check_scores(config.out)
    needs_train = any(spec.method.needs_demonstrations for spec, _ in settings.values())
    demonstrations = config.load("train", config.train) if needs_train else []
    validation = config.load("dev", config.dev) if config.calibrate == "dev" else []
    model, tokenizer = load_model(config)

    from ctkernels.cli.progress import epoch_bar
    from ctkernels.tuning.adapters.adapter import Adapter
    from ctkernels.tuning.adapters.file import adapter_folder
    from ctkernels.tuning.methods.tune import tune
    from ctkernels.tuning.train.options import Options

    results = []
    for name in labels:
        started = time.perf_counter()
        if isinstance(name, Path):
            adapter = Adapter.from_pretrained(name, model, tokenizer, config.allow_other_weights)
        else:
            spec, own = settings[name]
            with epoch_bar(own) as show:
                tuned = tune(model, tokenizer, demonstrations, spec.name, own, config.text_format(), on_epoch=show)
            adapter = tuned.adapter
        ready = time.perf_counter()
        scores = adapter.evaluate(
            model,
            tokenizer,
            items,
            by=config.by,
            max_tokens=given.get("max_tokens", Options.max_tokens),
            max_new_tokens=config.max_new_tokens,
            backend=given.get("backend"),
            score=given.get("score"),
            calibrate=config.calibrate,
            validation=validation,
        )
        if config.keep_offsets and isinstance(name, Path) and scores.calibrated is not None:
            # read again: loaded for this model, its tensors may have another type
            folder = adapter_folder(name)
            replace(Adapter.from_pretrained(folder), offsets=scores.calibrated.offsets).save_pretrained(folder)
        seconds = {"seconds_start": ready - started, "seconds_eval": time.perf_counter() - ready}
        results.append({"name": str(name), **asdict(scores), **seconds})
    print_scores(results)
    if config.out is not None:
        from ctkernels.tuning.storage import atomic_write_json

        atomic_write_json(config.out, {"model": config.model, "results": results})


def export_command(argv: list[str]) -> None:
    """`ctkernels export`: a saved adapter in the format of another program."""
    from ctkernels.cli.options import ExportConfig

    config = CommandLine("ctkernels export", argv).parse(ExportConfig)
    if config.to == "llama-server":
        return _export_llama(config)
    if config.template is not None or config.overwrite:
        raise UsageError("template and overwrite are for --to llama-server")
    adapter, out = _folders(config)

    from ctkernels.tuning.adapters.adapter import Adapter
    from ctkernels.tuning.adapters.peft_export import export_peft

    model = load_model(config)[0] if config.model else None
    export_peft(
        Adapter.from_pretrained(adapter, model, allow_other_weights=config.allow_other_weights), out, config.kind, model
    )
    print(f"saved {out} for peft")


def _export_llama(config: ExportConfig) -> None:
    needed = {"adapter": "a folder", "out": "a slot file", "template": "a slot file", "model": "a folder or hub id"}
    for name, what in needed.items():
        if not getattr(config, name):
            raise UsageError(f"{name} is required for llama-server: {what} (--{name})")
    if config.kind is not None:
        raise UsageError("kind is for --to peft")

    from ctkernels.serving.llama import export_llama
    from ctkernels.tuning.adapters.adapter import Adapter

    model, tokenizer = load_model(config)
    adapter = Adapter.from_pretrained(config.adapter, model, tokenizer, config.allow_other_weights)
    done = export_llama(adapter, config.template, config.out, model, config.overwrite)
    kinds, order = " and ".join(done.cells), "interleaved" if done.interleaved else "in the model's order"
    print(
        f"saved {config.out} for llama-server: {done.tokens} tokens, {done.layers} layers of {kinds}, keys {order}; "
        f"template and model differ by {done.keys:.2g} (keys) and {done.values:.2g} (values) on the template's tokens"
    )


def import_command(argv: list[str]) -> None:
    """`ctkernels import`: an adapter of peft as ours."""
    from ctkernels.cli.options import ImportConfig

    config = CommandLine("ctkernels import", argv).parse(ImportConfig)
    adapter, out = _folders(config)
    model, tokenizer = load_model(config)

    from ctkernels.tuning.adapters.peft_import import import_peft

    loaded = import_peft(adapter, model, tokenizer, config.allow_pickle, config.allow_other_weights)
    loaded.save_pretrained(out)
    extra = " and a LoRA update of the weights" if loaded.lora else ""
    print(f"saved {out}: {loaded.prefix.length} tokens{extra}")


def serve_command(argv: list[str]) -> None:
    """`ctkernels serve`: a model and its stored prefixes behind OpenAI's API."""
    from ctkernels.cli import serve

    serve.serve_command(argv)


def _folders(config: ExportConfig | ImportConfig) -> tuple[Path, Path]:
    adapter, out = config.adapter, config.out
    if adapter is None or out is None:
        name = "adapter" if adapter is None else "out"
        raise UsageError(f"{name} is required: a folder (--{name})")

    from ctkernels.tuning.storage import check_target

    check_target(out, folder=True)
    return adapter, out


def env_command(argv: list[str]) -> None:
    """`ctkernels env`: what this machine offers."""
    if argv in (["-h"], ["--help"]):
        print(ENV_HELP)
        return
    if argv:
        raise UsageError(f"env takes no arguments, got {argv[0]!r}")
    for name, value in environment().items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, entry in value.items():
                print(f"  {key + ':':14} {entry}")
        else:
            print(f"{name + ':':16} {value}")


def environment() -> dict[str, Any]:
    """Versions, CPU features, threads, and each backend with the reason if it is unavailable."""
    from importlib import metadata

    import torch

    import ctkernels
    from ctkernels import dispatch

    versions = {"ctkernels": ctkernels.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("transformers", "tokenizers", "safetensors"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "versions": versions,
        "platform": platform.platform(),
        "cpu": dispatch.cpu_info(),
        "backends": {
            name: "available" if reason is None else f"unavailable: {reason}"
            for name, reason in dispatch.availability().items()
        },
    }


def _without_number(error: OSError) -> str:
    """What went wrong, and with which file."""
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)


def _is_out_of_memory(error: Exception) -> bool:
    """Also of torch, whose CPU allocator raises a RuntimeError."""
    return isinstance(error, MemoryError) or any(
        words in str(error)
        for words in ("out of memory", "can't allocate memory", "bad_alloc", "Cannot allocate memory")
    )


def _complain(error: object, status: int) -> int:
    """One line on stderr."""
    print(f"ctkernels: error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show the package's warnings as one line each, without source code."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft loads it, and it misses what is not used here
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"ctkernels: warning: {message}", file=sys.stderr)
        yield
