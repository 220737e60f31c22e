#!/bin/sh
# Upgrades openSUSE and SLE. ID: as os-release says.
set -e

zypper() {
    command zypper --non-interactive --no-color "$@"
}

zypper refresh
case $ID in *tumbleweed*) how=dup ;; *) how=update ;; esac
status=0
zypper $how --auto-agree-with-licenses || status=$?
if [ $status = 103 ]; then # zypper itself is new, and has to go on
    status=0
    zypper $how --auto-agree-with-licenses || status=$?
fi
case $status in 0 | 10[0-3]) ;; *) exit $status ;; esac # zypper(8), EXIT CODES: 100 to 103 only inform
zypper clean --all
