"""Stage build: the compiled extensions, those that are there if they load and are of these sources, else prebuilt ones,
else new ones; and what this machine is."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

from tools.gpu.check.records import replace_file
from tools.gpu.check.session import ROOT, Session, last_lines, python

STAGE, CASES = "build", ("extensions", "machine")
PACKAGE = ROOT / "ctkernels"
STAMP = ROOT / "build" / "gpu-check" / "extensions.json"  # which sources the extensions in the package are of
TREE = ROOT / "build" / "gpu-check" / "tree"
SUMMARY = "gpu_check.json"  # in a folder of prebuilt extensions, the record of the check that built them
SOURCES = ("setup.py", "csrc/**/*", "python_bindings/*")
MOST_BYTES = 16 << 20
PROBE = "tools.gpu.check.probe"


def build(session: Session) -> None:
    """Make the extensions load, and describe the machine.

    Ends with a failure in the records if they do not.
    """
    records = session.records
    if records.missing(STAGE) == []:
        return
    records.plan(STAGE, CASES)
    started = time.perf_counter()
    records.begin(STAGE, "extensions")
    result = obtain(session)
    machine = result.pop("machine", None)
    records.end(STAGE, "extensions", time.perf_counter() - started, result)
    found = {"failure": "the probe of this machine failed"} if machine is None else {"machine": machine}
    records.end(STAGE, "machine", 0.0, found)


def obtain(session: Session) -> dict[str, Any]:
    """The extensions that load, how they came, and the `machine`; or a failure."""
    loaded, refused = probe(session), []
    if not session.rebuild:
        why = is_stale() if loaded["works"] else loaded["why"]
        if why is None:
            return {"how": "in place", "sources": known_sources(), "machine": loaded["machine"]}
        refused.append(f"in place: {why}")
    if not session.rebuild and session.prebuilt is not None:
        why = take(session.prebuilt)
        if why is None:
            loaded = probe(session)
            if loaded["works"]:
                found = {"how": f"prebuilt in {session.prebuilt}", "sources": known_sources()}
                return {**found, "refused": refused, "machine": loaded["machine"]}
            why = loaded["why"]
        refused.append(f"prebuilt: {why}")
    why = compile_all(session)
    if why is not None:
        return {"failure": f"the build failed: {why}", "refused": refused, "machine": loaded["machine"]}
    loaded = probe(session)
    found = {"refused": refused, "machine": loaded["machine"]}
    if not loaded["works"]:
        return {"failure": f"what was built does not load: {loaded['why']}", **found}
    write_stamp(digest())
    keep(session)
    return {"how": "compiled", "sources": digest(), **found}


def probe(session: Session) -> dict[str, Any]:
    """Load the extensions in a process of their own: `works`, else `why`; and the `machine`."""
    status, text = session.run(python("-m", PROBE, session.device), hangs=False)
    try:
        found = json.loads(text.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return {"works": False, "why": f"status {status}: {last_lines(text)}", "machine": None}
    reasons = [f"{name}: {reason}" for name, reason in found["extensions"].items() if reason is not None]
    return {"works": not reasons, "why": "; ".join(reasons), "machine": found["machine"]}


def digest() -> str:
    """Of all files that the extensions are made of."""
    sha = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file()):
        sha.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return sha.hexdigest()[:16]


def extensions(folder: Path) -> dict[str, Path]:
    """Built extensions for this Python in a folder, by name."""
    files = {name: folder / f"{name}{suffix}" for suffix in EXTENSION_SUFFIXES[::-1] for name in ("_C", "_cuda")}
    return {name: path for name, path in files.items() if path.exists()}


def hashes() -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in extensions(PACKAGE).values()}


def write_stamp(sources: str) -> None:
    STAMP.parent.mkdir(parents=True, exist_ok=True)
    replace_file(STAMP, json.dumps({"sources": sources, "files": hashes()}) + "\n")


def known_sources() -> str:
    """The digest of the sources that the extensions in the package were built from, or "unknown"."""
    try:
        stamp = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return "unknown"
    return stamp["sources"] if stamp["files"] == hashes() else "unknown"


def is_stale() -> str | None:
    """Why the extensions in the package must be built again, or None: they are known to be of other sources.

    Of those that another build made nothing is known; the report says so.
    """
    known = known_sources()
    return None if known in ("unknown", digest()) else f"built from other sources ({known}, these are {digest()})"


def take(folder: Path) -> str | None:
    """Copy prebuilt extensions into the package: None, or why not."""
    found = extensions(folder)
    if not found:
        return f"{folder} holds no extension for this Python ({EXTENSION_SUFFIXES[0]})"
    sources = "unknown"
    if (folder / SUMMARY).exists():
        sources = json.loads((folder / SUMMARY).read_text()).get("sources", "unknown")
    if sources not in ("unknown", digest()):
        return f"built from other sources ({sources}, these are {digest()})"
    for path in found.values():
        shutil.copyfile(path, PACKAGE / path.name)
    write_stamp(sources)
    return None


def compile_all(session: Session) -> str | None:
    """Run setup.py, for this machine's GPU alone; None, or why it failed. What is compiled is kept if it is stopped."""
    env = {"MAX_JOBS": str(os.cpu_count() or 1), "CTKERNELS_CUDA": "0" if session.dry else "1"}
    if not session.dry:
        env["TORCH_CUDA_ARCH_LIST"] = architecture(session)
        if "CUDA_HOME" not in os.environ and (home := find_toolkit()) is not None:
            env["CUDA_HOME"] = str(home)
    print(f"compiling ({', '.join(f'{name}={value}' for name, value in env.items())})", flush=True)
    command = python("setup.py", "--quiet", "build_ext", "--inplace")
    status, text = session.run(command, env, hangs=False, folder=build_tree())
    return None if status == 0 else f"status {status}: {last_lines(text, 8)}"


def build_tree() -> Path:
    """A folder with links to what setup.py reads, and without pyproject.toml: setuptools before 77, which a system may
    have, cannot read that, and compiling needs nothing of it."""
    TREE.mkdir(parents=True, exist_ok=True)
    for name in ("setup.py", "csrc", "python_bindings", "ctkernels"):
        if not (TREE / name).is_symlink():
            (TREE / name).symlink_to(ROOT / name)
    return TREE


def architecture(session: Session) -> str:
    """Compute capability of the GPU, as setup.py takes it; of an H100 if torch finds none."""
    command = "import torch; print('capability %d.%d' % torch.cuda.get_device_capability())"
    status, text = session.run(python("-c", command), hangs=False)
    return text.strip().split()[-1] if status == 0 else "9.0"


def find_toolkit() -> Path | None:
    """A CUDA toolkit on PATH or where it is installed by default."""
    found = shutil.which("nvcc")
    places = [Path(found).resolve().parents[1]] if found else []
    places += [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    return next((place for place in places if (place / "include" / "cuda_runtime.h").exists()), None)


def keep(session: Session) -> None:
    """Put what was built beside the records, for a later machine to take as prebuilt."""
    for path in extensions(PACKAGE).values():
        if path.stat().st_size <= MOST_BYTES:
            shutil.copyfile(path, session.out / path.name)
        else:
            print(f"{path.name} is not kept: {path.stat().st_size >> 20} MiB", file=sys.stderr)
