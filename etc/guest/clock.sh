#!/bin/sh
# Sets the clock to NOW, in seconds since 1970, where it is more than a second off.
[ "$(($(date +%s) - ${NOW%.*}))" -le 1 ] && [ "$((${NOW%.*} - $(date +%s)))" -le 1 ] || date -s "@${NOW%.*}" >/dev/null
