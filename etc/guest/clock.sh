#!/bin/sh
# Sets the clock of a guest that stood still: to its RTC, which goes on with the host's clock, or where there is none to
# NOW, in seconds since 1970, when this script was made.
now=$(cat /sys/class/rtc/rtc0/since_epoch 2>/dev/null) || now=${NOW%.*}
date -s "@$now" >/dev/null
