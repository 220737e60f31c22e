#!/bin/sh
# Becomes $3..., the daemon of folder $1, its working directory, in namespaces of its own: there, the folder is /mnt.
#
# Without $2 = rw it is read-only by the kernel, since Debian 12's virtiofsd has no option for that. Not --rbind: other
# file systems that are mounted in it would not be read-only, so the kernel refuses the folder.
if [ "$(pwd -P)" != "$1" ] || [ ! -O . ]; then
    echo "$1 is not the folder that it was" >&2
    exit 1
fi
if ! mount -n --bind . /mnt 2>/dev/null; then
    echo "$1 can't be mounted: perhaps other file systems are mounted in it" >&2
    exit 1
fi
if [ "$2" != rw ]; then mount -n -o remount,bind,ro /mnt || exit; fi
shift 2
exec "$@"
