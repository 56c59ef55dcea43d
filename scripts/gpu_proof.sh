#!/usr/bin/env bash
# usage: gpu_proof.sh OUT: what this GPU says of the kernels, in 450 seconds. Writes below OUT and build/ alone.
set -euo pipefail
out=${1:?usage: gpu_proof.sh OUT}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || python=python3
# Before HOME, where Nsight Compute writes, moves:
python=$("$python" -c 'import sys; print(sys.executable)')
PYTHONUSERBASE=$("$python" -c 'import site; print(site.getuserbase())')
export PYTHONUSERBASE
rm -f "$out"/{rows.jsonl,speed.json,steps.json,summary.txt,log.txt,ncu.csv,ncu.ncu-rep}
mkdir -p build/tmp
export HOME=$PWD/build/tmp TMPDIR=$PWD/build/tmp CUDA_CACHE_PATH=$PWD/build/tmp/cuda PYTHONDONTWRITEBYTECODE=1
exec "$python" -m scripts.gpu_proof "$out"
