#!/usr/bin/env bash
# usage: install.sh FOLDER [PACKAGE [PIP OPTION ...]]: install acmix-deploy into FOLDER/venv; on a Jetson first what JetPack 6 or later leaves out.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2s/^# //p' "$0" >&2; exit 2; }
folder=$1 package=${2:-}
shift $(($# < 2 ? $# : 2))

python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "error: $(python3 --version) is too old; Python 3.10 is needed, which JetPack 6 has" >&2
    exit 3
}

system=(nvidia-jetpack python3-libnvinfer python3-venv cmake g++ make)
if command -v nvpmodel >/dev/null && ! dpkg --status "${system[@]}" >/dev/null 2>&1; then
    echo "packages of the system ..." >&2
    sudo apt-get update
    sudo apt-get install --yes "${system[@]}"
fi

mkdir -p "$folder" 2>/dev/null || sudo install -d -o "$(id -un)" "$folder"
echo "virtual environment ..." >&2
# TensorRT's Python module is a package of the system, and so is pip as a rule.
python=$folder/venv/bin/python
[ -x "$python" ] || python3 -m venv --system-site-packages --without-pip "$folder/venv"
"$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null 2>&1 || {
    echo "error: there is no pip; install it: sudo apt-get install python3-pip python3-venv" >&2
    exit 3
}
echo "packages ..." >&2
pip=("$python" -m pip install --disable-pip-version-check "$@")
source=${package:-$(dirname "$0")/../..}
if [ -x "$folder/venv/bin/acmix-deploy" ]; then # perhaps of this version, and with other files
    "${pip[@]}" --force-reinstall --no-deps "$source"
fi
"${pip[@]}" "${source}[serve,tensorrt]"
[ -n "$package" ] || "$folder/venv/bin/acmix-deploy" doctor
