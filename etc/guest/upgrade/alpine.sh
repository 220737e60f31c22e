#!/bin/sh
# Upgrades Alpine Linux.
set -e
apk update
apk upgrade
rm -rf /var/cache/apk/*
