#!/bin/sh
# Makes .venv with Ratoon in it, and runs `ratoon setup`, which knows what else is needed. With `dev`
# also what tests and benches need, from Debian and PyPI. Says what it does, and does nothing twice.
set -eu
cd "$(dirname "$0")/.."
kind=${1-}

# What tests and benches use, besides what Ratoon itself does.
for_tests="uidmap busybox-static xfsprogs btrfs-progs gcc zstd ca-certificates git strace \
openssh-client iproute2 nftables passt libvirt-clients libvirt-daemon libvirt-daemon-driver-qemu"

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

# Installs those packages of Debian's that are not there.
debian() {
    missing=
    for package in "$@"; do
        [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] ||
            missing="$missing $package"
    done
    [ -n "$missing" ] || return 0
    say "installing from Debian:$missing"
    as_root apt-get update -qq
    # shellcheck disable=SC2086
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -qq -y --no-install-recommends $missing >/dev/null
}

if [ ! -x .venv/bin/python ]; then
    python=${PYTHON:-python3}
    if ! "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        if ! command -v apt-get >/dev/null; then
            say "Python 3.11 or newer with venv is needed: install it, or name it: make PYTHON=… setup" >&2
            exit 1
        fi
        debian python3 python3-venv
        python=/usr/bin/python3
    fi
    say "making .venv with $("$python" --version)"
    "$python" -m venv .venv
fi

# Of what was installed: for tests, all of it is.
stamp=.venv/.installed${kind:+-$kind}
if ! cmp -s pyproject.toml "$stamp" && ! cmp -s pyproject.toml .venv/.installed-dev; then
    say "installing Ratoon from PyPI into .venv"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${kind:+[$kind]}"
    cp pyproject.toml "$stamp"
fi

# Root has what is missing installed; others are told how to, unless they are to test.
if [ "$(id -u)" -eq 0 ] || [ "$kind" = dev ]; then
    .venv/bin/ratoon setup --yes
else
    .venv/bin/ratoon setup
fi
if [ "$kind" = dev ]; then
    # shellcheck disable=SC2086
    debian $for_tests
fi
