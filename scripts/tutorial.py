"""Follow docs/tutorial.md in an empty folder, as a reader does; write down how long it took, and the picture."""

from __future__ import annotations

import argparse
import csv
import os
import re
import resource
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from scripts import measured

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/tutorial.md"
INSTALL = ("git clone ", "python3 -m venv ", ". .venv/", "pip install ")
"""How commands begin that are not run: this environment takes the place of the one that they make."""

MAY_TELL_NOTHING = "acmix-deploy gate check "
"""Ends with 4 where the machine is too busy to tell."""


class Step(NamedTuple):
    """A command, Python to run, or a file to save."""

    section: str
    text: str
    file: str = ""
    """Its name; of what is run, empty."""
    shown: str = ""
    """What the page shows of what a command prints."""
    language: str = "console"


def steps(page: str) -> Iterator[Step]:
    """The blocks ``console``, ``python`` and ``yaml``, in the order of the page."""
    section = ""
    for match in re.finditer(r"^## ([^\n]+)$|^```(console|python|yaml)\n(.*?)^```$", page, re.M | re.S):
        title, language, content = match.groups()
        if title:
            section = title
        elif language == "console":
            for session in re.split(r"^\$ ", content, flags=re.M)[1:]:
                command, _, shown = session.partition("\n")
                yield Step(section, command, shown=shown)
        elif name := re.match(r"# (\S+)\n", content):
            yield Step(section, content, name[1], language=language)
        elif language == "python":
            yield Step(section, content, language=language)


def shell(command: str, folder: Path) -> str:
    """What a command prints.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment(folder), capture_output=True, text=True, check=False
    )
    if done.returncode not in ((0, 4) if command.startswith(MAY_TELL_NOTHING) else (0,)):
        raise RuntimeError(f"{command}\nended with {done.returncode}:\n{done.stdout[-5000:]}\n{done.stderr[-5000:]}")
    return done.stdout


def environment(folder: Path) -> dict[str, str]:
    """With the programs of this environment, this checkout, and Ultralytics' settings for this folder alone."""
    programs = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    return {"YOLO_CONFIG_DIR": str(folder / "settings")} | os.environ | {"PATH": programs, "PYTHONPATH": str(ROOT)}


def follow(folder: Path, run: Callable[[str, Path], str] = shell) -> Iterator[tuple[Step, str]]:
    """Do each step in turn.

    Args:
        folder: empty.
        run: runs a command in a folder and returns what it prints.

    Yields:
        The step and what it printed.
    """
    (folder / "acmix-deploy").symlink_to(ROOT)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    with ExitStack() as servers:
        for step in steps(PAGE.read_text(encoding="utf-8")):
            if step.text.startswith(INSTALL):
                continue
            text, printed = step.text.replace("8000", port), ""
            if step.file:
                (folder / step.file).parent.mkdir(parents=True, exist_ok=True)
                (folder / step.file).write_text(step.text, encoding="utf-8")
            elif step.language == "python":
                (folder / "block.py").write_text(step.text, encoding="utf-8")
                printed = run("python block.py", folder)
            elif step.text.startswith("acmix-deploy serve "):
                server = subprocess.Popen(["bash", "-c", f"exec {text}"], cwd=folder, env=environment(folder))
                servers.callback(server.wait, 60)
                servers.callback(server.terminate)
                await_answer(f"http://127.0.0.1:{port}/readyz")
            else:
                printed = run(text, folder)
            yield step, printed


def await_answer(url: str, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=30).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def trained(folder: Path) -> dict[str, float]:
    """mAP50 and mAP50-95 of the last epoch, by Ultralytics' validator."""
    with (folder / "runs/shapes/results.csv").open(encoding="utf-8") as file:
        *_, last = csv.DictReader(file)
    named = {key.strip(): value for key, value in last.items()}
    return {name: float(named[f"metrics/{name}(B)"]) for name in ("mAP50", "mAP50-95")}


def write(into: Path, folder: Path, took: dict[str, tuple[float, float]]) -> None:
    """Write down what following the page took.

    Args:
        into: folder of what was measured.
        folder: in which it was followed.
        took: CPU seconds and seconds of each section.
    """
    reached = ", ".join(f"{name} {value:.2f}" for name, value in trained(folder).items())
    rows = [
        [name, *seconds, reached if name.endswith("Train") else None]
        for name, seconds in took.items()
        if seconds[1] > 1
    ]
    columns = {"section": None, "CPU s": 0, "s": 0, "reached": None}
    cells = "Each step run once; CPU s is what all cores did, s is how long it took"
    measured.write(into, "tutorial", cells, columns, rows, packages=("ultralytics-opencv-headless",))


def draw(folder: Path, picture: Path) -> None:
    """The first four of the images in which boxes were drawn, side by side and twice as large."""
    import cv2

    row = cv2.hconcat([cv2.imread(str(path)) for path in sorted((folder / "found").glob("*.png"))[:4]])
    large = cv2.resize(row, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    cv2.imwrite(str(picture), large, [cv2.IMWRITE_JPEG_QUALITY, 75])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="new folder to work in")
    measured.add_folder(parser)
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True)
    took: dict[str, tuple[float, float]] = {}
    before = time.monotonic(), cpu_seconds()
    for step, printed in follow(folder):
        now = time.monotonic(), cpu_seconds()
        spent, waited = took.get(step.section, (0.0, 0.0))
        took[step.section] = spent + now[1] - before[1], waited + now[0] - before[0]
        before = now
        print(f"$ {step.file or step.text}\n{printed}", flush=True)
    write(options.into, folder, took)
    draw(folder, ROOT / "docs/tutorial.jpg")


def cpu_seconds() -> float:
    """What commands have used that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
