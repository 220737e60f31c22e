#!/bin/sh
# Makes this group's network and VMs known to libvirt; the disks stay in this folder.
#
# LIBVIRT_DEFAULT_URI says to which one. TYPE=qemu: emulated by software, as it is without /dev/kvm anyway.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
case $here in
*[!A-Za-z0-9/._-]*)
    echo "$here: move this folder to where its path has plain characters only" >&2
    exit 1
    ;;
esac
[ -e /dev/kvm ] || TYPE=qemu

define() {
    sed -e "s|/var/lib/libvirt/images/|$here/|" -e "s|<domain type='kvm'>|<domain type='${TYPE:-kvm}'>|" "$here/$1.xml" |
        virsh define /dev/stdin
}

virsh net-define "$here/network.xml"
virsh net-autostart @group@
virsh net-start @group@
%vm define @name@
