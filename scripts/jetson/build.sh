#!/usr/bin/env bash
# usage: build.sh FOLDER MODEL.onnx [OPTION ...]: plugin and engine in FOLDER; options are those of acmix-deploy build.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2s/^# //p' "$0" >&2; exit 2; }
folder=$1 model=$2
shift 2

acmix_deploy=$folder/venv/bin/acmix-deploy
"$acmix_deploy" plugin build --out "$folder"
"$acmix_deploy" build "$model" --plugin "$folder/libacmix_plugin.so" --timing-cache "$folder/timing.cache" \
    -o "$folder/$(basename "$model" .onnx).engine" "$@"
