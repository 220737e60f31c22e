#!/bin/sh
# Upgrades Fedora, RHEL, CentOS and their kin.
set -e
if command -v dnf; then
    dnf -y --refresh upgrade
    dnf -q clean all
else
    yum -y update
    yum -q clean all
fi
