#!/bin/sh
# Runs once in what mmdebstrap has installed, below the folder $1 (mmdebstrap(1), --customize-hook).
set -e

printf 'MODULES=list\nCOMPRESS=lz4\nBUSYBOX=auto\n' >"$1/etc/initramfs-tools/conf.d/nocloud"
printf 'virtio_pci\nvirtio_blk\nvirtio_scsi\nsd_mod\next4\n' >"$1/etc/initramfs-tools/modules"
# INITRD=No has kept the kernel's package from making one before (6 s each).
env -u INITRD chroot "$1" update-initramfs -c -k all

chroot "$1" systemctl --quiet enable systemd-networkd.service

# The prefix names a partition but no disk: the one that was booted from.
mkdir -p "$1/boot/grub/i386-pc"
chroot "$1" grub-mkimage -O i386-pc -o /boot/grub/core.img -p '(,msdos1)/boot/grub' \
    biosdisk part_msdos part_gpt ext2 normal configfile linux boot echo test search search_fs_uuid search_label \
    loadenv gzio minicmd ls cat reboot halt
# As grub-install does: the modules that belong to this core.img, whatever the package becomes later.
cp "$1"/usr/lib/grub/i386-pc/*.mod "$1"/usr/lib/grub/i386-pc/*.lst "$1/boot/grub/i386-pc/"
