#!/usr/bin/env bash
# usage: install.sh FOLDER: install what JetPack 6 or later leaves out, and acmix-deploy into FOLDER/venv.
set -euo pipefail
[ $# -eq 1 ] || { sed -n '2s/^# //p' "$0" >&2; exit 2; }
folder=$1

command -v nvpmodel >/dev/null || { echo "error: nvpmodel was not found; run this on a Jetson" >&2; exit 3; }
python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "error: $(python3 --version) is too old; Python 3.10 is needed, which JetPack 6 has" >&2
    exit 3
}

sudo apt-get update
sudo apt-get install --yes nvidia-jetpack python3-libnvinfer python3-venv cmake g++ make

sudo install -d -o "$(id -un)" "$folder"
# TensorRT's Python module is a package of the system.
python3 -m venv --system-site-packages "$folder/venv"
"$folder/venv/bin/pip" install "$(dirname "$0")/../..[serve,tensorrt]"
"$folder/venv/bin/acmix-deploy" doctor
