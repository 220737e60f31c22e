#!/bin/sh
# Keeps the last part of what a guest writes on its serial line: beside its qemu, which appends to console.log without
# end, and every $2 seconds puts what is more than $1 bytes into console.log.1 and empties console.log. It ends with
# qemu, which holds a lock on the file; -E tells the end of a wait for that from a flock that knows no -w.
#
# qemu doesn't notice: it needs no reader. Behind a pipe instead of a file it waits for one that is stopped or slow, all
# of it and not the serial line alone, and each byte of the guest's wakes the reader; the ring buffer that it can have
# for a serial line is gone when it ends. What comes between cp and the emptying is lost.
#
# A guest writes at most 250 KB a second, a byte at a time: two files of 24 MB stay below 64 MB with what comes
# meanwhile.
exec 9<console.log
while flock -E 75 -w "$2" 9; [ $? = 75 ]; do
    if [ "$(stat -c %s console.log)" -gt "$1" ]; then
        cp console.log console.log.1
        : >console.log
    fi
done
