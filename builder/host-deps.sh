#!/bin/sh
# Installs what the host needs to build and boot images, on Debian 12 or 13. Does nothing
# when all of it is there. Further packages may be named.
set -eu

packages="apt ca-certificates debian-archive-keyring python3-pip gcc libc6-dev make openssl uidmap qemu-system-x86 qemu-utils ovmf cryptsetup-bin socat $*"

missing=""
for p in $packages; do
    dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || missing="$missing $p"
done
[ -z "$missing" ] && exit 0

# All of them, not only the missing: what is there must stay, whatever apt would rather do.
install="apt-get install -q -y --no-install-recommends --no-remove $packages"
sudo=""
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || { echo "as root: $install" >&2; exit 1; }
    sudo=sudo
fi
export DEBIAN_FRONTEND=noninteractive
$sudo apt-get update -q
# shellcheck disable=SC2086  # a list of words
if ! $sudo $install; then
    # A qemu-utils from backports wants its qemu-system-x86 from there, too.
    codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
    uri=$(apt-get indextargets --format '$(REPO_URI) $(CODENAME)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' |
        awk -v c="$codename" '$2 == c { print $1; exit }')
    printf 'Types: deb\nURIs: %s\nSuites: %s-backports\nComponents: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n' \
        "$uri" "$codename" | $sudo tee /etc/apt/sources.list.d/bakehouse-backports.sources >/dev/null
    $sudo apt-get update -q
    # shellcheck disable=SC2086
    $sudo apt-get install -q -y --no-install-recommends --no-remove -t "$codename-backports" $missing
fi
