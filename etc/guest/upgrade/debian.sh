#!/bin/sh
# Upgrades Debian, Ubuntu and their kin. Nobody is there to be asked: changed configuration files stay as they are.
set -e
export DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 APT_LISTCHANGES_FRONTEND=none UCF_FORCE_CONFFOLD=1

set -- -q -y -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=300 \
    -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold
apt-get "$@" -o APT::Update::Error-Mode=any update
apt-get "$@" dist-upgrade
apt-get "$@" autoremove
apt-get "$@" clean
rm -rf /var/lib/apt/lists/* # here and elsewhere: what was downloaded would only make the layer larger
