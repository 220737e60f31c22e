#!/bin/sh
# Ends with 0 where the guest's cloud-init has ended well, 1 where it failed, NOT_YET where it is at work.
#
# result.json is there once all stages of this boot have ended. `cloud-init status` takes a slow guest seconds, so it is
# asked only where that file names errors, or doesn't come within PATIENCE seconds (0: not then either).
command -v cloud-init >/dev/null || exit 0

cd /run/cloud-init 2>/dev/null || : # it may be too early for the folder, too
waited=0
until [ -e result.json ] || [ -e disabled ] || [ "$waited" -ge "$PATIENCE" ]; do
    waited=$((waited + 1))
    sleep 1
done
[ ! -e disabled ] || exit 0
if grep -q '"errors": *\[\]' result.json 2>/dev/null; then exit 0; fi
[ -e result.json ] || [ "$PATIENCE" -gt 0 ] || exit "$NOT_YET"

# Its exit status is 0 for done, 1 for failed, 2 (since 23.4) for done with warnings.
said=$(cloud-init status --long 2>&1)
status=$?
case $said in *"status: running"* | *"status: not "*) exit "$NOT_YET" ;; esac
[ $status = 1 ] || exit 0

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

echo "$said"
as_root grep -E 'WARN|ERROR|CRITICAL' /var/log/cloud-init.log | tail -n 3
as_root tail -n 3 /var/log/cloud-init-output.log
exit 1
