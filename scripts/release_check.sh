#!/usr/bin/env bash
# usage: release_check.sh PYTHON: all tests, the kernels on all architectures; a skipped test fails it.
set -euo pipefail
log=$(mktemp)
trap 'rm -f "$log"' EXIT
ACMIX_ALL_ARCHITECTURES=1 ACMIX_SOAK=1 "$1" -m pytest -n 2 --dist loadfile --no-loadscope-reorder | tee "$log"
if grep -q '^SKIPPED' "$log"; then
    echo "error: tests were skipped; what they miss is named above" >&2
    exit 1
fi
