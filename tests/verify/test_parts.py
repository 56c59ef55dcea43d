"""Whatever a model's task is, a part of its outputs that is wrong fails, and rounding does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from acmix_deploy import yolo
from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.detection.parts import known_head, parts_of
from acmix_deploy.operators.spec import Tolerance
from acmix_deploy.runtime.inputs import random_images
from acmix_deploy.runtime.metrics import deviation
from acmix_deploy.runtime.torch import TorchRunner, tensors_of
from acmix_deploy.verify import Candidate, Verification, verify
from acmix_deploy.verify.distances import channel_axis, worst_channel
from acmix_deploy.verify.limits import CHANNEL_FLOOR, FILE_TOLERANCES, relative_at_most

tasks = pytest.importorskip("ultralytics.nn.tasks", reason="ultralytics is not installed")

from tests.untrained import enlivened  # noqa: E402, it imports Ultralytics

IMAGE = random_images((2, 3, 96, 128), 3)
PARTS = {
    "detect": ["boxes", "scores"],
    "pose": ["boxes", "scores", "keypoints", "visibility"],
    "obb": ["boxes", "scores", "angles"],
    "segment": ["boxes", "scores", "mask coefficients", "prototypes"],
}
PRECISIONS = ("float32", "float16", "int8")


class Spoilt(nn.Module):
    """A model whose outputs are changed on the way out."""

    def __init__(self, model: nn.Module, change: Callable[[list[Tensor]], object]) -> None:
        super().__init__()
        self.model, self.change = model, change

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = [output.clone() for output in tensors_of(self.model(x))]
        self.change(outputs)
        return outputs


@pytest.fixture(scope="module", params=PARTS)
def exported(request: pytest.FixtureRequest) -> tuple[nn.Module, ModelMetadata]:
    """A detector of each task as it is exported, and its metadata."""
    task = request.param
    kind = {"detect": "Detection", "pose": "Pose", "obb": "OBB", "segment": "Segmentation"}[task]
    name = {"detect": "yolov8n", "pose": "yolov8n-pose", "obb": "yolov8n-obb", "segment": "yolov8n-seg"}[task]
    torch.manual_seed(0)
    options = {"nc": 5} if task != "pose" else {"nc": 5, "data_kpt_shape": (4, 3)}
    model = enlivened(getattr(tasks, f"{kind}Model")(f"{name}.yaml", verbose=False, **options))
    metadata = yolo.detection_metadata(model)
    assert metadata.task == task
    return yolo.prepare_for_export(model), metadata


def outputs_of(model: nn.Module) -> dict[str, np.ndarray]:
    with torch.no_grad():
        return {
            f"output{index}": tensor.numpy() for index, tensor in enumerate(tensors_of(model(torch.from_numpy(IMAGE))))
        }


def compared(
    model: nn.Module, change: Callable[[list[Tensor]], object], metadata: ModelMetadata, precision: str
) -> Verification:
    candidate = Candidate(TorchRunner(Spoilt(model, change), "candidate"), precision)
    right = TorchRunner(model, "right")
    return verify(right, [candidate], [{"images": IMAGE}], metadata=metadata, tolerances=FILE_TOLERANCES)


def test_the_parts_are_where_the_heads_of_ultralytics_put_them(exported: tuple[nn.Module, ModelMetadata]) -> None:
    """The last convolutions of one part after the other get another bias: then its channels change, and no others."""
    model, metadata = exported
    outputs = outputs_of(model)
    layout = parts_of(known_head(metadata, outputs), outputs)
    assert [part for parts in layout.values() for part in parts] == PARTS[metadata.task]
    for name, parts in layout.items():
        channels = np.arange(outputs[name].shape[1])
        members = [channels[index[1]] if len(index) > 1 else channels for index in parts.values()]
        assert sorted(np.concatenate(members)) == [*channels]
    head: Any = model.model[-1]
    behind = {"pose": ["keypoints", "visibility"], "obb": ["angles", "boxes"], "segment": ["mask coefficients"]}
    for branch, expected in (("cv2", ["boxes"]), ("cv3", ["scores"]), ("cv4", behind.get(metadata.task, []))):
        changed = copy.deepcopy(model)
        for layers in getattr(changed.model[-1], branch, []) if hasattr(head, branch) else []:
            with torch.no_grad():
                layers[-1].bias += torch.randn(layers[-1].bias.shape)
        found = {
            part
            for name, other in outputs_of(changed).items()
            for part, index in layout[name].items()
            if (other[index] != outputs[name][index]).any()
        }
        assert found == set(expected)
    if metadata.task == "pose":
        visibility = outputs["output0"][layout["output0"]["visibility"]]
        assert visibility.shape[1] == 4
        assert 0 < visibility.min() < visibility.max() < 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_part_that_is_nothing_fails_and_is_named(exported: tuple[nn.Module, ModelMetadata], precision: str) -> None:
    model, metadata = exported
    outputs = outputs_of(model)
    layout = parts_of(known_head(metadata, outputs), outputs)
    assert compared(model, lambda outputs: None, metadata, precision).passed is not False
    for index, parts in enumerate(layout.values()):
        for part, place in parts.items():

            def nothing(outputs: list[Tensor], index: int = index, place: tuple[Any, ...] = place) -> None:
                outputs[index][place] = 0

            found = compared(model, nothing, metadata, precision)
            assert {failure.part for failure in found.failures} == {part}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_scores_of_nothing_fail_where_the_parts_are_unknown(
    exported: tuple[nn.Module, ModelMetadata], precision: str
) -> None:
    """In one norm with the boxes, as they were compared before, they do not show in any type but float32."""
    model, metadata = exported
    for unknown in (ModelMetadata(), metadata.updated(task="of another kind")):
        for channels in (slice(4, 9), slice(6, 7)):

            def nothing(outputs: list[Tensor], channels: slice = channels) -> None:
                outputs[0][:, channels] = 0

            found = compared(model, nothing, unknown, precision)
            failed = {failure.part: failure for failure in found.failures}
            assert failed["output0 by channel"].channel in range(9)[channels]
    right, other = (outputs_of(Spoilt(model, change))["output0"] for change in (lambda _: None, nothing))
    assert deviation(right, other).relative_l2 < FILE_TOLERANCES["float16"].limit()


@pytest.mark.parametrize("name", ["vgg11", "convnext_tiny", "mobilenet_v3_small", "lraspp_mobilenet_v3_large"])
def test_right_half_and_single_precision_pass_by_channel(name: str) -> None:
    """VGG has channels that are all but dead: in one half precision is off by half."""
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    torch.manual_seed(0)
    model = models.get_model(name, weights=None, **({"weights_backbone": None} if name.startswith("lraspp") else {}))
    model = model.eval() if name in ("vgg11", "convnext_tiny") else trained_on_noise(model)
    half_and_single_precision_pass(getattr(model, "features", model))


def test_right_half_and_single_precision_pass_as_parts(exported: tuple[nn.Module, ModelMetadata]) -> None:
    for metadata in (exported[1], None):
        half_and_single_precision_pass(exported[0], metadata)


def trained_on_noise(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        for seed in range(2):
            model.train()(torch.from_numpy(random_images((4, 3, 128, 128), seed)))
    return model.eval()


def half_and_single_precision_pass(model: nn.Module, metadata: ModelMetadata | None = None) -> None:
    """Against the same model in float64, which is not rounded; float16 really computes in float16."""
    exact = TorchRunner(copy.deepcopy(model).double().eval(), "float64")
    candidates = [
        Candidate(TorchRunner(copy.deepcopy(model).eval(), "single")),
        Candidate(TorchRunner(copy.deepcopy(model).half().eval(), "half"), "float16"),
    ]
    found = verify(exact, candidates, [{"images": IMAGE}], metadata=metadata, tolerances=FILE_TOLERANCES)
    assert not found.failures, found.failures
    assert metadata or {found.part for found in found.comparisons} >= {"output0 by channel"}
    for comparison in found.comparisons:
        if comparison.channel is not None:
            assert comparison.relative_l2 < comparison.limit / 4, "near to a limit that right files must not reach"


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((1, 84, 8400), 1),
        ((1, 300, 84), 2),
        ((1, 84, 84), 1),
        ((2, 19, 64, 48), 1),
        ((1, 3, 80, 80, 85), 4),
        ((1, 1000), None),
        ((7,), None),
        ((), None),
        ((1, 1, 64, 48), None),
        ((1, 1000, 1, 1), None),
        ((1, 1000, 1), None),
        ((0, 84, 8400), None),
    ],
)
def test_the_axis_of_channels(shape: tuple[int, ...], axis: int | None) -> None:
    assert channel_axis(shape) == axis


def test_the_worst_channel() -> None:
    """Coordinates up to 100 beside scores; a channel that is all but zero is measured by those of its kind."""
    random = np.random.default_rng(0)
    right = np.stack([*random.uniform(20, 100, (2, 50)), *random.uniform(0, 1, (3, 50)), np.full(50, 1e-6)])[None]
    assert worst_channel(right, right, 1).relative_l2 == 0
    scores = right.copy()
    scores[0, 3] *= 0.9
    found = worst_channel(right, scores, 1)
    assert (found.channel, found.relative_l2) == (3, pytest.approx(0.1))
    assert worst_channel(right.transpose(0, 2, 1), scores.transpose(0, 2, 1), 2) == found
    faint = right.copy()
    faint[0, 5] = 2e-6
    kind = np.sqrt(np.square(right[0, 2:]).sum(axis=1).mean())
    found = worst_channel(right, faint, 1)
    assert (found.channel, found.relative_l2) == (5, pytest.approx(1e-6 * np.sqrt(50) / (CHANNEL_FLOOR * kind)))
    gone = np.zeros((1, 2, 9))
    gone[0, 0, 0] = 1e-9
    assert worst_channel(np.zeros((1, 2, 9)), gone, 1).relative_l2 == 1
    infinite = right.copy()
    infinite[0, 0, 0] = np.inf
    assert np.isfinite(worst_channel(infinite, infinite, 1).relative_l2)


def test_no_error_of_a_model_in_half_precision_excuses_everything() -> None:
    """Scores at a cosine of 0.88 passed under a limit of 1.1, twice the error that PyTorch's own model had."""

    class Times(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(factor))

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) * self.factor

    right, eager = (TorchRunner(Times(factor), str(factor)) for factor in (1.0, 0.45))
    candidates = [Candidate(TorchRunner(Times(factor), f"{factor}!"), "float16") for factor in (0.7, 0.8)]
    found = verify(right, candidates, [{"images": IMAGE}], eager={"float16": lambda: eager})
    assert [comparison.passed for comparison in found.comparisons] == [False, True]
    assert {comparison.limit for comparison in found.comparisons} == {0.25}
    assert found.judged_by(relative_at_most(0.4)).passed
    for floor, error, limit in ((1e-3, 0.1, 0.201), (1e-3, 0.2, 0.25), (0.5, 0, 0.5), (0.5, 0.3, 0.5)):
        assert Tolerance(floor).limit(error) == pytest.approx(limit)


