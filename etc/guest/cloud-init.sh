#!/bin/sh
# Ends as `cloud-init status` does since 23.4: with 0 where the guest's cloud-init has done all, 1 where it failed, 2 where
# it left something out; NOT_YET where it is at work. What it says of 1 and 2 are the causes, in cloud-init's own words.
#
# result.json is there once all stages of this boot have ended. `cloud-init status` takes a slow guest seconds, so it is
# asked only where the files name errors, or that one doesn't come within PATIENCE seconds (0: not then either).
command -v cloud-init >/dev/null || exit 0

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

# This boot's warnings, each once, with their causes: exceptions, and what a command that failed wrote just before.
complaints() {
    as_root cat /var/log/cloud-init-output.log 2>/dev/null | awk '
        /^Cloud-init v\./ { count = 0; if (/init-local/) told = bad = 0; next }
        /^ci-info: / || /^[ \t]/ || /DEPRECATED/ || !NF { next }
        { sub(/^[0-9-]+ [0-9:,]+ - /, "") }
        /^[A-Za-z_.]*(Error|Exception): / { tell[told++] = $0; count = 0; next }
        !/\[(WARNING|ERROR|CRITICAL)\]: / { before[count++] = $0; next }
        {
            for (i = count > 3 ? count - 3 : 0; i < count; i++) tell[told++] = before[i]
            count = 0
            tell[told++] = $0
            bad = 1
        }
        END { for (i = 0; bad && i < told && shown < 10; i++) if (!seen[tell[i]]++) { print tell[i]; shown++ } }'
}

cd /run/cloud-init 2>/dev/null || : # it may be too early for the folder, too
waited=0
until [ -e result.json ] || [ -e disabled ] || [ "$waited" -ge "$PATIENCE" ]; do
    waited=$((waited + 1))
    sleep 1
done
[ ! -e disabled ] || exit 0
[ -e result.json ] || [ "$PATIENCE" -gt 0 ] || exit "$NOT_YET"

told=$(complaints)
case $told in *"cloud-init schema"*) # which it leaves to be asked for
    told="$(as_root cloud-init schema --system 2>&1 | sed -n 's/.*schema errors: //p')
$told" ;;
esac
if grep -q '"errors": *\[\]' result.json 2>/dev/null &&
    ! grep -qE '"(WARNING|ERROR|CRITICAL)": *\[' status.json 2>/dev/null; then
    [ "$told" ] || exit 0
    echo "$told"
    exit 2
fi

said=$(cloud-init status --long 2>&1)
status=$?
case $said in *"status: running"* | *"status: not "*) exit "$NOT_YET" ;; esac
[ -e result.json ] || [ $status = 1 ] || exit 0
echo "${told:-$said}"
[ $status != 1 ] || exit 1
exit 2
