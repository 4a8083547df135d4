#!/bin/bash
# `make demo`: Odoo on three machines of this host. One of them loses its power while you use Odoo.
#
#   builder/demo.sh               the machines are containers; needs root, and asks sudo for it
#   builder/demo.sh --machines    the machines are virtual; needs no root
#
# BAKEHOUSE names an installed `bakehouse`. Without it, the script installs what is missing and compiles.
set -euo pipefail
cd "$(dirname "$0")/.."
fleet=build/demo

# Seconds of each step at the first run: two processors, a download of 5 MB/s. Their sum is the estimate.
declare -A about=([packages]=60 [compile]=180 [choose]=90 [images]=75 [start]=45 [failure]=90)
steps=(packages compile images start failure)
[ -z "${BAKEHOUSE:-}" ] || steps=(choose images start failure)
kind=containers
case "${1:-}" in
    "") ;;
    --machines) kind=machines ;;
    *)
        sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
        exit 2
        ;;
esac
terminal=no
[ ! -t 1 ] || [ ! -t 2 ] || terminal=yes
work=$(mktemp -d)
root=()
started=no
number=0

# --- output -----------------------------------------------------------------------------------------------------------

fail() {
    printf 'error: %s\n  help: %s\n' "$1" "$2" >&2
    exit 1
}

ended() {
    status=$?
    trap - EXIT INT TERM
    # shellcheck disable=SC2046  # one argument for each job
    "${root[@]}" kill $(jobs -p) 2>/dev/null || :
    # The job first ends its command.
    [ -z "${download:-}" ] || wait "$download" 2>/dev/null || :
    rm -rf "$work"
    if [ "$status" != 0 ] && [ $started = yes ]; then
        printf '\nMachines of the demo may still run. To stop them:  %s down\n' "$shown" >&2
    fi
    exit "$status"
}
trap ended EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Prints a duration of so many seconds for people.
duration() { if [ "$1" -lt 100 ]; then echo "$1 s"; else echo "$((($1 + 30) / 60)) min"; fi; }
# Prints the milliseconds since the epoch.
now() {
    local micros=${EPOCHREALTIME/[.,]/}
    echo "${micros%???}"
}
# Prints milliseconds as seconds.
seconds() { printf '%d.%d s' $(($1 / 1000)) $(($1 % 1000 / 100)); }

