#!/bin/bash
# Installs the Debian package in clean trees of Debian 12 and 13, and makes a fleet there as an ordinary user: `init`,
# `check` and `lock`, and a build of the hub's image on Debian 12. `make package-test` runs it, as root.
#
#   tests/package.sh build/package/bakehouse_*.deb
set -euo pipefail
cd "$(dirname "$0")/.."
deb=$(realpath "$1")
trees=$PWD/build/package-test
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8

say() { echo "package-test: $* (${SECONDS} s)"; }

# The trees reach the archive as this host does.
uri=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' | head -n 1)
[ -n "$uri" ] || {
    echo "apt has no lists of Debian's archive: run \`apt-get update\`" >&2
    exit 1
}
rm -rf "$trees"
mkdir -p "$trees"
trap 'rm -rf "$trees"' EXIT
apt-config dump | grep -E '^Acquire::(https?|Check|Retries|ForceIPv)' | grep -v '"";$' >"$trees/apt.conf" || :

# Runs a command as root in a tree, in namespaces of its own. The tree is the root of the mount namespace, because the
# kernel creates no user namespaces in a chroot.
enter() {
    tree=$1
    shift
    # shellcheck disable=SC2016  # the inner shell expands it
    unshare --mount --pid --fork --kill-child env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 \
        DEBIAN_FRONTEND=noninteractive bash -euc '
            mount --make-rprivate /
            mount --bind "$0" "$0"
            mount -t proc proc "$0/proc"
            mount --rbind /dev "$0/dev"
            mount -t tmpfs tmpfs "$0/tmp"
            cd "$0"
            mkdir -p mnt/host
            pivot_root . mnt/host
            umount -l /mnt/host
            exec "$@"' "$tree" "$@"
}

# The same bytes twice.
cp "$deb" "$trees/"
again=$(builder/packaging/deb.sh)
cmp "$trees/${deb##*/}" "$again"
say "the same programs give the same package"

lintian --fail-on error,warning --allow-root "$deb"
say "lintian accepts it"

for suite in bookworm trixie; do
    tree=$trees/$suite
    mmdebstrap --quiet --mode=root --variant=minbase --aptopt="$trees/apt.conf" \
        --customize-hook="copy-in /etc/resolv.conf /etc" "$suite" "$tree" "deb $uri $suite main"
    say "$suite: a clean tree"
    cp "$deb" "$tree/bakehouse.deb"
    enter "$tree" apt-get update -qq
    # All recommended and suggested packages exist there.
    more=$(dpkg-deb --field "$deb" Recommends Suggests | sed 's/^[^:]*://; s/,//g')
    # shellcheck disable=SC2086  # a list of words
    enter "$tree" apt-get install -qq --simulate --no-install-recommends /bakehouse.deb $more >/dev/null
    # The dependencies suffice for a build.
    enter "$tree" apt-get install -qq --no-install-recommends /bakehouse.deb >"$trees/apt.log" 2>&1 || {
        cat "$trees/apt.log" >&2
        exit 1
    }
    say "$suite: installed"
    # Debian's adduser and useradd give an ordinary user a range of subordinate ids.
    enter "$tree" useradd --create-home --shell /bin/bash baker
    as_user() { enter "$tree" setpriv --reuid=baker --regid=baker --init-groups env HOME=/home/baker bash -euc "cd && $1"; }
    as_user 'bakehouse init acme && bakehouse -C acme check && bakehouse -C acme lock && test -s acme/bakehouse.lock'
    say "$suite: init, check, lock"
    enter "$tree" test -s /usr/share/man/man1/bakehouse.1.gz
    as_user '. /usr/share/bash-completion/completions/bakehouse && complete -p bakehouse'
    if [ "$suite" = bookworm ]; then
        as_user 'bakehouse -C acme build hub && cd acme/build/hub && sha256sum --check SHA256SUMS'
        say "$suite: build hub"
    fi
    enter "$tree" apt-get purge -qq bakehouse >/dev/null
    left=$(cd "$tree" && find usr -path '*bakehouse*')
    if [ -n "$left" ]; then
        echo "error: apt purge bakehouse left files in $suite:" "$left" >&2
        exit 1
    fi
    rm -rf "$tree"
done
say "passed"
