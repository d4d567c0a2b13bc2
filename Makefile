# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# What .ci/run runs, and the half of it that a developer waits for.
CHECKED := not slow and not gpu and not slurm and not faults
QUICK := $(CHECKED) and not thorough
READY := $(VENV)/.ready
TRITON_READY := $(VENV)/.triton-ready
SERVE_READY := $(VENV)/.serve-ready
HF_TOOLS_READY := $(VENV)/.hf-tools-ready
STORAGE_READY := $(VENV)/.storage-ready
INPUTS_READY := $(VENV)/.inputs-ready

.PHONY: test-mcore-next demo compare faults flags-page fuzz test test-flags test-thorough test-slow test-other-cpus test-gpu slurm-test layouts bench lint clean help

help:
	@echo "make demo       train a small UltraMemV2 model on this machine, in minutes"
	@echo "make compare    train umv2, MoE and dense models of equal cost, and write a report (about 12 minutes)"
	@echo "make test       lint, types and all quick tests"
	@echo "make test-thorough  whole runs in many layouts, and other tests that .ci/run runs, too (about 7 minutes)"
	@echo "make test-flags  every flag of the training program on a tiny model (about a minute)"
	@echo "make faults     kills, damages, full disks, signals, lost ranks: what a run survives, as a table"
	@echo "make test-slow  the tests that take minutes"
	@echo "make fuzz       many damaged files and drawn command lines: a sentence and a non-zero exit, or success"
	@echo "make test-mcore-next  the quick and the thorough tests with the newest megatron-core, in an environment of its own (Python 3.12)"
	@echo "make test-other-cpus  the quick and the thorough tests with the instruction sets of other CPUs (three settings, about 20 minutes each)"
	@echo "make test-gpu   the tests that need a CUDA device"
	@echo "make slurm-test  examples/slurm on a SLURM of two nodes on this machine, as root"
	@echo "make layouts    train in every parallel layout and compare with one rank (about 20 minutes)"
	@echo "make bench      benchmarks of this machine, into docs/performance.md and benchmarks/history; says what became slower"
	@echo "make lint       ruff, mypy and import-linter"
	@echo "make flags-page  write the tables of docs/flags.md from the options"
	@echo "make clean      remove what the demo wrote (runs/demo)"

# Made once, and again when requirements.txt changes.
$(READY): requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $(READY)

# Only the tests of the GPU kernels need it on a CPU machine, and it is large. Without it they are skipped.
$(TRITON_READY): requirements-triton.txt $(READY)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-triton.txt \
		&& touch $(TRITON_READY) || echo "triton could not be installed: the tests of its kernels will be skipped"

# Only the tests of the server need it; without it they are skipped.
$(SERVE_READY): requirements-serve.txt $(READY)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-serve.txt \
		&& touch $(SERVE_READY) || echo "the server's packages could not be installed: its tests will be skipped"

# Only the tests of quantizers and adapters need them. --no-deps, or pip would look for another torch.
$(HF_TOOLS_READY): requirements-hf-tools.txt $(READY)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-hf-tools.txt \
		&& touch $(HF_TOOLS_READY) || echo "peft, bitsandbytes or torchao could not be installed: their tests will be skipped"

# Only the tests of object stores need them; without them they are skipped.
$(STORAGE_READY): requirements-storage.txt $(READY)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-storage.txt \
		&& touch $(STORAGE_READY) || echo "fsspec, s3fs or moto could not be installed: their tests will be skipped"

# Only the tests of some formats of corpora need them; without them they are skipped.
$(INPUTS_READY): requirements-inputs.txt $(READY)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-inputs.txt \
		&& touch $(INPUTS_READY) || echo "pyarrow, lz4, tiktoken or datatrove could not be installed: their tests will be skipped"

demo: $(READY)
	$(PY) tools/demo.py

compare: $(READY)
	mkdir -p runs/compare
	$(PY) tools/demo_corpus.py --output runs/compare/corpus.jsonl
	$(PY) tools/preprocess_data.py --input runs/compare/corpus.jsonl --output-prefix runs/compare/corpus \
		--tokenizer-type ByteLevelTokenizer --append-eod
	$(PY) tools/ablate.py examples/ablations/smallest.yaml --output runs/compare

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache

