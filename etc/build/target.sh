#!/bin/sh
# Runs once in what mmdebstrap has installed, below the folder $1 (mmdebstrap(1), --customize-hook), for $ARCH.
set -e

printf 'MODULES=list\nCOMPRESS=lz4\nBUSYBOX=auto\n' >"$1/etc/initramfs-tools/conf.d/nocloud"
printf 'virtio_pci\nvirtio_blk\nvirtio_scsi\nsd_mod\next4\n' >"$1/etc/initramfs-tools/modules"
# INITRD=No has kept the kernel's package from making one before (6 s each).
env -u INITRD chroot "$1" update-initramfs -c -k all

chroot "$1" systemctl --quiet enable systemd-networkd.service

case $ARCH in
arm64) efi=aa64 ;;
*)
    efi=x64
    # The prefix names a partition but no disk: the one that was booted from.
    mkdir -p "$1/boot/grub/i386-pc"
    chroot "$1" grub-mkimage -O i386-pc -o /boot/grub/core.img -p '(,msdos1)/boot/grub' \
        biosdisk part_msdos part_gpt ext2 normal configfile linux boot echo test search search_fs_uuid search_label \
        loadenv gzio minicmd ls cat reboot halt
    # As grub-install does: the modules that belong to this core.img, whatever the package becomes later.
    cp "$1"/usr/lib/grub/i386-pc/*.mod "$1"/usr/lib/grub/i386-pc/*.lst "$1/boot/grub/i386-pc/"
    ;;
esac

# For UEFI a FAT of 16 MB, boot/esp, with the signed loaders: out of their packages, which would take 40 MB in the guest.
root=$1 uefi=$1/boot/uefi
mkdir "$uefi"
cd "$uefi"
APT_CONFIG=$MMDEBSTRAP_APT_CONFIG apt-get --quiet download shim-signed "grub-efi-$ARCH-signed" mtools
for package in *.deb; do
    dpkg-deb --extract "$package" .
done
set -- usr/lib/shim/shim$efi.efi.signed* # Ubuntu has two of them, the latest one is the first
cp "$1" boot$efi.efi
mv usr/lib/grub/*-efi-signed/grub$efi.efi.signed grub$efi.efi
# What that grub looks for, in EFI/ID: it leads to the root beside it, on whatever disk that is.
cat >grub.cfg <<'END'
regexp --set=1:disk '^([^,]*),' $root
set root=$disk,msdos1
set prefix=($root)/boot/grub
configfile $prefix/grub.cfg
END
id=$(sed -n 's/^ID=//p' "$root/etc/os-release")
tool() {
    chroot "$root" env MTOOLS_SKIP_CHECK=1 /boot/uefi/usr/bin/mtools -c "$@"
}
tool mformat -i /boot/esp -C -T 32768 -h 16 -s 63 -H 2048 ::
tool mmd -i /boot/esp ::EFI ::EFI/BOOT "::EFI/$id"
tool mcopy -i /boot/esp /boot/uefi/boot$efi.efi /boot/uefi/grub$efi.efi ::EFI/BOOT
tool mcopy -i /boot/esp /boot/uefi/grub.cfg "::EFI/$id"
rm -r "$uefi"
