# make help lists the targets. Each installs, through apt, what it needs and what isn't there, and says so.

# Debian's own Python: the one that its python3-venv belongs to.
PYTHON ?= $(or $(wildcard /usr/bin/python3),python3)
VENV := build/test-venv
BIN := build/bin
SHELL := /bin/sh
export PYTHON

# Packages of Debian and Ubuntu; ? and !: see tests/install.sh.
FOR_BUILD := python3 python3-venv
FOR_VMS := qemu-system-x86 qemu-utils dnsmasq-base iproute2 openssh-client util-linux passt? nftables?
FOR_TEMPLATES := mmdebstrap e2fsprogs uidmap debian-archive-keyring?
FOR_CHECKS := shellcheck systemd bash zsh fish mandoc
FOR_TESTS := zstd xz-utils fdisk iptables mtools syslinux isolinux syslinux-common xorriso zip unzip rsync git openssh-sftp-server bash-completion man-db groff-base python3-yaml virtiofsd? ovmf swtpm linux-image-cloud-amd64! busybox-static! dropbear-bin! locales!
FOR_LONG_TESTS := xfsprogs btrfs-progs qemu-system-arm qemu-efi-aarch64 qemu-user-static? arch-test chromium-headless-shell? libvirt-clients libvirt-daemon libvirt-daemon-driver-qemu libxml2-utils lxd! lxd-client! libdqlite0! libraft2! liblxc1! squashfs-tools! attr!
FOR_BENCH := curl xz-utils
SOURCES := nocloud.py build.sh pyproject.toml $(shell find etc systemd -type f)

# Where `make install` installs. DESTDIR is for packaging: only the files, below that folder; the host stays as it is.
PREFIX ?= /usr/local
DESTDIR ?=
SETUP = setup --prefix='$(PREFIX)' $(if $(DESTDIR),--destdir='$(DESTDIR)')

# What is made in a checkout belongs to whoever the checkout belongs to, under sudo too: root leaves nothing in it.
ME := $(shell id -u)
OWNER := $(shell stat -c %u .)
AS_OWNER := $(if $(filter-out $(OWNER),$(ME)),$(if $(filter 0,$(ME)),setpriv --reuid=$(OWNER) --regid=$(shell stat -c %g .) \
    --clear-groups env HOME="$$(getent passwd $(OWNER) | cut -d: -f6)"))

.DEFAULT_GOAL := $(if $(filter 0,$(ME)),install,build)
.PHONY: build install uninstall demo test test-all check check-catalogue docs bench bench-warm clean help
.PHONY: install-for-build install-for-vms install-for-templates install-for-checks install-for-tests install-for-long-tests install-for-bench
.DELETE_ON_ERROR:
.NOTPARALLEL:

build: nocloud.pyz ## make nocloud.pyz, the one file that nocloud is (the default)

install: LOOK = $(PYTHON) -IBS nocloud.py $(SETUP) --check # before anything is built
install: nocloud.pyz ## put it on this host, as root (the default under sudo); PREFIX=/usr/local DESTDIR=
	@$(PYTHON) -IS nocloud.pyz $(SETUP)

uninstall: ## take away what install put there
	@$(PYTHON) -IBS $(or $(wildcard nocloud.pyz),nocloud.py) $(SETUP) --undo

demo: install-for-vms install-for-templates nocloud.pyz ## a template, three VMs, ssh, ansible; all gone at the end but the template
	@mkdir -p $(BIN)
	@./nocloud.pyz links $(BIN)
	@$(PYTHON) tests/demo.py $(BIN)

# On two processors: some guests boot while others shut down; long tests have more guests. PYTEST=-n0 is one process.
PROCESSES := 3

test: $(VENV)/done install-for-vms install-for-templates install-for-checks install-for-tests nocloud.pyz ## the tests, linters among them
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/python -m pytest --numprocesses=$(PROCESSES) --dist=loadfile --no-loadscope-reorder $(PYTEST)

test-all: PYTEST += --long
test-all: PROCESSES := 2
test-all: install-for-long-tests test ## the long tests too

check: $(VENV)/done install-for-checks ## the linters only, each language's own
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/python -m pytest tests/test_lint.py

check-catalogue: ## ask the catalogue's real servers (needs the Internet)
	@$(PYTHON) tests/check_catalogue.py

docs: ## write README.md's tables, and the manual page's lists, from what nocloud.py declares
	@$(AS_OWNER) $(PYTHON) -B tests/docs.py

bench: install-for-vms install-for-bench nocloud.pyz ## measure the speed budgets; fails over one
	@$(PYTHON) tests/bench.py nocloud.pyz

bench-warm: install-for-vms install-for-templates nocloud.pyz ## measure clones that wake up against clones that boot
	@$(PYTHON) tests/bench_warm.py nocloud.pyz

clean: ## remove what was made here
	rm -rf build dist nocloud.pyz nocloud.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -rf __pycache__ tests/__pycache__

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

nocloud.pyz: $(SOURCES)
	@$(LOOK)
	@tests/install.sh $(FOR_BUILD)
	$(AS_OWNER) ./build.sh

# The requirements are read from pyproject.toml: to install the project itself would need another build tool.
$(VENV)/done: pyproject.toml | install-for-build
	$(PYTHON) -m venv $(VENV)
	sed -n '/^test = \[/ s/[^"]*"\([^"]*\)"[^"]*/\1\n/gp' pyproject.toml >$(VENV)/requirements.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $(VENV)/requirements.txt
	@touch $@

install-for-build:
	@tests/install.sh $(FOR_BUILD)

install-for-vms:
	@tests/install.sh $(FOR_VMS)

install-for-templates:
	@tests/install.sh $(FOR_TEMPLATES)

install-for-checks:
	@tests/install.sh $(FOR_CHECKS)

install-for-tests:
	@tests/install.sh $(FOR_TESTS)

install-for-long-tests:
	@tests/install.sh $(FOR_LONG_TESTS)

install-for-bench:
	@tests/install.sh $(FOR_BENCH)
