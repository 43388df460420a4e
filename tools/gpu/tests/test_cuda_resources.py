"""Registers, spills and shared memory of the CUDA C++ kernels: the committed table of all of them on all architectures
against the rules, and the tuned ones compiled again for two; `make gpu-report` compiles all."""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import ptxemu
import pytest

from tools.gpu.cuda import build as cuda_build
from tools.gpu.cuda import report as cuda_report
from tools.gpu.cuda import resources as cuda_resources
from tools.gpu.cuda.build import Kernel, Needs
from tools.gpu.triton import resources
from tools.gpu.triton.resources import Entry

RESULTS = Path(resources.__file__).parents[1] / "results"
COMPILED = ("sm_80", "sm_90")
LOG = """
ptxas info    : Compiling entry function 'ctk_forward_bf16_64_plain' for 'sm_80'
ptxas info    : Function properties for ctk_forward_bf16_64_plain
    24 bytes stack frame, 68 bytes spill stores, 72 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 24 bytes cumulative stack size, 96 bytes smem
ptxas info    : Compile time = 1.000 ms
ptxas info    : Compiling entry function 'ctk_pack' for 'sm_80'
ptxas info    : Function properties for ctk_pack
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 28 registers, used 0 barriers
"""


@pytest.fixture(scope="module")
def table():
    """What `make gpu-report` wrote: the version of nvcc, and the entries by key."""
    record = json.loads((RESULTS / "cuda_resources.json").read_text())
    return record["nvcc"], resources.read(record["entries"])


@pytest.mark.needs_nvcc
@pytest.mark.parametrize("name", COMPILED)
def test_tuned_kernels_do_not_spill_and_are_not_worse_than_committed(table, name):
    """All of them compile without a warning, too: warnings are errors."""
    architecture = cuda_resources.NVIDIA[name]
    _, needs = cuda_build.instances("bf16", "plain", name)
    launched = {kernel.name: kernel for kernel in cuda_build.kernels()}
    entries = [cuda_resources.entry(launched[kernel], need, architecture) for kernel, need in needs.items()]
    assert {entry.D for entry in entries} == {64, 128} and len(entries) == 6
    broken = [line for entry in entries for line in resources.violations(entry)]
    version, committed = table
    if cuda_build.nvcc_version() == version:  # another compiler allocates other registers
        broken += [line for entry in entries for line in resources.regressions(entry, committed)]
    assert not broken, "\n".join(broken)
    assert not own_shared_memory(entries)


def own_shared_memory(entries: Iterable[Entry]) -> list[tuple]:
    """Kernels whose machine code has shared memory of its own. A GPU would count it as part of the `SHARED_LIMIT` bytes
    that the bindings allow each kernel to have, and of the 48 KiB that need no permission."""
    dynamic = {kernel.name: kernel.shared for kernel in cuda_build.kernels()}
    return [entry.key for entry in entries if entry.shared != dynamic[entry.kernel]]


def test_what_the_bindings_allow_fits_every_architecture(table):
    """One constant for all kernels: at least what any plan asks for, at most what a block may have."""
    told = (cuda_build.SOURCES / "shapes.h").read_text()
    limit = 1024 * int(re.search(r"SHARED_LIMIT = (\d+) \* 1024;", told)[1])
    assert max(kernel.shared for kernel in cuda_build.kernels()) <= limit
    assert all(limit <= architecture.shared_limit for architecture in cuda_resources.NVIDIA.values())


def test_shared_memory_of_a_kernel_itself_is_found(table):
    _, entries = table
    entry = next(iter(entries.values()))
    assert own_shared_memory([replace(entry, shared=entry.shared + 16)]) == [entry.key]


def test_the_committed_table_has_every_kernel_and_breaks_no_rule(table):
    """No spill at D <= 128, shared memory within the limits, room for a block at least."""
    _, entries = table
    kernels = {kernel.name for kernel in cuda_build.kernels()}
    for name in cuda_resources.NVIDIA:
        assert {e.kernel for e in entries.values() if e.architecture == name} == kernels, name
    assert not [line for entry in entries.values() for line in resources.violations(entry)]
    assert all(e.shared <= e.shared_limit and e.blocks for e in entries.values())