# Prints the estimate of the steps from number $1 on.
rest() {
    local sum=0 name
    for name in "${steps[@]:$1}"; do sum=$((sum + about[$name])); done
    duration $sum
}
finish() { [ $number = 0 ] || printf '[%d/%d] took %s\n' $number ${#steps[@]} "$(duration $((SECONDS - began)))"; }
# Starts a step: prints its number, its estimate, and the estimate of what follows.
step() {
    finish
    number=$((number + 1))
    began=$SECONDS
    local after=""
    [ $number = ${#steps[@]} ] || after=", then $(rest $number) more"
    printf '\n[%d/%d] %s (about %s%s)\n' $number ${#steps[@]} "$2" "$(duration "${about[$1]}")" "$after"
}
# Prints a line with the time of day.
say() {
    [ $terminal = no ] || printf '\r\033[K'
    printf '    %(%H:%M:%S)T  %s\n' -1 "$1"
}
# Runs a command, and shows the last line of its output; if the command fails, the whole output.
logged() {
    local log=$work/log status=0
    "$@" >"$log" 2>&1 </dev/null &
    local pid=$!
    while [ $terminal = yes ] && [ -e /proc/$pid ]; do
        printf '\r\033[K%7d s  %s' $((SECONDS - began)) "$(tail -n1 "$log" | tr -d '[:cntrl:]' | cut -c1-80)"
        sleep 0.3
    done
    wait $pid || status=$?
    [ $terminal = no ] || printf '\r\033[K'
    [ $status = 0 ] || fail "$1 failed: $(cat "$log")" "run \`$*\`"
}

# --- what this host can do --------------------------------------------------------------------------------------------

has_kernel() { sh -c "$2" || { "${root[@]}" modprobe -q "$1" && sh -c "$2"; }; }
# Prints why containers do not run on this host, `|`, and the fix.
obstacle() {
    local old="use a kernel of Debian 12 or 13"
    if [ "$(id -u)" != 0 ] && [ ${#root[@]} = 0 ]; then
        echo "they need root, and this host has no sudo|become root"
    elif ! grep -q '^ *0 *0 *4294967295$' /proc/self/uid_map; then
        echo "root is mapped to an ordinary user of the host|leave this container"
    elif ! grep -q ' cgroup2 ' /proc/self/mounts; then
        echo "this host has not mounted cgroup v2|boot it with systemd.unified_cgroup_hierarchy=1"
    elif ! "${root[@]}" unshare --mount --net --pid --uts --ipc --cgroup --fork true 2>/dev/null; then
        echo "root cannot create namespaces here|leave this container, or make it a privileged one"
    elif ! has_kernel erofs "grep -qw erofs /proc/filesystems"; then
        echo "the kernel has no erofs|$old"
    elif ! has_kernel loop "test -e /dev/loop-control"; then
        echo "the kernel has no loop devices|$old"
    elif ! has_kernel tun "test -e /dev/net/tun"; then
        echo "the kernel has no TUN devices|$old"
    fi
}

if [ $kind = containers ]; then
    if [ "$(id -u)" != 0 ] && command -v sudo >/dev/null; then
        echo "Containers need root, so sudo may ask for your password. Without root: make demo MACHINES=1"
        sudo -v || fail "sudo gives no root" "run \`make demo MACHINES=1\`, which starts virtual machines"
        root=(sudo)
    fi
    reason=$(obstacle)
    if [ -n "$reason" ]; then
        fail "containers do not run here: ${reason%|*}" "${reason#*|}
        or run \`make demo MACHINES=1\`: virtual machines, which without KVM are up to ten times as slow"
    fi
else
    echo "If KVM does not work here, QEMU emulates the processors, and the machines are up to ten times as slow."
    [ -w /dev/kvm ] || about+=([start]=600 [failure]=600)
fi
free=$(df --output=avail -B1000000000 . | tail -n1 | tr -d " ")
[ "$free" -ge 10 ] || [ -e $fleet ] || fail "the disk has only$free GB free" "make 10 GB free"

# --- the demo ---------------------------------------------------------------------------------------------------------

# Where `make demo-build` puts it.
bakehouse=${BAKEHOUSE:-target/demo/bakehouse}
shown="${root[*]:+sudo }$bakehouse -C $fleet"
bake() { "${root[@]}" "$bakehouse" -C $fleet "$@"; }

[ -n "${BAKEHOUSE:-}" ] || command -v cargo >/dev/null ||
    fail "cannot find \`cargo\`" "install Rust 1.89 or newer, for example with https://rustup.rs"

echo "Bakehouse demo: Odoo on three machines, of which one loses its power."
echo "It takes about $(rest 0) on two processors, and less the second time. Ctrl-C ends it."

# Makes the fleet. Its folder gets its name last, so that an interrupted demo does not leave another fleet there.
new_fleet() {
    [ ! -e $fleet/fleet.toml ] || return 0
    "${root[@]}" rm -rf build/new-demo
    "${root[@]}" mkdir -p build/new-demo
    "${root[@]}" "$bakehouse" -q init "build/new-demo/$(basename $fleet)"
    "${root[@]}" cp builder/demo.toml "build/new-demo/$(basename $fleet)/fleet.toml"
    "${root[@]}" mv -T "build/new-demo/$(basename $fleet)" $fleet
    "${root[@]}" rmdir build/new-demo
}
# Chooses the version of every Debian package, and downloads the packages. In a background job, the signal that ends the
# job also ends its command.
choose() {
    local verb command=""
    trap '"${root[@]}" kill "$command" 2>/dev/null; exit 143' TERM
    for verb in lock fetch; do
        "${root[@]}" "$bakehouse" -C $fleet "$verb" &
        command=$!
        wait $command || return
    done
}
if [ -z "${BAKEHOUSE:-}" ]; then
    step packages "install the Debian packages that are missing"
    packages=(curl)
    [ $kind = machines ] || packages+=(iproute2 wireguard-go)
    logged builder/host-deps.sh "${packages[@]}"
    step compile "compile Bakehouse, then the agent while the Debian packages of the image are downloaded"
    make --no-print-directory demo-build BINS=bakehouse
    new_fleet
    choose >"$work/choose" 2>&1 &
    download=$!
    make --no-print-directory demo-build
    say "wait for the download"
    wait $download || fail "the download failed: $(cat "$work/choose")" "run \`make demo\` again"
    sed 's/^ */    /' "$work/choose"
else
    step choose "choose the version of every Debian package, and download them"
    new_fleet
    bake lock
    bake fetch
fi
step images "build the image of the three machines"
bake build

step start "start the three machines, and wait for Odoo"
started=yes
up=(up)
[ $kind = machines ] || up+=(--containers)
bake "${up[@]}" >/dev/null

look() { bake status >"$work/status.new" && mv "$work/status.new" "$work/status"; }
primary() { grep -m1 -w primary "$work/status" | cut -d' ' -f1; }
look
victim=$(primary) || fail "no machine has the primary" "run \`$shown status\`"
# Of another machine than the one that loses its power. The address ends as the machine's mesh address.
host=$(awk -v victim="$victim" '$2 ~ /hub/ && $1 != victim { sub(/.*\./, "", $3); print $3; exit }' "$work/status")
url=$(grep -o "https://127[0-9.]*\.$host:[0-9]*/" "$work/status" | head -n1)
password=$("${root[@]}" grep -o '"odoo_admin": *"[^"]*"' $fleet/fleet.key | cut -d'"' -f4)
# Only nodes and the operator know the authority that signed the certificate.
page() { curl --silent --insecure --max-time "$1" --cookie "$work/session" --cookie-jar "$work/session" "${@:2}"; }
rpc() { page "$1" --header 'Content-Type: application/json' --data @- "$url$2" | grep -q '"uid": *[0-9]'; }
until page 20 "${url}web/login" | grep -q 'name="password"'; do
    [ $((SECONDS - began)) -lt 900 ] || fail "Odoo's login page does not appear at $url" "run \`$shown report\`"
    sleep 1
done
# On standard input, because other users of this host can read arguments.
log_in() { rpc 60 web/session/authenticate <<<'{"params":{"db":"odoo","login":"admin","password":"'"$password"'"}}'; }
log_in || log_in || fail "Odoo refuses the password of \`admin\`" "run \`$shown report\`"

access="        $url
        user      admin
        password  $password"
tunnel=${url#https://}
cat <<END

    Odoo runs. Open it in a browser of this host. The browser warns you, because the fleet signed the certificate.

$access

    From another host, run \`ssh -L 8443:${tunnel%/} HOST\` first, and open https://localhost:8443/.

$(sed 's/^/    /' "$work/status")
END
if [ $terminal = yes ] && [ -t 0 ]; then
    printf '\n    Log in and click around. The power of %s is cut in 60 s, or when you press Enter. ' "$victim"
    read -r -t 60 || echo
fi

step failure "cut the power of $victim, the primary of the database, while clients use Odoo and PostgreSQL"
now >"$work/pages"
"${root[@]}" "$bakehouse" -C $fleet rehearse db >"$work/table" 2>"$work/rehearsal" </dev/null &
rehearsal=$!
# A user of this host, who has logged in and loads one page after the other.
(while :; do
    rpc 5 web/session/get_session_info <<<'{}' && now >>"$work/pages"
    sleep 0.2
done) &
(while :; do
    look 2>/dev/null || :
    sleep 0.3
done) &

last=$(cat "$work/pages") count=0 longest=0 cut=no successor=none
while [ -e /proc/$rehearsal ]; do
    sleep 0.2
    mapfile -t -s $((count + 1)) pages <"$work/pages"
    count=$((count + ${#pages[@]}))
    for time in "${pages[@]}"; do
        wait=$((time - last)) last=$time
        [ $wait -le $longest ] || longest=$wait
        [ $wait -lt 1500 ] || say "Odoo answers again after $(seconds $wait)"
    done
    if [ $cut = no ] && grep -q "^$victim .*\boff\b" "$work/status"; then
        cut=yes
        say "$victim has lost its power"
    fi
    if [ $cut = yes ] && [ "$successor" = none ] && found=$(primary) && [ "$found" != "$victim" ]; then
        successor=$found
        say "$successor is the primary now"
    fi
    wait=$(($(now) - last))
    [ $terminal = no ] || printf '\r\033[K    %(%H:%M:%S)T  Odoo: %d pages; now waiting %s; longest wait %s' -1 \
        $count "$(seconds $wait)" "$(seconds $((wait > longest ? wait : longest)))"
done
[ $terminal = no ] || printf '\r\033[K'
wait $rehearsal || fail "the fleet broke a promise:
$(cat "$work/rehearsal" "$work/table")" "run \`$shown report\`"
say "$victim is back. A user of this host got $count pages, waited at most $(seconds $longest), and is still logged in."
echo
sed 's/^/    /' "$work/table"
finish
cat <<END

Odoo still runs:
$access

    look        $shown status
    more faults $shown rehearse hub app
    stop        $shown down
    remove      ${root[*]:+sudo }rm -rf $fleet
END
started=no