test: $(READY) $(TRITON_READY) $(SERVE_READY) $(HF_TOOLS_READY) $(STORAGE_READY) $(INPUTS_READY) lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile -m "$(QUICK)"

# With two workers, as above: a file stays on one of them.
test-thorough: $(READY) $(TRITON_READY) $(SERVE_READY) $(HF_TOOLS_READY) $(STORAGE_READY) $(INPUTS_READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile -m "thorough and $(CHECKED)"

# Not with a file for each worker: it is one file.
test-flags: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 tests/functional/test_every_flag.py

test-slow: $(READY) $(TRITON_READY) $(SERVE_READY) $(HF_TOOLS_READY) $(STORAGE_READY) $(INPUTS_READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -m "slow and not faults" --timeout 1800

# The table at its end goes into docs/reliability.md.
faults: $(READY) $(STORAGE_READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 tests/faults --timeout 900

# The same requirements with a newer megatron-core, which needs Python 3.12; pip brings torch for CUDA there (gigabytes).
NEXT_MCORE ?= 0.19.2
NEXT_PYTHON ?= python3.12
NEXT_VENV := .venv-mcore-next
NEXT_READY := $(NEXT_VENV)/.ready-$(NEXT_MCORE)

$(NEXT_READY): requirements.txt
	$(NEXT_PYTHON) -m venv $(NEXT_VENV)
	sed 's/^megatron-core==[^ ]*/megatron-core==$(NEXT_MCORE)/' requirements.txt > $(NEXT_VENV)/requirements.txt
	$(NEXT_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r $(NEXT_VENV)/requirements.txt
	touch $(NEXT_READY)

test-mcore-next: $(NEXT_READY)
	OMP_NUM_THREADS=1 $(NEXT_VENV)/bin/python -m pytest -q -n 2 --dist loadfile -p no:cacheprovider -m "$(CHECKED)" \
		--ignore tests/unit/hf --ignore tests/fuzz --ignore tests/unit/serving

# FUZZ_EXAMPLES inputs for each test, new ones in every run.
FUZZ_EXAMPLES ?= 500
fuzz: $(READY)
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --timeout 3600 tests/fuzz

# ATen, oneDNN and MKL choose their kernels by the CPU; these settings make them choose those of another.
AS_BASELINE := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 UMV2_CPU_ARCH=x86-64
AS_AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 UMV2_CPU_ARCH=x86-64-v3
AS_AVX512 := ATEN_CPU_CAPABILITY=avx512 UMV2_CPU_ARCH=native

test-other-cpus: $(READY) $(TRITON_READY) $(SERVE_READY) $(HF_TOOLS_READY) $(STORAGE_READY) $(INPUTS_READY)
	failed=0; \
	for setting in '$(AS_BASELINE)' '$(AS_AVX2)' '$(AS_AVX512)'; do \
		case "$$setting" in *avx512*) grep -q avx512f /proc/cpuinfo || continue;; esac; \
		echo "with $$setting"; \
		env $$setting OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile -m "$(CHECKED)" || failed=1; \
	done; exit $$failed

# Records on success that --memory-backend auto may take the Triton kernels on such a device.
test-gpu: $(READY)
	$(PY) -m pytest -q tests/gpu
	$(PY) -m umv2_megatron.ops.proven

# Installs SLURM as root where apt-get can; without it the tests are skipped, with the reason.
slurm-test: $(READY)
	command -v slurmctld slurmd munged >/dev/null || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
		apt-get install -y -qq --no-install-recommends slurm-wlm munge; } \
		|| echo "slurm-wlm and munge could not be installed: the tests will be skipped"
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -rs tests/slurm

layouts: $(READY)
	OMP_NUM_THREADS=1 $(PY) tests/functional/layout_matrix.py

bench: $(READY)
	for program in lookup layer step growth preprocess; do \
		$(PY) benchmarks/$$program.py --docs docs/performance.md --history benchmarks/history || exit 1; done
	$(PY) benchmarks/decode_kernels.py --history benchmarks/history

flags-page: $(READY)
	$(PY) -m umv2_megatron.config.flags_page

clean:
	rm -rf runs/demo
