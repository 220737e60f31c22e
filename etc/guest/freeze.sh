#!/bin/sh
# Starts the agent, which waits for the guest to be frozen and tells each clone that wakes up who it is.
#
# AGENT: the program. MAC: the network card's address. TOKEN, PATIENCE: what the agent is given.
command -v python3 >/dev/null || {
    echo "it has no python3, which clones that wake up need" >&2
    exit 1
}
[ -c /dev/ttyS1 ] || {
    echo "it has no second serial port" >&2
    exit 1
}
card=$(grep -lix "$MAC" /sys/class/net/*/address | head -n 1)
card=$(basename "${card%/address}")
file=$(mktemp /run/nocloud-agent.XXXXXX)
printf '%s\n' "$AGENT" >"$file"
# Not in the session of this login, which is to be over by then.
if [ -d /run/systemd/system ]; then
    systemd-run --quiet --collect --unit=nocloud-agent python3 -IS "$file" "$card" "$TOKEN" "$PATIENCE"
else
    setsid python3 -IS "$file" "$card" "$TOKEN" "$PATIENCE" </dev/null >/dev/null 2>&1 &
fi
for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30; do
    [ -e "$file" ] || exit 0
    sleep 1
done
echo "the agent doesn't start" >&2
exit 1
