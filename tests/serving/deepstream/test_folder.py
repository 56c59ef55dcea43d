"""Folders for DeepStream: keys that its releases know, values that fit the model, and what is refused."""

from __future__ import annotations

import configparser
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from acmix_deploy import cli
from acmix_deploy.detection.suppression import Suppression
from acmix_deploy.engine_file import header_bytes
from acmix_deploy.errors import UserError
from acmix_deploy.processing import Processing, attach
from acmix_deploy.serving.deepstream.folder import SAMPLE, package
from tests.engine.parts import ORIN, make_engine
from tests.serving.deepstream.parts import fixed, read_config
from tests.serving.parts import posed, selected, tiny

pytest.importorskip("cv2", reason="OpenCV is not installed")

# Keys of nvinfer's file. Those of the 6 series are in gstnvinfer_property_parser.h of DeepStream 6.0, to which later
# ones only add (crop-objects-to-roi-boundary before 6.3): https://docs.nvidia.com/metropolis/deepstream/6.4/dev-guide/sdk-api/gstnvinfer__property__parser_8h.html
# and the same page of 7.0 (7.0/sdk-api), of 8.0 (dev-guide/sdk-api) and of 9.1 (9.1/sdk-api), whose source is in
# https://github.com/NVIDIA/DeepStream, src/gst-plugins/gst-nvinfer.
_PROPERTY = """
    gie-unique-id process-mode interval labelfile-path gpu-id secondary-reinfer-interval output-tensor-meta enable-dla
    use-dla-core batch-size tensor-meta-pool-size network-mode model-engine-file int8-calib-file workspace-size
    output-blob-names network-type infer-dims output-io-formats layer-device-precision model-color-format
    net-scale-factor offsets mean-file maintain-aspect-ratio symmetric-padding scaling-filter scaling-compute-hw
    network-input-order custom-lib-path parse-bbox-func-name parse-bbox-instance-mask-func-name engine-create-func-name
    parse-classifier-func-name custom-network-config onnx-file num-detected-classes cluster-mode classifier-type
    classifier-threshold classifier-async-mode segmentation-threshold segmentation-output-order output-instance-mask
    input-object-min-width input-object-min-height input-object-max-width input-object-max-height operate-on-gie-id
    operate-on-class-ids filter-out-class-ids crop-objects-to-roi-boundary
"""
_LATER = "disable-output-host-copy auto-inc-mem max-gpu-mem-per dump-input-tensor dump-output-tensor"
_PROPERTIES = {"6.3": _PROPERTY} | dict.fromkeys(("7.0", "7.1", "8.0", "9.0", "9.1"), f"{_PROPERTY} {_LATER}")
_ATTRIBUTES = """
    threshold pre-cluster-threshold post-cluster-threshold eps group-threshold minBoxes dbscan-min-score roi-top-offset
    roi-bottom-offset detected-min-w detected-min-h detected-max-w detected-max-h border-color bg-color
    nms-iou-threshold topk
"""
# Groups of deepstream-app, of "Configuration Groups" in DS_ref_app_deepstream.html; alike in 6.3 to 9.1 as far as they
# are here.
_APPLICATION = {
    "application": "enable-perf-measurement perf-measurement-interval-sec gie-kitti-output-dir kitti-track-output-dir",
    "tiled-display": "enable rows columns width height gpu-id nvbuf-memory-type compute-hw square-seq-grid",
    "source": "enable type uri num-sources gpu-id cudadec-memtype latency rtsp-reconnect-interval-sec "
    "drop-frame-interval camera-width camera-height camera-fps-n camera-fps-d camera-v4l2-dev-node",
    "streammux": "gpu-id live-source buffer-pool-size batch-size batched-push-timeout width height enable-padding "
    "nvbuf-memory-type attach-sys-ts-as-ntp sync-inputs max-latency",
    "primary-gie": "enable gie-unique-id gpu-id model-engine-file batch-size interval config-file labelfile-path "
    "nvbuf-memory-type",
    "osd": "enable gpu-id border-width border-color text-size text-color text-bg-color font show-clock process-mode "
    "display-text display-bbox display-mask",
    "sink": "enable type sync qos source-id gpu-id container codec enc-type bitrate iframeinterval profile output-file "
    "nvbuf-memory-type rtsp-port udp-port",
    "tests": "file-loop",
}