@pytest.mark.parametrize(
    ("metadata", "shapes", "parts"),
    [
        ({"task": "classify"}, [(1, 10)], [["scores"]]),
        ({"task": "detect"}, [(1, 7, 50)], [["boxes", "scores"]]),
        ({"task": "detect", "names": "{0: 'a', 1: 'b', 2: 'c'}"}, [(1, 7, 50)], [["boxes", "scores"]]),
        ({"task": "detect", "names": "{0: 'a'}"}, [(1, 7, 50)], [[]]),
        ({"task": "detect", "names": "{0: 'a'}"}, [(1, 300, 6)], [["boxes", "scores", "objectness"]]),
        ({"task": "detect", "end2end": "True"}, [(1, 300, 6)], [["boxes", "scores", "classes"]]),
        ({"task": "detect", "args": "{'nms': True}"}, [(1, 300, 6)], [["boxes", "scores", "classes"]]),
        ({"task": "detect", "head": "RTDETRDecoder", "names": "{0: 'a'}"}, [(1, 300, 5)], [["boxes", "scores"]]),
        ({"task": "pose", "end2end": "True", "kpt_shape": "(2, 3)"}, [(1, 300, 12)],
         [["boxes", "scores", "classes", "keypoints", "visibility"]]),
        ({"task": "detect", "names": "junk"}, [(1, 7, 50)], [[]]),
        ({"task": "detect"}, [(1, 4, 50)], [[]]),
        ({"task": "pose", "names": "{0: 'a'}"}, [(1, 5, 50)], [[]]),
        ({"task": "pose", "names": "{0: 'a'}"}, [(1, 11, 50)], [[]]),
        ({"task": "pose", "names": "{0: 'a'}", "kpt_shape": "junk"}, [(1, 11, 50)], [[]]),
        ({"task": "pose", "names": "{0: 'a'}", "kpt_shape": "[2, 3]"}, [(1, 12, 50)], [[]]),
        ({"task": "pose", "names": "{0: 'a'}", "kpt_shape": "(3, 2)"}, [(1, 11, 50)],
         [["boxes", "scores", "keypoints"]]),
        ({"task": "obb"}, [(1, 11, 50)], [["boxes", "scores", "angles"]]),
        ({"task": "segment", "names": "{0: 'a'}"}, [(1, 9, 50), (1, 4, 8, 8)],
         [["boxes", "scores", "mask coefficients"], ["prototypes"]]),
        ({"task": "segment", "names": "{0: 'a'}"}, [(1, 9, 50), (1, 4, 8, 8), (1, 2)], [[], [], []]),
        ({}, [(1, 84, 50)], [[]]),
    ],
)  # fmt: skip
def test_what_the_metadata_tell_of_the_parts(metadata: dict[str, str], shapes: list, parts: list) -> None:
    outputs = {str(index): np.zeros(shape) for index, shape in enumerate(shapes)}
    assert [[*found] for found in parts_of(known_head(ModelMetadata(metadata), outputs), outputs).values()] == parts


def test_scores_of_classes_exchanged_for_their_mean_fail_though_nobody_trained_them() -> None:
    """All are near 1e-5 and alike to 1.5e-3, which is more than the rounding of a logistic function."""
    torch.manual_seed(1)
    model = tasks.DetectionModel("yolov8n.yaml", verbose=False)
    with torch.no_grad():
        for _ in range(2):
            model.train()(torch.rand(2, 3, 128, 128))
    model = yolo.prepare_for_export(model.eval())
    metadata = yolo.detection_metadata(model)

    def change(outputs: list[Tensor]) -> None:
        outputs[0][:, 4:] = outputs[0][:, 4:].mean(1, keepdim=True)

    candidate = Candidate(TorchRunner(Spoilt(model, change), "candidate"))
    images = [{"images": random_images((1, 3, 128, 128), seed)} for seed in range(2)]
    found = verify(TorchRunner(model, "right"), [candidate], images, metadata=metadata, tolerances=FILE_TOLERANCES)
    scores = [one for one in found.comparisons if one.output == "scores" and one.channel is None]
    assert [one.passed for one in scores] == [False, False]
    assert all(one.relative_l2 < 1.6e-3 for one in scores)
