# Two commands do everything: `make quickstart` and `make test`. Both create the environment first; a second call installs nothing.
PYTHON ?= python3
BIN := .venv/bin
# NNCF compiles its fake-quantize kernels with ninja, found on PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: quickstart test test-arm test-images lint types unit lock clean

quickstart: .venv/installed
	edgestill run recipes/quickstart.yaml

test: lint types .venv/installed build/tensorrt-10 build/tensorrt-11
	pytest -q -n 2 --dist loadfile

lint: .venv/installed
	ruff check .
	ruff format --check .
	lint-imports

types: .venv/installed
	mypy

# What is soon told: without the tests that train, quantize, compile or measure a net.
unit: .venv/installed build/tensorrt-10 build/tensorrt-11
	pytest -q -n 2 --dist loadfile -m "not integration and not system and not gpu"

# TensorRT's Python bindings without its libraries, for tests/targets/test_tensorrt_contract.py: imported over stand-ins, never run.
build/tensorrt-%: tests/targets/standins/tensorrt-%.txt .venv/installed
	rm -rf $@
	$(BIN)/uv pip install --python $(BIN)/python --quiet --target $@ --no-deps --require-hashes -r $<
	touch $@

# axe-core, which looks for what a screen reader or a keyboard cannot use, for the browser tests of tests/benchmarks.
build/axe: tests/benchmarks/axe.txt .venv/installed
	rm -rf $@
	$(BIN)/uv pip install --python $(BIN)/python --quiet --target $@ --no-deps --require-hashes -r $<
	touch $@

# An ARM64 board, emulated: from a bundle over SSH to a measurement. Needs root and, on Debian, openssh-server and qemu-user-static.
test-arm: build/arm
	pytest -q -m system tests/arm

build/arm: tests/arm/build_root.sh tests/arm/wheels.txt .venv/installed
	tests/arm/build_root.sh $@
	touch $@

# Container images built without an engine, and what runs in them (docs/images.md). Needs root and, on Debian, buildah and debootstrap;
# device-arm64 and jetson-arm64 also build/arm and qemu-user-static; train 40 GiB of disk.
IMAGES ?= device jetson train
test-images: .venv/installed
	python -m benchmarks.evidence.images $(IMAGES) --out docs/results/images.json

.venv/installed: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"edgestill needs Python 3.11 or newer; $(PYTHON) is {sys.version.split()[0]}. Set PYTHON=python3.11.")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv==0.13.9'
	$(BIN)/uv pip install --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation -e .
	touch $@

# All locks at once, so that an image has the versions that are tested. OpenVINO's telemetry reports what is used: no image has it.
COMPILE := uv pip compile --universal --python-version 3.11 --generate-hashes --no-annotate --no-header --quiet
lock: .venv/installed
	$(COMPILE) pyproject.toml --extra dev -o requirements.lock
	$(COMPILE) docker/device.in -c requirements.lock --no-emit-package openvino-telemetry -o docker/device.lock
	$(COMPILE) docker/build.in -c requirements.lock -o docker/build.lock

clean:
	rm -rf .venv runs build dist