def unknown(config: configparser.ConfigParser, groups: dict[str, str]) -> list[str]:
    """Keys, and groups, that are not among those of ``groups``; a number at a group's end counts for nothing."""
    found = []
    for group in config.sections():
        known = groups.get(group.rstrip("0123456789"), "").split()
        found += [f"{group}.{key}" for key in config[group] if key not in known]
    return found


def unknown_to(version: str, folder: Path) -> list[str]:
    inference = {"property": _PROPERTIES[version], "class-attrs-all": _ATTRIBUTES, "class-attrs-": _ATTRIBUTES}
    return unknown(read_config(folder / "config_infer_primary.txt"), inference) + unknown(
        read_config(folder / "deepstream_app_config.txt"), _APPLICATION
    )


def segmenter(path: Path) -> Path:
    rows = np.zeros((1, 4 + 2 + 3, 5), np.float32)
    rows[0, :5, 0] = 16, 16, 8, 8, 0.9
    outputs = {"output0": rows, "output1": np.ones((1, 3, 8, 8), np.float32)}
    return fixed(path, outputs, task="segment", names="{0: 'a', 1: 'b'}")


def queries(path: Path) -> Path:
    rows = np.zeros((1, 5, 4 + 3), np.float32)
    rows[0, 0, :5] = 0.5, 0.5, 0.25, 0.25, 0.9
    return fixed(path, {"output0": rows}, task="detect", names="{0: 'a', 1: 'b', 2: 'c'}", head="RTDETRDecoder")


def infer(folder: Path) -> dict[str, str]:
    return dict(read_config(folder / "config_infer_primary.txt")["property"])


@pytest.mark.parametrize("make", [tiny, segmenter, queries, posed])
def test_every_key_is_known(make: Any, tmp_path: Path) -> None:
    for source in (SAMPLE, "rtsp://camera/1"):
        folder = tmp_path / source[:4]
        package(make(tmp_path / "model.onnx"), folder, source=source)
        assert {version: unknown_to(version, folder) for version in _PROPERTIES} == {key: [] for key in _PROPERTIES}


def test_unknown_keys_are_noticed(tmp_path: Path) -> None:
    package(tiny(tmp_path / "tiny.onnx"), tmp_path / "ds")
    for name, old, new in (
        ("config_infer_primary.txt", "symmetric-padding", "symetric-padding"),
        ("config_infer_primary.txt", "topk", "top-k"),
        ("deepstream_app_config.txt", "live-source", "live"),
        ("deepstream_app_config.txt", "[osd]", "[display]"),
    ):
        path = tmp_path / "ds" / name
        text = path.read_text()
        path.write_text(text.replace(old, new))
        assert unknown_to("9.0", tmp_path / "ds") != []
        path.write_text(text)
    assert unknown_to("9.0", tmp_path / "ds") == []


def test_a_detector_of_anchors(tmp_path: Path) -> None:
    names = "{0: 'cat', 1: 'a dog', 3: 'Bär'}"
    out = np.zeros((1, 4 + 3, 4), np.float32)
    model = fixed(tmp_path / "model.onnx", {"output0": out}, size=(64, 96), task="detect", names=names)
    document = package(model, tmp_path / "ds", confidence=0.4)
    found = infer(tmp_path / "ds")
    assert (found["network-type"], found["cluster-mode"], found["network-mode"]) == ("0", "2", "0")
    assert (found["infer-dims"], found["batch-size"], found["num-detected-classes"]) == ("3;64;96", "1", "3")
    assert (found["maintain-aspect-ratio"], found["symmetric-padding"]) == ("1", "1")
    assert (found["model-color-format"], found["offsets"], found["scaling-filter"]) == ("0", "0;0;0", "1")
    assert found["crop-objects-to-roi-boundary"] == "1"
    assert np.float32(found["net-scale-factor"]) == np.float32(1) / np.float32(255)
    assert found["onnx-file"] == "model.onnx"
    assert found["model-engine-file"] == "model.onnx_b1_gpu0_fp32.engine"
    assert found["parse-bbox-func-name"] == document.function == "NvDsInferParseAcmix"
    assert document.clustering == "nms"
    attributes = dict(read_config(tmp_path / "ds/config_infer_primary.txt")["class-attrs-all"])
    assert attributes == {"pre-cluster-threshold": "0.4", "nms-iou-threshold": "0.7", "topk": "300"}
    assert (tmp_path / "ds/labels.txt").read_text(encoding="utf-8") == "cat\na dog\n2\n"
    assert (tmp_path / "ds/model.onnx").read_bytes() == model.read_bytes()
    files = sorted(str(path.relative_to(tmp_path / "ds")) for path in (tmp_path / "ds").rglob("*") if path.is_file())
    assert files == document.files
    readme = (tmp_path / "ds/README.md").read_text()
    assert len(document.commands) == 3
    assert all(command in readme for command in document.commands)
    assert "--pad 0" in readme
    assert any("black" in note for note in document.notes)


