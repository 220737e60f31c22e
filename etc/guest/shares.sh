#!/bin/sh
# Mounts folders of the host: SHARES, a line each, of a tag, a folder and ro or rw. So it is at each boot, by /etc/fstab.
# Those that it had before go; their tags, share0 to share7, are nocloud's.
grep '^share[0-7] ' /proc/mounts | while read -r tag folder rest; do umount "$folder"; done
if [ -e /etc/fstab ]; then
    others=$(grep -v '^share[0-7] ' /etc/fstab)
    printf '%s\n' "$others" >/etc/fstab
fi
echo "$SHARES" | while read -r tag folder mode; do
    if [ -z "$tag" ]; then continue; fi
    mkdir -p "$folder" && mount -t virtiofs -o "$mode" "$tag" "$folder" || exit
    echo "$tag $folder virtiofs $mode,nofail 0 0" >>/etc/fstab
done
