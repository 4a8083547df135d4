#!/bin/bash
# Makes a Debian package of the built programs: build/package/bakehouse_VERSION_ARCH.deb. The same programs
# at the same commit give the same bytes. Prints the package's path.
#
# A package that was built on Debian 12 runs on Debian 12 and 13.
#
#   PROGRAMS                folder of the programs; default: target/release
#   DEBFULLNAME, DEBEMAIL   maintainer of the package; default: the author of the commit
#   SOURCE_DATE_EPOCH       time of all files; default: the time of the commit
set -euo pipefail
cd "$(dirname "$0")/../.."
umask 022
export LC_ALL=C.UTF-8 TZ=UTC

programs=${PROGRAMS:-target/release}
out=build/package
for program in bakehouse bakehouse-page firstboot firstboot-install; do
    if [ ! -x "$programs/$program" ]; then
        echo "error: cannot find the program $programs/$program" >&2
        echo "  help: make build" >&2
        exit 1
    fi
done

# Version and time are those of the commit. A package of a commit before the tag sorts before the release, one of a
# commit after it sorts after the release.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export SOURCE_DATE_EPOCH
release=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' Cargo.toml)
version=$release
if [ "$(git describe --exact-match --tags HEAD 2>/dev/null)" != "v$release" ]; then
    sign='~'
    if git rev-parse -q --verify "refs/tags/v$release" >/dev/null; then sign=+; fi
    version+="${sign}git$(date --date="@$SOURCE_DATE_EPOCH" +%Y%m%d%H%M%S).$(git rev-parse --short=8 HEAD)"
    git diff --quiet HEAD || version+=.changed
fi
version+=-1
architecture=$(dpkg --print-architecture)
maintainer="${DEBFULLNAME:-$(git log -1 --format=%an)} <${DEBEMAIL:-$(git log -1 --format=%ae)}>"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/debian/bakehouse
doc=$root/usr/share/doc/bakehouse

mkdir -p "$root/DEBIAN"
install -Dm755 -t "$root/usr/bin" "$programs/bakehouse"
install -Dm755 -t "$root/usr/lib/bakehouse" "$programs/bakehouse-page" "$programs/firstboot" "$programs/firstboot-install"

mkdir "$work/man"
"$programs/bakehouse" man "$work/man"
for page in "$work"/man/*.[1-8]; do
    install -Dm644 -t "$root/usr/share/man/man${page##*.}" "$page"
    gzip -9n "$root/usr/share/man/man${page##*.}/${page##*/}"
done
complete() {
    mkdir -p "$(dirname "$root/usr/share/$2")"
    "$programs/bakehouse" completions "$1" >"$root/usr/share/$2"
}
complete bash bash-completion/completions/bakehouse
complete zsh zsh/vendor-completions/_bakehouse
complete fish fish/vendor_completions.d/bakehouse.fish

install -Dm644 -t "$doc" builder/packaging/copyright
builder/packaging/notices.py | gzip -9n >"$work/notices.gz"
install -Dm644 "$work/notices.gz" "$doc/NOTICES.gz"
gzip -9nc CHANGELOG.md >"$work/changelog.gz"
gzip -9nc >"$work/changelog.Debian.gz" <<END
bakehouse ($version) unstable; urgency=medium

  * The changes are in changelog.gz.

 -- $maintainer  $(date --date="@$SOURCE_DATE_EPOCH" --rfc-email)
END
install -m644 -t "$doc" "$work/changelog.gz" "$work/changelog.Debian.gz"
install -Dm644 builder/packaging/lintian-overrides "$root/usr/share/lintian/overrides/bakehouse"

# dpkg-shlibdeps reads the version of libc6 from the symbols that the programs import. It wants a source package.
printf 'Source: bakehouse\n\nPackage: bakehouse\nArchitecture: any\n' >"$work/debian/control"
libraries=$(cd "$work" && dpkg-shlibdeps -O debian/bakehouse/usr/bin/* debian/bakehouse/usr/lib/bakehouse/*)

# In KiB, and 1 for each folder (deb-substvars(5)).
size=$(find "$root/usr" -printf '%y %s\n' | awk '{ n += $1 == "f" ? int(($2 + 1023) / 1024) : 1 } END { print n }')
sed -e "s|@VERSION@|$version|" -e "s|@ARCHITECTURE@|$architecture|" -e "s|@MAINTAINER@|$maintainer|" \
    -e "s|@LIBRARIES@|${libraries#shlibs:Depends=}|" \
    -e "s|@SIZE@|$size|" \
    builder/packaging/control >"$root/DEBIAN/control"
(cd "$root" && find usr -type f -print0 | sort -z | xargs -0 md5sum) >"$root/DEBIAN/md5sums"
find "$root" -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +

mkdir -p "$out"
rm -f "$out"/bakehouse_*.deb
deb=$out/bakehouse_${version}_$architecture.deb
dpkg-deb --root-owner-group -Zxz --build "$root" "$work/bakehouse.deb" >&2
mv "$work/bakehouse.deb" "$deb"
echo "$deb"
