"""The container file of the server, read and played: there is nothing here that builds it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import onnx.parser
import pytest

from acmix_deploy.cli import commands

CHECKOUT = Path(__file__).parents[2]
FILE = CHECKOUT / "scripts/container/serve.Dockerfile"


def instructions():
    """Each as its word and the rest, lines that go on joined."""
    text = re.sub(r"^#.*\n", "", FILE.read_text(encoding="utf-8"), flags=re.M)
    return [line.partition(" ")[::2] for line in text.replace("\\\n", " ").splitlines() if line]


def of(word):
    return [rest for found, rest in instructions() if found == word]


def health():
    return json.loads(of("HEALTHCHECK")[-1].partition("CMD")[2])


def test_instructions():
    known = {"FROM", "WORKDIR", "COPY", "RUN", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
    assert {word for word, _ in instructions()} <= known
    assert all(re.fullmatch(r"python:3\.1[0-4]-slim( AS \w+)?", image) for image in of("FROM"))
    (user,) = of("USER")
    assert int(user) > 0
    order = [word for word, _ in instructions()]
    assert order.index("USER") < order.index("ENTRYPOINT")
    assert "RUN" not in order[order.index("USER") :]


def test_options():
    """The entry point is a verb with options of its own, and listens where the port and the health check are."""
    entry, model = json.loads(of("ENTRYPOINT")[-1]), json.loads(of("CMD")[-1])
    assert entry[:2] == ["acmix-deploy", "serve"]
    options = commands()["serve"].parse_args([*entry[2:], *model])
    assert options.host == "0.0.0.0"
    assert of("EXPOSE") == [str(options.port)]
    assert f"127.0.0.1:{options.port}/healthz" in health()[-1]


def test_what_is_copied_can_be_built(tmp_path):
    """A wheel comes of what is copied alone, with the plugin's sources, and what is copied is not ignored."""
    ignored = FILE.with_name(f"{FILE.name}.dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored[0] == "*"
    for copy in of("COPY"):
        if copy.startswith("--from="):
            continue
        *sources, target = copy.split()
        for source in sources:
            assert f"!{source}" in ignored
            place = tmp_path / "source" / (source if target == "./" else target)
            place.parent.mkdir(parents=True, exist_ok=True)
            if (CHECKOUT / source).is_dir():
                left_out = shutil.ignore_patterns("__pycache__")
                shutil.copytree(CHECKOUT / source, place, symlinks=True, ignore=left_out)
            else:
                shutil.copy(CHECKOUT / source, place)
    (build,) = (run for run in of("RUN") if run.startswith("pip wheel"))
    words = shlex.split(build.replace("/wheels", str(tmp_path / "wheels")))
    command = [sys.executable, "-m", *words, "--no-build-isolation"]
    done = subprocess.run(command, check=False, cwd=tmp_path / "source", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    names = subprocess.run([sys.executable, "-m", "zipfile", "-l", wheel], check=True, capture_output=True, text=True)
    for name in ("plugin/native/CMakeLists.txt", "serving/page.html", "device/jetson/install.sh"):
        assert f"acmix_deploy/{name}" in names.stdout


def test_health(tmp_path):
    """The check passes while the entry point serves a model, and fails when it has ended."""
    pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install -e '.[serve]'")
    text = """<ir_version: 8, opset_import: ["" : 17], metadata_props: [
        "task": "detect", "names": "{0: 'cross', 1: 'ring'}", "stride": "32", "imgsz": "[32, 32]", "batch": "1"]>
        main (float[1, 3, 32, 32] images) => (float[1, 6, 1] output0)
        <int64[4] kernel = {6, 3, 32, 32}, int64[3] shape = {1, 6, 1}>
        { w = ConstantOfShape(kernel) y = Conv(images, w) output0 = Reshape(y, shape) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "model.onnx")
    entry = json.loads(of("ENTRYPOINT")[-1])[1:]
    entry[entry.index("--port") + 1] = "0"
    entry[entry.index("--host") + 1] = "127.0.0.1"
    command = [sys.executable, "-m", "acmix_deploy.cli", *entry, str(tmp_path / "model.onnx"), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout
        url = json.loads(server.stdout.readline())["url"].rstrip("/")
        check = [sys.executable, "-c", health()[-1].replace("http://127.0.0.1:8000", url)]
        assert url in check[-1]
        try:
            assert subprocess.run(check, check=False).returncode == 0
        finally:
            server.terminate()
    assert subprocess.run(check, check=False, stderr=subprocess.DEVNULL).returncode == 1
