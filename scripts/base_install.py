"""Measure what `pip install` of the package alone, without an extra, puts on the disk. Needs an index."""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from scripts import measured

ROOT = Path(__file__).resolve().parents[1]


def size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    measured.add_folder(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        subprocess.run([sys.executable, "-m", "venv", name], check=True)
        packages = next(Path(name).glob("lib/python*/site-packages"))
        before = size(packages)
        subprocess.run([Path(name, "bin/pip"), "install", "--quiet", ROOT], check=True)
        megabytes = (size(packages) - before) / 1e6
        found = {each.name: each.version for each in metadata.distributions(path=[str(packages)])}
    installed = {name: version for name, version in found.items() if name not in ("pip", "setuptools")}
    rows = [[len(installed), megabytes]]
    installed["python"] = platform.python_version()
    columns = {"packages": 0, "MB": 0}
    measured.write(options.into, "install", "Files of the base install", columns, rows, installed=installed)


if __name__ == "__main__":
    main()
