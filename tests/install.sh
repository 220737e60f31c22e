#!/bin/sh
# Installs, through apt, the packages that are named and aren't there; says which. Nothing is done where all are.
# NAME? is wanted, but nothing fails where the distribution hasn't got it; NAME! is not installed: apt only has to know
# where to download it.
set -eu

installed() {
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

known() {
    LC_ALL=C apt-cache policy "$1" 2>/dev/null | grep -q '^  Candidate: [^(]'
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif [ -t 0 ]; then
        sudo "$@"
    else
        sudo -n "$@" # nobody is there to type a password
    fi
}

apt() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 "$@" >&2 </dev/null
}

if ! command -v apt-get >/dev/null; then
    echo "make: no apt-get here, so nothing is installed; needed are the likes of: $*" >&2
    exit 0
fi

missing=
for name in "$@"; do
    case $name in
        *!) known "${name%!}" || missing="$missing $name" ;;
        *) installed "${name%\?}" || missing="$missing $name" ;;
    esac
done
[ -n "$missing" ] || exit 0
# shellcheck disable=SC2086 # a list of words, here and below
if [ "$(id -u)" != 0 ] && ! command -v sudo >/dev/null; then
    needed=$(printf ' %s' $missing | sed 's/ [^ ]*[!?]//g')
    wanted=$(printf ' %s' $missing | sed 's/ [^ ]*!//g; s/?//g')
    [ -z "$wanted" ] || echo "make: packages are missing, and there is no sudo; as root: apt-get install$wanted" >&2
    [ -z "$needed" ] || exit 1
    exit 0
fi

updated=
wanted=
for name in $missing; do
    package=${name%[?!]}
    if [ -z "$updated" ] && ! known "$package"; then
        echo "make: apt-get update" >&2
        apt update
        updated=yes
    fi
    if [ "$package" = "$name" ] || known "$package"; then
        [ "$name" = "$package!" ] || wanted="$wanted $package"
    else
        echo "make: this distribution has no package $package; going on without it" >&2
    fi
done
[ -n "$wanted" ] || exit 0

echo "make: installing$wanted" >&2
# shellcheck disable=SC2086
apt install --no-install-recommends $wanted && exit 0
[ -z "$updated" ] || exit 1
echo "make: the package lists may be old: apt-get update, and once more" >&2
apt update
# shellcheck disable=SC2086
apt install --no-install-recommends $wanted