def test_other_heads(tmp_path: Path) -> None:
    names = {"names": "{0: 'a', 1: 'b'}"}
    package(selected(tmp_path / "rows.onnx", end2end="True", **names), tmp_path / "rows")
    package(queries(tmp_path / "queries.onnx"), tmp_path / "queries")
    masks = package(segmenter(tmp_path / "masks.onnx"), tmp_path / "masks")
    pose = package(posed(tmp_path / "pose.onnx"), tmp_path / "pose")
    rows = infer(tmp_path / "rows")
    assert (rows["cluster-mode"], rows["maintain-aspect-ratio"]) == ("4", "1")
    assert "nms-iou-threshold" not in read_config(tmp_path / "rows/config_infer_primary.txt")["class-attrs-all"]
    stretched = infer(tmp_path / "queries")
    assert (stretched["cluster-mode"], stretched["maintain-aspect-ratio"], stretched["symmetric-padding"]) == (
        "4",
        "0",
        "0",
    )
    assert "black" not in (tmp_path / "queries/README.md").read_text()
    of_masks = infer(tmp_path / "masks")
    assert (of_masks["network-type"], of_masks["cluster-mode"], of_masks["output-instance-mask"]) == ("3", "4", "1")
    assert of_masks["parse-bbox-instance-mask-func-name"] == masks.function == "NvDsInferParseAcmixMasks"
    assert "parse-bbox-func-name" not in of_masks
    assert read_config(tmp_path / "masks/deepstream_app_config.txt")["osd"]["display-mask"] == "1"
    of_pose = infer(tmp_path / "pose")
    assert (of_pose["network-type"], of_pose["output-tensor-meta"], of_pose["cluster-mode"]) == ("0", "1", "2")
    assert any("keypoints are not drawn" in note for note in pose.notes)
    assert "constexpr std::size_t extra = 6;" in (tmp_path / "pose/library/model.h").read_text()


def test_a_file_that_suppresses_boxes_is_not_clustered(tmp_path: Path) -> None:
    model = onnx.load(tiny(tmp_path / "tiny.onnx"))
    attach(model, Processing(suppression=Suppression()))
    onnx.save(model, tmp_path / "nms.onnx")
    document = package(tmp_path / "nms.onnx", tmp_path / "ds")
    assert (document.clustering, infer(tmp_path / "ds")["cluster-mode"]) == ("none", "4")
    assert "Layout::rows;" in (tmp_path / "ds/library/model.h").read_text()
    assert "boxes of each class" not in (tmp_path / "ds/README.md").read_text()
    assert "boxes of each class" in _readme_of(tiny(tmp_path / "anchors.onnx"), tmp_path / "anchors")


def _readme_of(model: Path, folder: Path) -> str:
    package(model, folder)
    return (folder / "README.md").read_text()


