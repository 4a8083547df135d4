#!/bin/bash
# Runs the stages of `make test` that need compiled tests, as root. Stages run in parallel where one of them mostly waits:
# `containment` uses less than half of two processors. Prints the output of each stage when it ends, and the
# times of all stages at the end.
#
# tests/run.sh           all stages
# tests/run.sh STAGE...  these stages, one after the other
set -uo pipefail
cd "$(dirname "$0")/.." || exit
LOGS=build/test
mkdir -p "$LOGS"
# Stages in the background do not get Ctrl-C from the terminal.
trap 'trap - INT TERM; kill 0' INT
if [ "$*" != unit ] && [ "$(id -u)" != 0 ]; then
    echo "the tests start containers and namespaces: run them as root, or only \`tests/run.sh unit\`" >&2
    exit 1
fi
: >"$LOGS/times"

tests() { cargo test --release --locked --workspace "$@"; }

# Unit tests, golden files, fuzz seeds, and the examples in the documentation of `fleet`.
unit() {
    tests --no-fail-fast --lib --test fast --test json &&
        cargo test --release --locked --package fleet --doc
}
# Packages whose maintainer scripts attack the build host.
hostile() { tests --test hostile; }
# Fleets with failing nodes, in containers, at the speed of the host.
containers() { tests --test machines -- --test-threads=1 --nocapture fleet::containers containers:: printing::; }
# Nodes that are drained while clients write and read. Not in the list of `make test`: it takes too long.
drain() { tests --test machines -- --test-threads=1 --nocapture drain::; }
# A lost node's journal on the monitors, and every command of the runbooks. Not in the list of `make test`: it takes too
# long.
journals() { tests --test machines -- --test-threads=1 --nocapture journals::; }
# Updates of a node.
upgrades() { tests --test machines -- --test-threads=1 --nocapture upgrade::containers addons::containers; }
# Real etcd, BIRD, nftables and HAProxy. Most of these tests wait.
cluster() { tests --test cluster -- --test-threads=4; }
# Attacks from one compromised machine on the rest of the fleet.
containment() { tests --test machines -- --test-threads=1 --nocapture containment::; }
images() { tests --test images -- --test-threads=1 --nocapture; }
# Each emulated machine uses one processor.
machines() { tests --test machines -- --test-threads=2 --nocapture --skip containers --skip secure_netboot:: boot:: netboot:: rescue:: upgrade::; }

# Runs a stage with its output in a file, and prints that when the stage has ended.
stage() {
    local name=$1 begun=$SECONDS result=ok
    "$@" >"$LOGS/$name.log" 2>&1 || result=FAILED
    printf '%-12s %-6s %5d s\n' "$name" "$result" $((SECONDS - begun)) >>"$LOGS/times"
    printf '\n==== %s: %s after %d s\n' "$name" "$result" $((SECONDS - begun))
    cat "$LOGS/$name.log"
    [ "$result" = ok ]
}

# Ends the script if a stage failed.
require() {
    "$@" && return
    cat "$LOGS/times"
    exit 1
}

# Runs two sequences of stages in parallel.
both() {
    local first=$1 second=$2 failed=0
    (for name in $first; do stage "$name" || exit 1; done) &
    for name in $second; do stage "$name" || { failed=1; break; }; done
    wait $! || failed=1
    return $failed
}

if [ $# -gt 0 ]; then
    for name; do require stage "$name"; done
else
    require stage unit
    require stage hostile
    require both containers upgrades
    require stage cluster
    require both images containment
    require stage machines
fi
cat "$LOGS/times"
