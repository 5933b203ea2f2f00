#!/bin/sh
# Debian 12's own QEMU and e2fsprogs are too old: `add` makes apt take those, and what they need, from
# its backports, on the mirror that this host uses already; `remove` undoes that.
set -eu

source=/etc/apt/sources.list.d/ratoon-backports.sources
pin=/etc/apt/preferences.d/ratoon-backports
suite=bookworm-backports

say() { printf 'setup: %s\n' "$*"; }

# Prints where a suite of Debian comes from, as far as its lists are there.
mirror_of() {
    apt-get indextargets --format '$(REPO_URI)' \
        "Codename: $1" 'Component: main' 'Created-By: Packages' | head -n 1
}

case ${1-} in
add)
    [ -n "$(mirror_of bookworm)" ] || apt-get update -qq
    if [ ! -e "$source" ] && [ -z "$(mirror_of "$suite")" ]; then
        mirror=$(mirror_of bookworm)
        if [ -z "$mirror" ]; then
            say "this host's apt has no source of Debian's bookworm: add one" >&2
            exit 1
        fi
        say "adding $suite of $mirror for QEMU and e2fsprogs; \`sh $0 remove\` takes it away"
        cat >"$source" <<EOF
# Added by Ratoon's setup. Only what $pin names is taken from here.
Types: deb
URIs: $mirror
Suites: $suite
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
EOF
    fi
    cat >"$pin" <<EOF
Explanation: Added by Ratoon's setup, for a QEMU of 8.2 or later and an e2fsprogs of 1.47.1 or later.
Package: src:qemu src:seabios src:e2fsprogs
Pin: release n=$suite
Pin-Priority: 990
EOF
    ;;
remove)
    rm -f "$source" "$pin"
    apt-get update -qq
    say "apt takes nothing from $suite for Ratoon any more; what was installed stays"
    ;;
*)
    echo "usage: $0 add|remove" >&2
    exit 2
    ;;
esac
