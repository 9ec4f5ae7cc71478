# Everything that a fresh Debian or Ubuntu machine needs, each target does for itself.
#
#   make run             boot the image, pull a container image inside, run a command in it
#   make run IMAGE=docker.io/library/alpine CMD='uname -a'
#   make test            all tests and checks
#   make soak            the tests that try chance, as often as they can bear: an hour or so
#
# Not a root user? Building the image and the tests ask sudo.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

# Debian packages: to build and boot the image, and what the tests need besides.
RUN_PACKAGES := busybox-static ca-certificates cpio docker-registry mmdebstrap python3 \
	python3-venv qemu-system-x86 skopeo umoci util-linux xz-utils
TEST_PACKAGES := acl attr bind9-dnsutils buildah catatonit crun dnsmasq-base e2fsprogs \
	fdisk iproute2 libcap2-bin openssh-client procps strace zstd
# What others pull images with, to be measured against.
BENCH_PACKAGES := containerd podman

PYTEST_ARGS ?=

.PHONY: help run test soak lint image bench lock clean setup-run setup-test

help:
	@sed -n 's/^#   //p' $(firstword $(MAKEFILE_LIST))
	@echo 'also: image, lint, bench, lock, clean'

run: setup-run image
	@$(BIN)/python -m initramfs.demo $(if $(IMAGE),--image '$(IMAGE)') $(if $(CMD),-- $(CMD))

test: setup-test image lint
	$(SUDO) $(BIN)/python -m pytest $(PYTEST_ARGS)

soak: setup-test image
	$(SUDO) env INNKEEP_ROUNDS=soak $(BIN)/python -m pytest -o timeout=7200 $(PYTEST_ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

image: setup-run
	@$(SUDO) $(BIN)/python -m initramfs.build

bench: setup-test image
	@$(call install_packages,$(BENCH_PACKAGES))
	$(SUDO) $(BIN)/python -m benchmarks

lock: setup-run
	initramfs/lock-python $(BIN)/uv
	$(SUDO) $(BIN)/python -m initramfs.build --lock

clean:
	$(SUDO) rm -rf build .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

setup-run: $(VENV)/installed
	@$(call install_packages,$(RUN_PACKAGES))

# Until bookworm virtiofsd came with QEMU, since then it is a package of its own.
setup-test: setup-run
	@$(call install_packages,$(TEST_PACKAGES))
	@[ -e /usr/lib/qemu/virtiofsd ] || { $(call install_packages,virtiofsd); }

# The hashes in the lock are what makes this installation the one that was tested.
$(VENV)/installed: requirements/dev.txt pyproject.toml
	@$(call install_packages,python3-venv)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "innkeep: $$($(PYTHON) --version) is too old, 3.11 or newer is needed; give another with PYTHON=" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# Installs the Debian packages among $(1) that are missing, or says in one line what cannot be had.
define install_packages
	missing=$$(for package in $(1); do \
		dpkg-query --show --showformat='$${db:Status-Status}\n' "$$package" 2>/dev/null | grep -qx installed || echo "$$package"; \
	done); \
	[ -z "$$missing" ] || { \
		command -v apt-get >/dev/null || { echo "innkeep: install these first (no apt-get here):" $$missing >&2; exit 1; }; \
		[ -z "$(SUDO)" ] || command -v sudo >/dev/null || { echo "innkeep: run as root, or install sudo; missing packages:" $$missing >&2; exit 1; }; \
		echo "installing Debian packages:" $$missing; \
		{ $(SUDO) apt-get update -qq && \
		  $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing >/dev/null; } || \
		{ echo "innkeep: apt could not install:" $$missing >&2; exit 1; }; \
	}
endef
