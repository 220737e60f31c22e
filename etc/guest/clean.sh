#!/bin/sh
# Takes out of a guest what makes it this one: what the first boot of a clone makes anew, and what is of no use in one.
#
# PLANTED=yes: each clone gets a host key and login keys planted, so those that are here go.
# KEYS: the login keys that were planted here, one a line. INIT: the template's vmInit.
exec 2>/dev/null

if [ -e /etc/machine-id ]; then : >/etc/machine-id; fi
if [ -f /var/lib/dbus/machine-id ] && [ ! -L /var/lib/dbus/machine-id ]; then rm -f /var/lib/dbus/machine-id; fi

# A host key stays where nothing would make another: sshd would not start.
replaced=$PLANTED
for maker in /usr/lib/systemd/system/sshd-keygen.target /usr/lib/systemd/system/sshdgenkeys.service \
    /usr/sbin/sshd-gen-keys-start /etc/systemd/system/nocloud-hostkey.service /etc/alpine-release; do
    if [ -e "$maker" ]; then replaced=yes; fi
done
if [ "$replaced" ]; then rm -f /etc/ssh/ssh_host_*_key /etc/ssh/ssh_host_*_key.pub /etc/dropbear/*_host_key; fi

if [ -d /run/systemd/system ]; then
    systemctl stop systemd-random-seed.service # it would write its file again at shutdown
    journalctl --relinquish-var
fi
if command -v cloud-init >/dev/null; then cloud-init clean --logs; fi
rm -rf /var/lib/cloud/instance /var/lib/cloud/instances /var/log/journal/*
rm -f /var/lib/systemd/random-seed /var/lib/systemd/credential.secret /etc/udev/rules.d/70-persistent-net.rules \
    /var/lib/dhcp/*.lease* /var/lib/dhclient/* /var/lib/NetworkManager/*.lease /var/lib/NetworkManager/secret_key \
    /root/.*_history /home/*/.*_history /root/.lesshst /home/*/.lesshst
find /var/log -type f \( -name '*.gz' -o -name '*.[0-9]' -o -name '*.old' \) -exec rm -f {} +
find /var/log -type f -exec sh -c 'for log; do : >"$log"; done' sh {} +
if grep -q '^share[0-7] ' /etc/fstab; then sed -i '/^share[0-7] /d' /etc/fstab; fi
for mark in /etc/.updated /var/.updated; do if [ -e $mark ]; then touch $mark; fi; done

if [ "$PLANTED" ]; then
    rm -f /etc/ssh/nocloud_keys /etc/ssh/sshd_config.d/00-nocloud.conf
    for file in /root/.ssh/authorized_keys /home/*/.ssh/authorized_keys; do
        [ -f "$file" ] || continue
        grep -vF "$KEYS" "$file" >"$file.kept"
        if [ -s "$file.kept" ]; then cat "$file.kept" >"$file"; else rm -f "$file"; fi
        rm -f "$file.kept"
    done
fi
# The first would win over the name that DHCP brings at the first boot; the second has this one's name, if it is ours.
if [ "$INIT" = systemd ]; then
    name=$(cat /etc/hostname)
    rm -f /etc/hostname
    if grep -q "^127.0.1.1 $name.*nocloud $name\$" /etc/hosts; then rm -f /etc/hosts; fi
fi
sync
exit 0