def test_the_committed_table_is_of_the_launches_that_plans_make(table):
    """Threads and dynamic shared memory of the table are those of `plan.h`: shapes that changed are compiled again."""
    _, entries = table
    launched = {kernel.name: kernel for kernel in cuda_build.kernels()}
    for entry in entries.values():
        kernel = launched[entry.kernel]
        assert (entry.warps, entry.D) == (kernel.threads // 32, kernel.D or 0), entry.key
        assert entry.shared >= kernel.shared, entry.key
    assert not own_shared_memory(entries.values())


def test_kernels_are_those_that_a_plan_names():
    kernels = {kernel.name: kernel for kernel in cuda_build.kernels()}
    assert {"ctk_setup_rows", "ctk_pack", "ctk_sum_parts", "ctk_merge_out_fp32"} <= kernels.keys()
    assert {kernel.D for kernel in kernels.values()} == {None, 64, 80, 96, 128, 256, 512}
    assert kernels["ctk_forward_bf16_64_plain"].shared >= 3 * 64 * 64 * 2  # queries, keys and values at the least


def test_what_ptxas_says():
    assert cuda_build.read_log(LOG) == {
        "ctk_forward_bf16_64_plain": Needs(255, 68, 72, 24, 96),
        "ctk_pack": Needs(28, 0, 0, 0, 0),
    }


def test_what_is_compiled_is_known_by_its_code(monkeypatch, tmp_path):
    """Comments, indentation and empty lines change no digest, so that nothing is compiled again; code does."""
    folder = tmp_path / "csrc" / "cuda"
    folder.mkdir(parents=True)
    monkeypatch.setattr(cuda_build, "SOURCES", folder)
    (folder / "kernels.cu").write_text('#include "a.cuh"\nconst char* x = "// no comment";\n')
    texts = {
        "int y = 1;": "first",
        "// of two\n\n  int y = 1;  /* one\nmore */\n": "first",
        "int y = 2;": "second",
        "int y = 1; z;": "third",
    }
    found = {}
    for text, name in texts.items():
        (folder / "a.cuh").write_text(text)
        found.setdefault(name, set()).add(cuda_build.digest())
    assert all(len(digests) == 1 for digests in found.values()) and len(set.union(*found.values())) == 3
    (folder / "kernels.cu").write_text('#include "a.cuh"\nconst char* x = "// no";\n')
    assert cuda_build.digest() not in set.union(*found.values())


@pytest.mark.needs_nvcc
def test_a_warning_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_build, "CACHE", tmp_path)
    source = tmp_path / "warns.cu"
    source.write_text("__global__ void kernel(int* x) { int unused; *x = 1; }\n")
    with pytest.raises(ptxemu.CompileError, match="unused"):
        cuda_build.cubin(source, "sm_80")
    assert list(tmp_path.iterdir()) == [source]  # nothing half made is kept


@pytest.fixture
def fakes(monkeypatch):
    """A build of two kernels that every architecture compiles alike."""
    needs = {"ctk_forward_bf16_64_plain": Needs(200, 0, 0, 0, 16), "ctk_pack": Needs(28, 0, 0, 0, 0)}
    kernels = [Kernel("ctk_forward_bf16_64_plain", 128, 36864), Kernel("ctk_pack", 256, 0)]
    monkeypatch.setattr(cuda_build, "sources", lambda: [Path("kernels.cu")])
    monkeypatch.setattr(cuda_build, "cubin", lambda source, architecture: (b"", needs))
    monkeypatch.setattr(cuda_build, "kernels", lambda: kernels)
    monkeypatch.setattr(cuda_build, "nvcc_version", lambda: "13.0")
    monkeypatch.setattr(cuda_build, "digest", lambda: "0123")
    return needs, kernels


def test_the_tuned_kernels_alone(fakes, monkeypatch, tmp_path):
    """A quick report adds to the table, and leaves the other kernels as they are."""
    report(tmp_path, "--architectures", "sm_80")
    asked = []

    def instances(dtype, variant, architecture):
        asked.append((dtype, variant, architecture))
        return b"", {"ctk_forward_bf16_64_plain": Needs(100, 0, 0, 0, 0)} if dtype == "bf16" else {}

    monkeypatch.setattr(cuda_build, "instances", instances)
    _, table, text = report(tmp_path, "--architectures", "sm_80", "sm_90", "--tuned")
    found = {(e["architecture"], e["kernel"]): e["registers"] for e in table["entries"]}
    assert found == {
        ("sm_80", "ctk_forward_bf16_64_plain"): 100,
        ("sm_80", "ctk_pack"): 28,
        ("sm_90", "ctk_forward_bf16_64_plain"): 100,
    }
    assert asked[:2] == [("bf16", "plain", "sm_80"), ("fp16", "plain", "sm_80")]
    assert "| pack | 256 | 28 / 0 / 8 |  |" in text


