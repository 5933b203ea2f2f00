#!/bin/sh
# Installs what Ratoon needs, from Debian and PyPI; says what it does, and does nothing twice.
set -eu
cd "$(dirname "$0")/.."

packages="qemu-system-x86 qemu-utils uidmap mmdebstrap busybox-static e2fsprogs xfsprogs btrfs-progs gcc \
zstd util-linux dpkg apt ca-certificates git strace openssh-client iproute2 nftables skopeo \
libvirt-clients libvirt-daemon"

say() { printf 'setup: %s\n' "$*"; }

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        say "root is needed for: $*" >&2
        exit 1
    fi
}

# shellcheck source=/dev/null
distribution=$(. /etc/os-release && echo "$ID-${VERSION_CODENAME-}")

# With this mke2fs reads tars; Debian 13 has another name for it.
case $distribution in
debian-bookworm) packages="$packages libarchive13" ;;
*) packages="$packages libarchive13t64" ;;
esac

# mke2fs loads it to read tarballs; it has another name since Debian 13, Ubuntu 24.04.
case $distribution in
debian-bookworm | ubuntu-jammy) packages="$packages libarchive13" ;;
*) packages="$packages libarchive13t64" ;;
esac

# Whether a package is there, and of the version that it must have at least.
installed() {
    case $1-$distribution in
    qemu-*) least=1:8.2 ;;
    e2fsprogs-debian-bookworm) least=1.47.1 ;;
    *) least=0 ;;
    esac
    state=$(dpkg-query -W -f='${db:Status-Status} ${Version}' "$1" 2>/dev/null) &&
        [ "${state% *}" = installed ] && dpkg --compare-versions "${state#* }" ge "$least"
}

python=${PYTHON:-python3}
if ! "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    packages="$packages python3 python3-venv"
    python=/usr/bin/python3
fi

missing=
for package in $packages; do
    installed "$package" || missing="$missing $package"
done

case "$distribution:$missing " in
debian-bookworm:*" qemu-"* | debian-bookworm:*" e2fsprogs "*) as_root sh src/ratoon/machine/host/backports.sh add ;;
esac

# The guest's kernel is fetched by apt later, so the package lists must be there and be recent.
lists=.venv/.package-lists
if [ -n "$missing" ] || [ -z "$(find "$lists" -mtime -1 2>/dev/null)" ]; then
    say "updating Debian's package lists"
    as_root apt-get update -qq || say "the package lists could not be updated; going on with the old ones"
fi
if [ -n "$missing" ]; then
    say "installing from Debian:$missing"
    # shellcheck disable=SC2086
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -qq -y --no-install-recommends $missing >/dev/null
fi

if [ ! -x .venv/bin/python ]; then
    say "making .venv with $("$python" --version)"
    "$python" -m venv .venv
fi
touch "$lists"
if ! cmp -s pyproject.toml .venv/.pyproject.toml; then
    say "installing Ratoon and its tools from PyPI into .venv"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
    cp pyproject.toml .venv/.pyproject.toml
fi
