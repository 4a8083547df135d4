#!/bin/bash
# Tries the JSON Schemas with taplo, the checker of editors: it accepts what `bakehouse init` writes and every shipped
# file, and refuses errors. The agent must not contain the schemas. Environment: BIN has the built programs.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$(realpath "${BIN:-target/release}")
taplo=$(realpath -s "${TAPLO:-build/tools/bin/taplo}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export RUST_LOG=error

fail() {
    echo "error: $*" >&2
    exit 1
}

# Checks a file, with the schema that its first line names.
accepted() {
    (cd "$(dirname "$1")" && "$taplo" check --no-auto-config "$(basename "$1")") >"$work/log" 2>&1
}

for from in ha minimal-ha quick-ha; do
    fleet=$work/$from/fleet.toml
    mkdir "$work/$from"
    "$bin/bakehouse" -q init "$work/$from" --from "$from"
    test "$(head -n 1 "$fleet")" = "#:schema ./fleet.schema.json" || fail "init --from $from names no schema"
    accepted "$fleet" || fail "taplo refuses what init --from $from writes: $(cat "$work/log")"
done

# A change of a good file, and what taplo says about it.
cp "$work/ha/fleet.toml" "$work/good.toml"
refuse() {
    sed "$1" "$work/good.toml" >"$fleet"
    ! cmp -s "$work/good.toml" "$fleet" || fail "$1 changes nothing"
    ! accepted "$fleet" || fail "taplo accepts $1"
    grep -qF "$2" "$work/log" || fail "taplo does not name $2: $(cat "$work/log")"
}
fleet=$work/ha/fleet.toml
refuse '0,/count/s//cuont/' "'cuont' was unexpected"
refuse '0,/count = 3/s//count = "3"/' '"3" is not of type "integer"'
refuse 's/^name = .*/name = "Acme"/' '"Acme" does not match'
refuse '$a[image]\nhardware = "baremetal"' '"baremetal"'
refuse '$a[update]\nurl = "updates.example"' '"updates.example" does not match'

# `check` writes the schema of this version, if the first line of fleet.toml names it.
cp "$work/good.toml" "$fleet"
echo '{}' >"$work/ha/fleet.schema.json"
"$bin/bakehouse" -q -C "$work/ha" check >/dev/null
cmp <("$bin/bakehouse" schema fleet) "$work/ha/fleet.schema.json" || fail "check left an old schema"
sed 1d "$work/good.toml" >"$fleet"
echo '{}' >"$work/ha/fleet.schema.json"
"$bin/bakehouse" -q -C "$work/ha" check >/dev/null
test "$(cat "$work/ha/fleet.schema.json")" = '{}' || fail "check wrote a schema that fleet.toml does not name"

for kind in profile overlay; do
    "$bin/bakehouse" schema $kind >"$work/$kind.schema.json"
    git ls-files "profiles/roles/*.toml" "overlays/*/overlay.toml" | grep "/${kind/profile/roles}" >"$work/files"
    while read -r file; do
        (echo "#:schema ./$kind.schema.json" && cat "$file") >"$work/shipped.toml"
        accepted "$work/shipped.toml" || fail "taplo refuses $file: $(cat "$work/log")"
    done <"$work/files"
    test "$(wc -l <"$work/files")" -ge 8 || fail "too few files of kind $kind"
done

# The cargo feature `schema` is for the builder. The linker leaves its code out of the agent.
test -x "$bin/firstboot" || fail "$bin/firstboot is not built"
grep -q "Longest outages that the fleet" "$bin/bakehouse" || fail "the builder lacks the schemas"
! grep -qE "json-schema.org|Longest outages that the fleet" "$bin/firstboot" || fail "the agent contains the schemas"
