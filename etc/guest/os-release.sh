#!/bin/sh
# Says what system a guest has (os-release(5)).
cat /etc/os-release 2>/dev/null || cat /usr/lib/os-release