def test_numbers_of_a_file_that_suppresses_boxes_are_its_own(tmp_path: Path) -> None:
    model = onnx.load(tiny(tmp_path / "tiny.onnx"))
    attach(model, Processing(suppression=Suppression(confidence=0.5, most=1000)))
    onnx.save(model, tmp_path / "nms.onnx")
    for confidence, told in ((0.25, 1), (0.5, 0)):
        folder = tmp_path / str(confidence)
        notes = package(tmp_path / "nms.onnx", folder, confidence=confidence).notes
        assert len([note for note in notes if "none of a score up to 0.5" in note]) == told
        assert read_config(folder / "config_infer_primary.txt")["class-attrs-all"]["topk"] == "1000"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("rtsp://user:x@camera:554/a?b=1&c=2", {"type": "4", "uri": "rtsp://user:x@camera:554/a?b=1&c=2"}),
        ("https://host/a.mp4", {"type": "3", "uri": "https://host/a.mp4"}),
        ("/videos/a b.mp4", {"type": "3", "uri": "file:///videos/a%20b.mp4"}),
    ],
)
def test_sources(source: str, expected: dict[str, str], tmp_path: Path) -> None:
    package(tiny(tmp_path / "tiny.onnx"), tmp_path / "ds", source=source)
    config = read_config(tmp_path / "ds/deepstream_app_config.txt")
    assert expected.items() <= dict(config["source0"]).items()
    assert config["streammux"]["live-source"] == str(int(source.startswith("rtsp")))