def test_the_kernels_of_one_file_alone(fakes, monkeypatch, tmp_path):
    """Only that file is compiled, though it has not all kernels; one that no plan names is refused all the same."""
    needs, _ = fakes
    files = {"kernels_bf16": {"ctk_forward_bf16_64_plain": Needs(100, 0, 0, 0, 0)}, "kernels_common": needs}
    monkeypatch.setattr(cuda_build, "sources", lambda: [Path(f"{stem}.cu") for stem in files])
    monkeypatch.setattr(cuda_build, "cubin", lambda source, architecture: (b"", files[source.stem]))
    _, table, _ = report(tmp_path, "--architectures", "sm_80", "--files", "kernels_bf16")
    assert [(e["kernel"], e["registers"]) for e in table["entries"]] == [("ctk_forward_bf16_64_plain", 100)]
    files["kernels_bf16"]["ctk_new"] = Needs(1, 0, 0, 0, 0)
    with pytest.raises(LookupError, match="ctk_new"):
        report(tmp_path, "--architectures", "sm_80", "--files", "kernels_bf16")


def test_an_entry_says_how_many_blocks_fit(fakes):
    forward, pack = cuda_resources.measure(cuda_resources.NVIDIA["sm_80"])
    assert (forward.D, forward.dtype, forward.warps, forward.shared) == (64, "bf16", 4, 36864 + 16)
    assert forward.blocks == 2  # 65536 registers / (200 x 128)
    assert (pack.D, pack.dtype, pack.blocks) == (0, "", 8)


@pytest.mark.parametrize("side", ["sources", "plans"])
def test_kernels_that_one_side_alone_knows_are_refused(fakes, side):
    needs, kernels = fakes
    if side == "sources":
        needs["ctk_new"] = Needs(1, 0, 0, 0, 0)
    else:
        kernels.append(Kernel("ctk_new", 128, 0))
    with pytest.raises(LookupError, match="ctk_new"):
        cuda_resources.measure(cuda_resources.NVIDIA["sm_80"])


def report(tmp_path, *more) -> tuple[int, dict, str]:
    status = cuda_report.main(["--out", str(tmp_path), "--parts", "resources", *more])
    table = json.loads((tmp_path / "cuda_resources.json").read_text())
    return status, table, (tmp_path / "cuda_resources.md").read_text()


def test_the_report_keeps_what_it_does_not_compile(fakes, tmp_path, monkeypatch):
    needs, _ = fakes
    status, table, text = report(tmp_path, "--architectures", "sm_80")
    assert status == 0 and "Compiled for sm_80. **Not yet for sm_86" in text and "Rules broken: 0" in text
    needs["ctk_pack"] = Needs(40, 0, 0, 0, 0)
    status, table, text = report(tmp_path, "--architectures", "sm_90")
    found = {(e["architecture"], e["kernel"]): e["registers"] for e in table["entries"]}
    assert found["sm_80", "ctk_pack"] == 28 and found["sm_90", "ctk_pack"] == 40
    assert "| forward_bf16_64_plain | 128 | 200 / 36 / 2 | 200 / 36 / 2 |" in text


@pytest.mark.parametrize("what", ["nvcc_version", "digest"])
def test_the_report_keeps_nothing_of_another_compiler_or_other_sources(fakes, tmp_path, monkeypatch, what):
    report(tmp_path, "--architectures", "sm_80")
    monkeypatch.setattr(cuda_build, what, lambda: "another")
    _, table, _ = report(tmp_path, "--architectures", "sm_90")
    assert {e["architecture"] for e in table["entries"]} == {"sm_90"}


def test_the_report_fails_where_a_rule_is_broken(fakes, tmp_path, capsys):
    needs, _ = fakes
    needs["ctk_forward_bf16_64_plain"] = Needs(255, 8, 8, 16, 0)
    status, _, text = report(tmp_path)
    assert status == 1 and "16 bytes of spills" in text and "16 bytes of spills" in capsys.readouterr().out
    assert "255 +16 / 36 / 2" in text and "Not yet" not in text


def test_entries_survive_the_file(fakes):
    (entry, _) = cuda_resources.measure(cuda_resources.NVIDIA["sm_120"])
    assert resources.read([asdict(entry)]) == {entry.key: entry}
    assert resources.regressions(replace(entry, spills=4), {entry.key: entry})
