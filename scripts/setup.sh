#!/usr/bin/env bash
# usage: setup.sh VENV: make a virtual environment with this package and its development tools.
set -euo pipefail
venv=$1
python=${PYTHON:-python3}

command -v "$python" >/dev/null || { echo "error: $python was not found; install Python 3.10 or newer" >&2; exit 3; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "error: $("$python" --version) is too old; Python 3.10 or newer is needed (make PYTHON=python3.11 ...)" >&2
    exit 3
}

if [ ! -x "$venv/bin/pip" ]; then
    rm -rf "$venv"
    if ! "$python" -m venv "$venv" >/dev/null 2>&1; then
        rm -rf "$venv"
        # Debian splits venv off; with pip at hand, virtualenv does the same and needs no root.
        if "$python" -m pip --version >/dev/null 2>&1; then
            "$python" -m pip install --quiet --target build/virtualenv virtualenv
            PYTHONPATH=build/virtualenv "$python" -m virtualenv --quiet "$venv"
        else
            echo "error: $python has neither venv nor pip; run: apt-get install python3-venv" >&2
            exit 3
        fi
    fi
fi

echo "Installing acmix-deploy with PyTorch, ONNX Runtime, Ultralytics and TensorRT-RTX into $venv (about 6 GB, some minutes) ..." >&2
"$venv/bin/pip" install --quiet --disable-pip-version-check --editable '.[dev]'