@pytest.mark.parametrize(
    "source", ["", " ", "a\nuri=b", "rtsp://a\n[sink0]", "ftp://a/b", "v4l2://dev/video0", "/dev/video0", "0"]
)
def test_sources_that_are_none(source: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the source is"):
        package(tiny(tmp_path / "tiny.onnx"), tmp_path / "ds", source=source)
    assert not (tmp_path / "ds").exists()


@pytest.mark.parametrize("label", ["a\nb", "a;b", "", "  ", "a\rb"])
def test_labels_that_are_no_lines(label: str, tmp_path: Path) -> None:
    model = tiny(tmp_path / "tiny.onnx", names=repr({0: "fine", 1: label}))
    with pytest.raises(UserError, match=r"class 1 is called .* labels\.txt"):
        package(model, tmp_path / "ds")


def test_what_deepstream_cannot_run(tmp_path: Path) -> None:
    names = {"names": "{0: 'a', 1: 'b'}"}
    half = fixed(
        tmp_path / "half.onnx",
        {"output0": np.zeros((1, 6, 4), np.float32)},
        element=onnx.TensorProto.FLOAT16,
        task="detect",
        **names,
    )
    model = onnx.load(tiny(tmp_path / "tiny.onnx"))
    attach(model, Processing(pixels="bgr"))
    onnx.save(model, pixels := tmp_path / "pixels.onnx")
    rotated = fixed(tmp_path / "obb.onnx", {"output0": np.zeros((1, 4 + 2 + 1, 4), np.float32)}, task="obb", **names)
    classes = fixed(tmp_path / "classes.onnx", {"output0": np.full((1, 2), 0.5, np.float32)}, task="classify", **names)
    nameless = selected(tmp_path / "nameless.onnx", end2end="True")
    for model, why in (
        (half, "float16, and DeepStream feeds"),
        (pixels, "uint8, and DeepStream feeds"),
        (rotated, "task obb"),
        (classes, "task classify"),
        (nameless, "no names of its classes"),
    ):
        with pytest.raises(UserError, match=why):
            package(model, tmp_path / "ds")
        assert not (tmp_path / "ds").exists()


def test_a_quantised_file_needs_an_engine(tmp_path: Path) -> None:
    model = onnx.load(tiny(tmp_path / "tiny.onnx"))
    scale = [onnx.helper.make_tensor("scale", 1, [], [1 / 255]), onnx.helper.make_tensor("offset", 3, [], [0])]
    model.graph.initializer.extend(scale)
    model.graph.node[0].input[0] = "dequantised"
    for position, (kind, source, target) in enumerate(
        (("QuantizeLinear", "images", "quantised"), ("DequantizeLinear", "quantised", "dequantised"))
    ):
        node = onnx.helper.make_node(kind, [source, "scale", "offset"], [target])
        model.graph.node.insert(position, node)
    onnx.save(model, tmp_path / "int8.onnx")
    with pytest.raises(UserError, match="calibration tables alone"):
        package(tmp_path / "int8.onnx", tmp_path / "ds")


def test_an_engine_with_its_plugin(tmp_path: Path) -> None:
    plugin = tmp_path / "libacmix_plugin.so"
    plugin.write_bytes(b"a library")
    model = onnx.load(tiny(tmp_path / "tiny.onnx"))
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    profiles = {"images": ((1, 3, 32, 32), (2, 3, 32, 32), (6, 3, 32, 32))}
    engine = make_engine(tmp_path / "tiny.engine", model, profiles, plugin, metadata=metadata, precision="float16")
    document = package(engine, tmp_path / "ds")
    found = infer(tmp_path / "ds")
    assert (found["batch-size"], found["network-mode"], found["model-engine-file"]) == ("6", "2", "tiny.engine")
    assert "onnx-file" not in found
    assert (tmp_path / "ds/tiny.engine").read_bytes() == engine.read_bytes()
    assert (tmp_path / "ds/library/libacmix_plugin.so").read_bytes() == b"a library"
    assert 'plugin[] = "libacmix_plugin.so"' in (tmp_path / "ds/library/model.h").read_text()
    assert ORIN.tensorrt in (tmp_path / "ds/README.md").read_text()
    assert len(document.commands) == 2
    assert (tmp_path / "ds/tiny.engine.json").is_file()

    many = make_engine(
        tmp_path / "many.engine", model, {"images": ((2, 3, 32, 32), (2, 3, 32, 32), (6, 3, 32, 32))}, metadata=metadata
    )
    with pytest.raises(UserError, match="2 images or more"):
        package(many, tmp_path / "many")
    rtx = make_engine(
        tmp_path / "rtx.engine",
        model,
        profiles,
        metadata=metadata,
        machine=ORIN.model_copy(update={"backend": "tensorrt_rtx"}),
    )
    with pytest.raises(UserError, match="DeepStream runs those of TensorRT"):
        package(rtx, tmp_path / "rtx")
    plugin.write_bytes(b"another")
    with pytest.raises(UserError, match="plugin"):
        package(engine, tmp_path / "other")


def test_what_stands_before_an_engine_stays_away(tmp_path: Path) -> None:
    model = onnx.load(tiny(tmp_path / "tiny.onnx", batch=3))
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    engine = make_engine(tmp_path / "tiny.engine", model, metadata=metadata)
    plain = engine.read_bytes()
    manifest = json.loads((tmp_path / "tiny.engine.json").read_text())
    engine.write_bytes(header_bytes({"names": {"0": "thing"}}) + plain)
    from acmix_deploy.artifacts import sha256

    (tmp_path / "tiny.engine.json").write_text(json.dumps(manifest | {"sha256": sha256(engine)}))
    package(engine, tmp_path / "ds")
    assert (tmp_path / "ds/tiny.engine").read_bytes() == plain
    assert infer(tmp_path / "ds")["batch-size"] == "3"


def test_an_onnx_file_with_a_plugin(tmp_path: Path) -> None:
    plugin = tmp_path / "libacmix_plugin.so"
    plugin.write_bytes(b"a library")
    document = package(tiny(tmp_path / "tiny.onnx"), tmp_path / "ds", plugin=plugin)
    assert "library/libacmix_plugin.so" in document.files
    assert "--staticPlugins=library/libacmix_plugin.so" in document.commands[1]
    with pytest.raises(UserError, match="is not a file"):
        package(tmp_path / "tiny.onnx", tmp_path / "other", plugin=tmp_path / "none.so")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = tiny(tmp_path / "tiny.onnx"), tmp_path / "ds"
    assert cli.main(["package", "deepstream", str(model), "-o", f"{out}/", "--confidence", "0.5", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["document"], document["folder"]) == ("package deepstream", str(out))
    assert cli.main(["package", "deepstream", str(model), "-o", str(out)]) != 0
    assert "exists already" in capsys.readouterr().err
    assert cli.main(["package", "deepstream", str(model), "-o", str(tmp_path / "second")]) == 0
    assert "deepstream-app -c deepstream_app_config.txt" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ds", "second", "tiny.onnx"]
