#!/bin/sh
# Mounts folders of the host: SHARES, a line each, of a tag, a folder and ro or rw. So it is at each boot, by /etc/fstab.
# Those that it had before go; their tags, share0 to share7, are nocloud's.
# Each login may come here, so one at a time; Debian's busybox alone has no flock.
if command -v flock >/dev/null; then exec 9</etc && flock 9 || exit; fi
grep '^share[0-7] ' /proc/mounts | while read -r tag folder _ options _; do
    echo "$SHARES" | grep -qxF "$tag $folder ${options%%,*}" || umount "$folder"
done
touch /etc/fstab
fstab=$(grep -v '^share[0-7] ' /etc/fstab || [ $? = 1 ]) || exit
while read -r tag folder mode; do
    if [ -z "$tag" ]; then continue; fi
    if ! grep -q "^$tag $folder virtiofs ${mode}[, ]" /proc/mounts; then
        mkdir -p "$folder" && mount -t virtiofs -o "$mode" "$tag" "$folder" || exit
    fi
    fstab="$fstab
$tag $folder virtiofs $mode,nofail 0 0"
done <<END
$SHARES
END
# Written whole beside it (cat tells if the disk is full), with its owner and mode, and only then in its place.
new=/etc/fstab.nocloud
cp -p /etc/fstab $new && printf '%s\n' "$fstab" | cat >$new && mv $new /etc/fstab
