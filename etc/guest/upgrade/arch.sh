#!/bin/sh
# Upgrades Arch Linux and its kin.
set -e
pacman -Sy --noconfirm --needed archlinux-keyring
pacman -Su --noconfirm
rm -rf /var/cache/pacman/pkg/*
