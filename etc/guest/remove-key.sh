#!/bin/sh
# Takes the public ssh KEY out of wherever it lets somebody in.
for file in /root/.ssh/authorized_keys /home/*/.ssh/authorized_keys /etc/dropbear/authorized_keys; do
    [ -f "$file" ] || continue
    grep -vF "$KEY" "$file" >"$file.kept" || [ $? = 1 ] || exit 1
    cat "$file.kept" >"$file" && rm "$file.kept" || exit 1
done
