"""What a file is follows from its content; every verb says so of one that it does not take, and which verb takes it."""

from __future__ import annotations

import errno
import json
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from acmix_deploy.artifacts import read_artifact, write_artifact
from acmix_deploy.cli import main
from acmix_deploy.errors import UserError
from acmix_deploy.files import Kind, expect, kind_of
from acmix_deploy.graph import read
from acmix_deploy.report.inspection import inspect
from acmix_deploy.runtime.onnxruntime import open_session
from tests.engine.parts import make_engine


def model(*nodes: onnx.NodeProto, ir: int = 8, opset: int = 17, domains: tuple[str, ...] = (), **weights: Any) -> Any:
    """x to y, both float32 [1, 3, 8, 8]."""
    graph = helper.make_graph(
        [*nodes] or [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3, 8, 8])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir)


def torchscript(path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.ReLU(), torch.ones(1)), path)


def program(path: Path) -> None:
    made = path.with_suffix(".pt2")
    torch.export.save(torch.export.export(nn.ReLU(), (torch.ones(1),)), made)
    made.rename(path)


def safetensors(path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


def archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("a/notes.txt", "hello")


def image(path: Path) -> None:
    path.write_bytes(cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes())


def written(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


SOURCES: dict[str, tuple[Kind, str, Callable[[Path], object]]] = {
    "module": ("checkpoint", ".pt", lambda path: torch.save(nn.ReLU(), path)),
    "weights": ("checkpoint", ".pth", lambda path: torch.save(nn.Conv2d(1, 1, 1).state_dict(), path)),
    "old pickle": (
        "checkpoint",
        ".pt",
        lambda path: torch.save(nn.Conv2d(1, 1, 1).state_dict(), path, _use_new_zipfile_serialization=False),
    ),
    "torchscript": ("torchscript", ".pt", torchscript),
    "program": ("program", ".pt2", program),
    "onnx": ("onnx", ".onnx", lambda path: onnx.save(model(), path)),
    "engine": ("engine", ".engine", written(b"ftrt\0\0\0\0\1\0")),
    "plan": ("engine", ".plan", written(b"vtrt\0\0\0\0\1\0")),
    "Ultralytics' engine": ("engine", ".engine", written(b"\x0c\0\0\0" + b'{"stride":8}' + b"ftrt\0\0")),
    "plugin": ("plugin", ".so", written(b"\x7fELF\2\1\1")),
    "safetensors": ("safetensors", ".safetensors", safetensors),
    "image": ("image", ".png", image),
    "video": ("video", ".mp4", written(b"\0\0\0\x20ftypisom\0\0\2\0")),
    "document": ("json", ".json", written(b'{"schema": 1}')),
    "text": ("text", ".txt", written("Grüße\n".encode() * 100)),
    "pointer": ("text", ".onnx", written(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")),
    "empty": ("empty", ".onnx", written(b"")),
    "folder": ("folder", "", lambda path: path.mkdir()),
    "zip": ("unknown", ".zip", archive),
    "bytes": ("unknown", ".engine", written(bytes(range(128, 256)) * 9)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("source", SOURCES)
def test_the_kind_follows_from_the_content(tmp_path: Path, source: str) -> None:
    kind, suffix, make = SOURCES[source]
    path = tmp_path / f"a{suffix}"
    make(path)
    assert kind_of(path) == kind
    if kind not in ("unknown", "folder"):
        for other in (".onnx", ".pt", ".engine", ".bin", ""):
            assert kind_of(path.rename(tmp_path / f"b{other}")) == kind, other
            (tmp_path / f"b{other}").rename(path)


def test_an_engine_is_what_its_sidecar_calls_one(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_text("any content")
    write_artifact(path, "engine")
    assert kind_of(path) == "engine"
    assert kind_of(tmp_path / "a.bin.json") == "sidecar"
    path.write_bytes(bytes(range(128, 256)))
    assert kind_of(path) == "engine"  # another one, perhaps
    path.write_text("other content")
    assert kind_of(path) == "text"
    write_artifact(path, "fused")
    assert kind_of(path) == "text"


@pytest.mark.parametrize(
    ("name", "kind"), [("a.pt", "checkpoint"), ("a.pt2", "program"), ("a.onnx", "onnx"), ("a.engine", "unknown")]
)
def test_the_name_decides_where_the_content_is_nothing_known(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).write_bytes(bytes(range(128, 256)))
    assert kind_of(tmp_path / name) == kind


@pytest.mark.parametrize(
    "text", [": a graph of 32 bytes, says protobuf", "B\x02\x10\x11 is an opset", '"quoted"\n', "0"]
)
def test_text_is_no_onnx_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.bin"
    path.write_text(text)
    assert kind_of(path) in ("text", "json", "unknown")


def test_a_text_that_is_cut_within_a_character_is_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for shift in range(4):
        path.write_text("." * shift + "€" * 1000, encoding="utf-8")
        assert kind_of(path) == "text"


# ---------------------------------------------------------------------------------------------------------------------
# Verbs

ONNX, MODEL = {"onnx"}, {"onnx", "engine"}
VERBS: dict[str, tuple[list[str], set[str]]] = {
    "export": (["export", "FILE", "--out", "out"], {"checkpoint", "program"}),
    "fuse": (["fuse", "FILE", "-o", "out.onnx"], ONNX),
    "fuse --for": (["fuse", "FILE", "-o", "out.onnx", "--for", "jetpack-6.2"], ONNX),
    "quantize": (["quantize", "FILE", "-o", "out.onnx", "--calibration", "photos"], ONNX),
    "build": (["build", "FILE", "-o", "out.engine"], ONNX),
    "verify a reference": (["verify", "FILE", "good.onnx"], MODEL),
    "verify a candidate": (["verify", "good.onnx", "FILE"], MODEL),
    "profile": (["profile", "FILE"], MODEL | {"checkpoint", "program", "json"}),
    "detect": (["detect", "FILE", "photos"], MODEL),
    "package triton": (["package", "triton", "FILE", "-o", "out"], MODEL),
    "package deepstream": (["package", "deepstream", "FILE", "-o", "out"], MODEL),
    "doctor": (["doctor", "FILE"], MODEL | {"checkpoint", "program", "plugin"}),
    "inspect": (["inspect", "FILE"], MODEL | {"checkpoint", "program", "torchscript", "plugin", "json"}),
    "plugin check": (["plugin", "check", "FILE"], {"plugin"}),
}
SAID = {
    "checkpoint": r"is a PyTorch checkpoint; .* is needed\nMake an ONNX file of it: acmix-deploy export ",
    "program": r"is a program of torch.export; .* is needed\nMake an ONNX file of it: acmix-deploy export ",
    "torchscript": r"is a TorchScript archive; .* is needed\n.*name the checkpoint",
    "onnx": r"is an ONNX file; .* is needed\n.*acmix-deploy fuse ",
    "engine": r"is an engine; .* is needed\nName the .*an engine is for detect, serve",
    "plugin": r"is a shared library; .* is needed\nA plugin goes to --plugin",
    "safetensors": r"is a file of safetensors; .* is needed\n.*--arch",
    "image": r"is an image; .* is needed\n.*acmix-deploy detect MODEL IMAGE",
    "video": r"is a video; .* is needed\n.*acmix-deploy detect MODEL VIDEO",
    "json": r"is a JSON document that begins with '.*'; .* is needed\n",
    "text": r"is a (text file|pointer of Git LFS) that begins with '.*'; .* is needed\n",
    "empty": r"is empty; .* is needed\nCopy or download it again",
    "folder": r"is a folder; .* is needed\nName a file in it",
    "unknown": r"is of no kind that is known here: it begins with ([0-9a-f]{2} ?){8}; .* is needed\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    (folder / "photos").mkdir()
    image(folder / "photos" / "a.png")
    onnx.save(model(), folder / "good.onnx")
    for source, (_, suffix, make) in SOURCES.items():
        make(folder / f"{source.replace(' ', '_')}{suffix}")
    return folder


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_says_what_a_file_is_that_it_does_not_take(
    folder: Path,
    verb: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    command, taken = VERBS[verb]
    if verb == "build":
        request.getfixturevalue("fake")
    monkeypatch.setattr("acmix_deploy.doctor.machine.environment", lambda plugin: ())
    for source, (kind, suffix, _) in SOURCES.items():
        if kind in taken:
            continue
        name = f"{source.replace(' ', '_')}{suffix}"
        code = main([name if word == "FILE" else word for word in command])
        said = capsys.readouterr().err
        assert (source, code) == (source, 2), said
        assert re.search(re.escape(f"error: {name} ") + SAID[kind], said), said
        assert not [*folder.glob("out*")]


def test_serving_says_it_as_well(folder: Path) -> None:
    command = [sys.executable, "-m", "acmix_deploy.cli", "serve", "module.pt", "--port", "0"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error: module.pt is a PyTorch checkpoint; an ONNX file or an engine is needed" in done.stderr


def test_gate_run_says_it_as_well(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert main(["gate", "run", "--candidate", "text.txt", "-o", "out.json", "--rounds", "1"]) == 2
    assert "text.txt is a text file that begins with 'Grüße'" in capsys.readouterr().err


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
TEXTS: dict[str, tuple[bytes, str, str]] = {
    "text": (b"hello\n", "is a text file that begins with 'hello'", "Was something else saved under this name?"),
    "pointer": (
        POINTER.encode(),
        "is a pointer of Git LFS that begins with 'version https://git-lfs",
        "Run: git lfs pull",
    ),
    "page": (
        b"\n<!DOCTYPE html>\n<html>404</html>\n",
        "is an HTML page that begins with '<!DOCTYPE html>'",
        "download the file itself",
    ),
    "other encoding": (
        "<html><title>Introuvable</title><p>Accès refusé</p></html>".encode("latin-1"),
        "is an HTML page that begins with '<html><title>Introuvable",
        "download the file itself",
    ),
    "byte order mark": (
        "\ufeffAccess denied".encode(),
        "is a text file that begins with 'Access denied'",
        "Was something else",
    ),
    "sentence": (
        b"404: Not Found.",
        "is a text file that begins with '404: Not Found.'",
        "Was something else",
    ),
    "JSON": (
        b'{"message": "Not Found"}',
        'is a JSON document that begins with \'{"message": ',
        "Name the model itself",
    ),
    "empty": (b"", "is empty", "Copy or download it again."),
}


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_saved_in_place_of_a_file(
    folder: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    content, said, hint = TEXTS[text]
    for name in ("hello.engine", "hello.onnx", "hello.pt"):
        Path(name).write_bytes(content)
        for command in (["inspect"], ["doctor"], ["profile"], ["verify", "good.onnx"], ["detect"]):
            arguments = [*command, name, *(["photos"] if command == ["detect"] else [])]
            assert main(arguments) == 2
            printed = capsys.readouterr()
            assert f"error: {name} {said}" in printed.err, arguments
            assert hint in printed.err.splitlines()[-1], arguments
            assert printed.out == ""


def test_a_pickle_may_be_text(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    state = nn.Conv2d(1, 1, 1).state_dict()
    torch.save(state, path, _use_new_zipfile_serialization=False, pickle_protocol=0)
    assert kind_of(path) == "checkpoint"


@pytest.mark.parametrize("name", ["a.engine", "a.onnx"])
def test_a_pointer_with_the_sidecar_of_its_file_is_no_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "a.onnx":
        onnx.save(model(), "a.onnx")
        write_artifact(Path("a.onnx"), "fused")
    else:
        make_engine(Path("a.engine"), model())
        assert kind_of(Path("a.engine")) == "engine"
    Path(name).write_text(POINTER)
    for verb in ("inspect", "doctor", "profile"):
        assert main([verb, name]) == 2
        said = capsys.readouterr().err
        assert f"error: {name} is a pointer of Git LFS that begins with" in said
        assert said.endswith("Run: git lfs pull\n")


def refuse(*_: object, **__: object) -> None:
    """What the system does where permissions hold; for root they do not."""
    raise PermissionError(errno.EACCES, "Permission denied")


def test_a_folder_that_may_not_be_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(UserError, match=r"model\.onnx cannot be opened: Permission denied"):
        kind_of(tmp_path / "model.onnx")


def test_a_folder_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.onnx").touch()
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UserError) as error:
        kind_of(tmp_path / "modle.onnx")
    assert error.value.message.endswith("modle.onnx does not exist")
    assert error.value.hint == "Name a file that is there."


@pytest.mark.parametrize("name", ["none/model.onnx", "file/model.onnx", "model\0.onnx"])
def test_nothing_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="does not exist"):
        kind_of(tmp_path / name)


def test_names_play_no_part(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An ONNX file of any name runs."""
    monkeypatch.chdir(folder)
    onnx.save(model(), folder / "renamed.bin")
    assert main(["verify", "good.onnx", "renamed.bin", "--random", "1"]) == 0
    assert main(["profile", "renamed.bin", "--samples", "1"]) == 0
    assert inspect(Path("renamed.bin")).kind == "onnx"
    capsys.readouterr()


# ---------------------------------------------------------------------------------------------------------------------
# Too short and too large


def test_a_file_that_ends_too_early(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    onnx.save(model(helper.make_node("Mul", ["x", "w"], ["y"]), w=np.ones((1, 3, 8, 8), np.float32)), path)
    whole = path.read_bytes()
    for end in (len(whole) - 1, len(whole) // 2, 40):
        path.write_bytes(whole[:end])
        for opened in (open_session, read, inspect):
            with pytest.raises(UserError, match=rf"ends too early: it holds {end} bytes") as caught:
                opened(path)
            assert caught.value.hint == "Copy or download it again."
    path.write_bytes(whole)
    assert expect(path, "onnx") == "onnx"


TOO_LARGE = ["fuse", "fuse --for", "quantize", "verify a reference", "verify a candidate", "profile", "detect"]
TOO_LARGE += ["package triton", "package deepstream", "doctor", "inspect", "build"]


def test_more_than_protobuf_holds(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A file of 2.2 GB, of which nothing is on the disk but its beginning."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    image(tmp_path / "photos" / "a.png")
    onnx.save(model(), "good.onnx")
    size = 2_200_000_000
    with Path("big.onnx").open("wb") as file:
        file.write(b"\x08\x08" + b"\x3a" + bytes([*_varint(size)]))
        file.truncate(size + 16)
    monkeypatch.setattr("acmix_deploy.doctor.machine.environment", lambda plugin: ())
    for verb in TOO_LARGE:
        if verb == "build":
            request.getfixturevalue("fake")
        assert main(["big.onnx" if word == "FILE" else word for word in VERBS[verb][0]]) == 2, verb
        said = capsys.readouterr().err
        assert "big.onnx holds 2.2 GB, and an ONNX model in one piece has at most 2.1 GB" in said, (verb, said)
        assert "Traceback" not in said


def _varint(value: int) -> list[int]:
    return [value & 0x7F | 0x80, *_varint(value >> 7)] if value > 0x7F else [value]


def test_weights_beside_a_file_may_be_more_than_what_is_changed(tmp_path: Path) -> None:
    """ONNX Runtime reads them where they lie; to change the file they would have to be in it."""
    path = tmp_path / "a.onnx"
    made = model(helper.make_node("Mul", ["x", "w"], ["y"]), w=np.ones((1, 3, 8, 8), np.float32))
    (weight,) = made.graph.initializer
    weight.ClearField("raw_data")
    weight.dims[:] = [550_000_000]
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "a.data"), ("offset", "0"), ("length", "2200000000")):
        weight.external_data.add(key=key, value=value)
    path.write_bytes(made.SerializeToString())
    with (tmp_path / "a.data").open("wb") as file:
        file.truncate(2_200_000_000)
    with pytest.raises(UserError, match=r"holds 2\.2 GB, and an ONNX model in one piece") as caught:
        read(path)
    assert "verify and profile take them" in caught.value.hint
    assert read(path, weights=False).graph.node


def test_what_is_written_again_is_in_a_format_that_onnx_runtime_reads(tmp_path: Path) -> None:
    onnx.save(model(ir=99), path := tmp_path / "new.onnx")
    assert (read(path, weights=False).ir_version, read(path).ir_version) == (99, 10)
    assert main(["fp16", str(path), "-o", str(tmp_path / "half.onnx")]) == 0
    open_session(tmp_path / "half.onnx")


# ---------------------------------------------------------------------------------------------------------------------
# What ONNX Runtime refuses

F16 = np.ones((3, 3, 1, 1), np.float16)
REFUSED: dict[str, tuple[Any, str, str]] = {
    "IR version": (
        model(ir=99),
        r"its IR version, that of the file format, is 99, and ONNX Runtime \S+ reads \d+ at most",
        r"model\.ir_version = \d+",
    ),
    "opset": (
        model(opset=99),
        r"its opset of ai\.onnx is 99, and ONNX Runtime \S+ knows \d+ at most",
        r"with opset \d+ or below",
    ),
    "custom operator": (
        model(helper.make_node("DeformConv2d", ["x"], ["y"], domain="mmdeploy"), domains=("mmdeploy",)),
        r"mmdeploy::DeformConv2d is no operator of ONNX Runtime \S+, and the file does not define it",
        "the library of mmdeploy",
    ),
    "plugin form": (
        model(helper.make_node("AcmixLocalAttention", ["x", "x"], ["y"], domain="acmix"), domains=("acmix",)),
        r"acmix::AcmixLocalAttention has no definition in it, as in files for TensorRT with the plugin",
        "with definitions",
    ),
    "domain without a version": (
        model(helper.make_node("DeformConv2d", ["x"], ["y"], "deform", domain="mmdeploy")),
        "node 'deform' is of the operator mmdeploy::DeformConv2d, and the file does not say of which version",
        "opset_import",
    ),
    "unknown operator": (
        model(helper.make_node("Softmaxx", ["x"], ["y"], "soft")),
        "node 'soft' is of the operator Softmaxx, which opset 17 does not have",
        "the opset that has it",
    ),
    "mixed types": (
        model(helper.make_node("Conv", ["x", "w"], ["y"], "mixed"), w=F16),
        r"\(tensor\(float\) and tensor\(float16\) in node \(mixed\)",
        "in float32",
    ),
    "type of another declaration": (
        model(helper.make_node("Cast", ["x"], ["y"], "half", to=TensorProto.FLOAT16)),
        r"Type \(tensor\(float\)\) of output arg \(y\) of node \(half\) does not match expected type",
        "in float32",
    ),
    "no implementation": (
        model(
            helper.make_node("Cast", ["x"], ["z"], to=TensorProto.BFLOAT16),
            helper.make_node("Relu", ["z"], ["u"], "brain"),
            helper.make_node("Cast", ["u"], ["y"], to=TensorProto.FLOAT),
        ),
        r"Could not find an implementation for Relu\(14\) node with name 'brain'",
        "has no Relu of the type",
    ),
    "nobody makes it": (
        model(helper.make_node("Relu", ["z"], ["y"])),
        "Node input 'z' is not a graph input",
        "not as ONNX defines models",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_each_refusal_has_its_own_hint(tmp_path: Path, case: str) -> None:
    made, said, hint = REFUSED[case]
    path = tmp_path / "a.onnx"
    path.write_bytes(made.SerializeToString())
    for source, name in ((path, str(path)), (made, "the model")):
        with pytest.raises(UserError, match=said) as caught:
            open_session(source)
        assert caught.value.message.startswith(f"ONNX Runtime refuses {name}: ")
        assert re.search(hint, caught.value.hint)
        assert "/onnxruntime_src" not in caught.value.message
        assert "complete ONNX file" not in caught.value.hint


@pytest.mark.parametrize("weights", ["gone", "short"])
def test_weights_that_are_not_beside_the_file(tmp_path: Path, weights: str) -> None:
    path = tmp_path / "a.onnx"
    made = model(helper.make_node("Mul", ["x", "w"], ["y"]), w=np.ones((1, 3, 8, 8), np.float32))
    onnx.save_model(made, path, save_as_external_data=True, location="a.data", size_threshold=0)
    assert open_session(path)
    (tmp_path / "a.data").unlink()
    if weights == "short":
        (tmp_path / "a.data").write_bytes(b"abc")
    with pytest.raises(UserError) as caught:
        open_session(path)
    if weights == "gone":
        assert caught.value.message.endswith(f"its weights are in {tmp_path / 'a.data'}, which is not there")
        assert "Copy that file" in caught.value.hint
        with pytest.raises(
            UserError, match=r"cannot be read as an ONNX file: its weights are in .*a.data, which is not"
        ):
            read(path)
    else:
        assert caught.value.message.endswith("the file of its weights has 3 bytes, too few for w")


def test_what_is_not_known_has_no_hint() -> None:
    from acmix_deploy.runtime.refusals import refused

    error = refused("a.onnx", RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : something new"))
    assert (error.message, error.hint) == ("ONNX Runtime refuses a.onnx: something new", "")


def test_weights_beside_a_file_are_among_what_others_are_made_from(tmp_path: Path, capsys: Any) -> None:
    made = model(helper.make_node("Mul", ["x", "w"], ["y"]), w=np.ones((1, 3, 8, 8), np.float32))
    onnx.save_model(made, tmp_path / "a.onnx", save_as_external_data=True, location="a.data", size_threshold=0)
    for verb, source, target in (("fuse", "a.onnx", "b.onnx"), ("fp16", "a.onnx", "c.onnx")):
        assert main([verb, str(tmp_path / source), "-o", str(tmp_path / target)]) == 0
        assert [parent.name for parent in read_artifact(tmp_path / target).parents] == ["a.onnx", "a.data"]
        assert not (tmp_path / f"{target}.data").exists(), "what is written is one file"
        open_session(tmp_path / target)
    with (tmp_path / "a.data").open("ab") as file:
        file.write(b"more")
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "b.onnx"), "--json"]) == 0
    states = {found["name"]: found["state"] for found in json.loads(capsys.readouterr().out)["ancestors"]}
    assert states == {"a.onnx": "unchanged", "a.data": "changed"}
