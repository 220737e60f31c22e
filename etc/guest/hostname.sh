#!/bin/sh
# Sets the hostname to NAME, now and for the next boot, where it is another.
[ "$(cat /proc/sys/kernel/hostname)" = "$NAME" ] && [ "$(cat /etc/hostname 2>/dev/null)" = "$NAME" ] && exit 0

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

echo "$NAME" | as_root tee /etc/hostname >/dev/null || exit
if command -v hostnamectl >/dev/null && [ -d /run/systemd/system ]; then
    as_root hostnamectl set-hostname "$NAME"
else
    as_root hostname "$NAME"
fi
