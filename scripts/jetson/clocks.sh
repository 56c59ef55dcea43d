#!/usr/bin/env bash
# usage: clocks.sh COMMAND ...: run a command at the highest clocks of the power mode, then restore the clocks.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2s/^# //p' "$0" >&2; exit 2; }
for tool in nvpmodel jetson_clocks; do
    command -v "$tool" >/dev/null || { echo "error: $tool was not found; run this on a Jetson" >&2; exit 3; }
done

# jetson_clocks asks before it overwrites a file, and may fail with exit code 0: its words tell.
clocks() {
    local said
    if ! said=$(sudo jetson_clocks "$@" </dev/null 2>&1) || [[ $said == *Error* ]]; then
        echo "error: jetson_clocks $*: $said" >&2
        return 1
    fi
}

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
sudo nvpmodel -q >&2
clocks --store "$folder/clocks"
trap 'clocks --restore "$folder/clocks"; rm -rf "$folder"' EXIT
clocks
"$@"
