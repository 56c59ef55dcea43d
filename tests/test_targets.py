"""The version table: what every release of TensorRT and of JetPack gets."""

from __future__ import annotations

import onnx
import pytest

from acmix_deploy.errors import UserError
from acmix_deploy.targets import NEWEST, TARGETS, target_named, target_of


@pytest.mark.parametrize(
    ("version", "form", "opset", "strongly_typed"),
    [
        ((8, 5), "plugin", 17, False),
        ((8, 6), "plugin", 17, False),
        ((10, 0), "plugin", 20, True),
        ((10, 3), "plugin", 20, True),
        ((10, 6), "plugin", 20, True),
        ((10, 7), "any", 20, True),
        ((10, 13), "any", 20, True),
        ((10, 14), "any", 20, True),
        ((10, 15), "any", 21, True),
        ((10, 16), "any", 21, True),
        ((11, 0), "any", 21, True),
        ((11, 4), "any", 21, True),
    ],
)
def test_release(version, form, opset, strongly_typed):
    target = target_of(version)
    assert (target.form, target.opset, target.strongly_typed) == (form, opset, strongly_typed)
    assert target.tensorrt == version
    assert target == target_named(f"tensorrt-{version[0]}.{version[1]}")


@pytest.mark.parametrize(
    ("name", "version", "form", "opset", "strongly_typed", "cuda", "sm"),
    [
        ("jetpack-5.1", (8, 5), "plugin", 17, False, "11.4", (72, 87)),
        ("jetpack-6.0", (8, 6), "plugin", 17, False, "12.2", (87,)),
        ("jetpack-6.1", (10, 3), "plugin", 20, True, "12.6", (87,)),
        ("jetpack-6.2", (10, 3), "plugin", 20, True, "12.6", (87,)),
        ("jetpack-7.0", (10, 13), "any", 20, True, "13", (110,)),
        ("jetpack-7.1", (10, 13), "any", 20, True, "13", (110,)),
        ("jetpack-7.2", (10, 16), "any", 21, True, "13", (87, 110)),
    ],
)
def test_jetpack(name, version, form, opset, strongly_typed, cuda, sm):
    target = target_named(name)
    assert (target.name, target.tensorrt, target.form, target.opset) == (name, version, form, opset)
    assert (target.strongly_typed, target.cuda, target.sm) == (strongly_typed, cuda, sm)


def test_every_name_is_its_own():
    assert all(target.name == name for name, target in TARGETS.items())
    assert TARGETS["tensorrt-11"].tensorrt == (11, 0)


@pytest.mark.parametrize(
    "name", ["jetpack-4.6", "jetpack", "tensorrt-10", "10.3", "Jetpack-6.2", "tensorrt-10.3.0", ""]
)
def test_unknown_name(name):
    with pytest.raises(UserError) as refusal:
        target_named(name)
    assert repr(name) in refusal.value.message
    assert all(known in refusal.value.hint for known in TARGETS)


@pytest.mark.parametrize(
    ("name", "form", "other", "grouped"), [("onnxruntime", "any", "plugin", True), ("openvino", "plain", "any", False)]
)
def test_runtimes_without_tensorrt(name, form, other, grouped):
    target = target_named(name)
    assert (target.name, target.tensorrt, target.version, target.form) == (name, None, "", form)
    assert (target.grouped, target.opset) == (grouped, 21)
    assert target.reads("Col2Im"), "nothing is known that it does not read"
    target.check_form("plain")
    with pytest.raises(UserError, match=f"{name} reads no file of the form {other}"):
        target.check_form(other)


def test_ncnn_is_refused_with_what_was_found():
    with pytest.raises(UserError, match="computes something else, without a word"):
        target_named("ncnn")


@pytest.mark.parametrize("version", [(7, 2), (8, 4), (9, 0), (9, 3)])
def test_unsupported_release(version):
    with pytest.raises(UserError, match=rf"TensorRT {version[0]}\.{version[1]} is not supported"):
        target_of(version)


@pytest.mark.parametrize(
    ("operator", "reads"),
    [
        ("Conv", "8.5 8.6 10.0 10.1 10.3 11.0 11.1"),
        ("LayerNormalization", "8.6 10.0 10.1 10.3 11.0 11.1"),
        ("Gelu", "10.0 10.1 10.3 11.0 11.1"),
        ("DeformConv", "10.1 10.3 11.0 11.1"),
        ("STFT", "11.0 11.1"),
        ("Swish", "11.1"),
        ("Col2Im", ""),
    ],
)
def test_operators_that_are_read(operator, reads):
    versions = ("8.5", "8.6", "10.0", "10.1", "10.3", "11.0", "11.1")
    assert " ".join(name for name in versions if target_named(f"tensorrt-{name}").reads(operator)) == reads


def test_the_newest_parser_agrees(rtx):
    """TensorRT-RTX, of operators up to opset 24; it lacks the plugin that TensorRT reads DeformConv by."""
    standard = {
        schema.name
        for schema in onnx.defs.get_all_schemas_with_history()
        if schema.domain == "" and schema.since_version <= 24
    }
    unread, _ = rtx("unread", "-", *sorted(standard))
    assert {*unread} - {"DeformConv"} == {operator for operator in standard if not NEWEST.reads(operator)}
