# `make demo` builds the hub image and boots it; `make test` runs everything CI runs.

BAKEHOUSE = target/release/bakehouse
DEMO = build/demo

.PHONY: all deps build demo test quick-ha roles rehearse rehearse-containers bench bench-join bench-attack bench-netboot containment fuzz lint clean

all: build

deps:
	builder/host-deps.sh

build:
	cargo build --release --locked --workspace

demo: deps build
	mkdir -p $(DEMO)
	cp profiles/fleets/ha.toml $(DEMO)/fleet.toml
	$(BAKEHOUSE) -C $(DEMO) lock
	$(BAKEHOUSE) -C $(DEMO) up hub-1
	$(BAKEHOUSE) -C $(DEMO) exec hub-1 -- systemctl --no-pager list-dependencies role-hub.target
	@echo "hub-1 runs. Look around:  $(BAKEHOUSE) -C $(DEMO) exec hub-1 -- COMMAND"
	@echo "Switch it off:            $(BAKEHOUSE) -C $(DEMO) down"

test: deps lint build
	# What exported machines are defined with is read by libvirt itself; dnsmasq answers bare ones; one
	# machine has a TPM; updates come from busybox; containers have their WireGuard from a program.
	builder/host-deps.sh libvirt-clients dnsmasq-base iproute2 swtpm busybox wireguard-go mtools nftables bird2 haproxy gpg
	cargo test --release --locked --workspace --lib --test golden --test fuzz
	# Packages that attack the host which builds an image.
	cargo test --release --locked --workspace --test hostile
	# At native speed, as root: a fleet that loses what may die, and updates.
	cargo test --release --locked --workspace --test fleet --test containers --test upgrade -- --test-threads=1 --nocapture containers
	# Real etcd, BIRD, nftables and HAProxy on loopback and in namespaces.
	cargo test --release --locked --workspace --test join --test attack --test mesh --test replay --test eviction \
		--test rollout --test fence --test model --test etcd_access --test ports --test web --test netboot_install \
		-- --test-threads=1
	# Two machines at once have a processor each.
	cargo test --release --locked --workspace --test image --test boot -- --test-threads=1 --nocapture & boot=$$!; \
		cargo test --release --locked --workspace --test netboot --test upgrade -- --test-threads=1 --nocapture --skip containers; \
		others=$$?; wait $$boot && exit $$others

# Beside mkosi and mmdebstrap; as root, on an otherwise idle machine.
bench: deps build
	command -v mmdebstrap >/dev/null || apt-get install -q -y --no-install-recommends mmdebstrap
	target/release/bench

# How fast nodes join.
bench-join: deps build
	target/release/bench-join

# What members notice of strangers who attack the join API; beside HAProxy.
bench-attack: deps build
	builder/host-deps.sh haproxy
	target/release/bench-attack

# How fast bare machines get their images, beside nginx; as root.
bench-netboot: deps build
	builder/host-deps.sh dnsmasq-base nginx-light
	target/release/bench-netboot

# Breaks a fleet in every way there is, and writes what its users noticed; hours.
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

# The same in containers, as root: at the speed of this host.
rehearse-containers: deps build
	builder/host-deps.sh iproute2 wireguard-go mtools
	mkdir -p $(REHEARSAL)
	cp $(FLEET) $(REHEARSAL)/fleet.toml
	$(BAKEHOUSE) -C $(REHEARSAL) lock
	$(BAKEHOUSE) -C $(REHEARSAL) up --containers
	$(BAKEHOUSE) -C $(REHEARSAL) rehearse $(SCENARIOS) --page docs/rehearsal-$(basename $(notdir $(FLEET)))-containers.md --revision "$$(git rev-parse HEAD)"
	$(BAKEHOUSE) -C $(REHEARSAL) down

# Quick HA from blank disks, three of its machines' deaths, a change of its images under load, a version that does
# not work: four hours where two processors are emulated. The two changes of the whole topology too, in containers.
quick-ha: deps build
	builder/host-deps.sh busybox iproute2 wireguard-go mtools
	cargo test --release --locked --workspace --test quick_ha --test rolling -- --test-threads=1 --nocapture

# Every service for real, a restore, rarer machines, an update cut short at every stage: four hours
# where processors are emulated.
roles: deps build
	builder/host-deps.sh iproute2 dnsmasq-base xorriso busybox swtpm wireguard-go
	# The object store of the restore test; it wants Rust 1.92.
	cargo install --locked --root target/tools --version 0.14.1 --features binary s3s-fs
	cargo test --release --locked --workspace --test fleet --test roles --test restore --test bios --test seed --test secure_netboot --test ipxe --test founders --test cuts -- --test-threads=1 --nocapture

# What one taken machine can do, cell by cell; as root, ten minutes. Not in `test` before the evicted hub's cells of a
# fleet with two hubs are what they should be (docs/security.md).
containment: deps build
	builder/host-deps.sh iproute2 wireguard-go mtools
	cargo test --release --locked --workspace --test containment -- --nocapture

# Every fuzz target under libFuzzer; fuzz/README.md.
SECONDS = 300
TARGETS = $$(ls fuzz/seeds)
fuzz:
	command -v cargo-fuzz >/dev/null || cargo install --locked --version 0.13.2 cargo-fuzz
	fuzz/run $(SECONDS) $(TARGETS)

lint:
	cargo fmt --all --check
	cargo clippy --release --locked --workspace --all-targets -- -D warnings

clean:
	rm -rf build target
