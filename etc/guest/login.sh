#!/bin/sh
# Lets KEYS, one a line, log in, whatever user-data says: sshd reads them in FILE, before what users have. LINE: the line
# of sshd_config(5) that says so.
#
# It is a boothook: cloud-init runs it at each boot, early, even where nothing else of user-data can be read.
umask 022
mkdir -p /etc/ssh/sshd_config.d
printf '%s\n' "$KEYS" >"$FILE.new" && mv "$FILE.new" "$FILE"
printf '%s\n' "$LINE" >/etc/ssh/sshd_config.d/00-nocloud.conf

# The first value counts. Before OpenSSH 8.2 there is no Include; and where it is, it stands first.
config=/etc/ssh/sshd_config
if [ -f $config ] && ! grep -qi '^[[:space:]]*include.*sshd_config\.d' $config && ! grep -qxF "$LINE" $config; then
    { printf '%s\n' "$LINE" && cat $config; } >$config.new && cat $config.new >$config
    rm -f $config.new
fi

command -v restorecon >/dev/null && restorecon -R /etc/ssh
# Where it isn't started after cloud-init.
[ ! -s /run/sshd.pid ] || kill -HUP "$(cat /run/sshd.pid)"
