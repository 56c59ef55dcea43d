"""Detectors: ACmix in Ultralytics' YAML files, YOLOv8 with ACmix, and what an export needs of the models of Ultralytics
and of the repositories of YOLOv5, YOLOv7 and YOLOv9.

Ultralytics (AGPL-3.0) is an optional extra, imported only when something here is used.
"""

from __future__ import annotations

import copy
import inspect
import os
import re
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, get_args

from acmix_deploy.detection.images import Letterbox
from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.errors import CheckFailed, MissingComponent, UserError
from acmix_deploy.options import HeadChoice
from acmix_deploy.process import WHOLE_PROCESS
from acmix_deploy.runtime import hints
from acmix_deploy.runtime.reason import raised, reason

if TYPE_CHECKING:
    from torch import Tensor, nn

Variant = Literal["p3p4p5", "p5"]
Scale = Literal["n", "s", "m", "l", "x"]

_EQUAL = 1e-5  # relative L2 of two ways to compute one result in float32


def ultralytics(module: str) -> ModuleType:
    """The submodule of Ultralytics with this name, e.g. ``nn.tasks``.

    Raises:
        MissingComponent: Ultralytics, or what it imports, is not installed.
        UserError: the one that is found cannot be imported.
    """
    try:
        if "ultralytics" not in sys.modules:
            _import_unnoticed(module)
        import_module("ultralytics")
        return import_module(f"ultralytics.{module}")
    except ModuleNotFoundError as error:
        if error.name == "ultralytics":
            raise MissingComponent(
                "Ultralytics is needed here and is not installed",
                hints.NO_ULTRALYTICS,
            ) from error
        if error.name and error.name.startswith("ultralytics."):
            raise UserError(
                f"the Ultralytics that is found has no {error.name}",
                hints.OTHER_ULTRALYTICS,
            ) from error
        raise MissingComponent(
            f"Ultralytics is installed and lacks what it imports: {reason(error)}", f"Run: pip install {error.name}"
        ) from error
    except Exception as error:  # a changed copy may raise anything
        raise UserError(
            f"the Ultralytics that is found cannot be imported: {raised(error)}", "Mend that line or install it again."
        ) from error


def _import_unnoticed(module: str) -> None:
    """Import Ultralytics without what that changes for the whole process: the environment, filters of warnings, and how
    NumPy and PyTorch print. OpenCV stays in one thread, for its data loaders fork."""
    import numpy as np
    from torch._tensor_str import printoptions

    with WHOLE_PROCESS, warnings.catch_warnings(), np.printoptions(), printoptions():
        environment = dict(os.environ)
        try:
            import_module("ultralytics")
            import_module(f"ultralytics.{module}")
        finally:
            for name in {*os.environ} - {*environment}:
                del os.environ[name]
            os.environ.update(environment)


def register() -> None:
    """Let Ultralytics' model YAML files name ``ACmix``, with the arguments ``[out_planes, kernel_att, head, ...]``.

    As with its own convolutions, the input channels are those of the layer that is read, and ``out_planes`` is scaled
    by the model's width. May be called again; an ``ACmix`` that the installed Ultralytics already knows stays.

    Raises:
        MissingComponent: Ultralytics is not installed.
    """
    tasks: Any = ultralytics("nn.tasks")
    if not hasattr(tasks, "ACmix"):
        tasks.ACmix = _yaml_layer(tasks.Conv)


def _yaml_layer(convolution: type[nn.Module]) -> type[nn.Module]:
    """A class that ``parse_model`` takes for ``convolution`` and that makes an ACmix when it is called.

    Which layers get input channels and scaled output channels is a set of classes inside ``parse_model``, and what
    asks a set is equality.
    """
    from torch import nn

    from acmix_deploy.families.acmix.module import ACmix

    class EqualToConvolution(type):
        def __eq__(cls, other: object) -> bool:
            return other is cls or other is convolution

        def __hash__(cls) -> int:
            return hash(convolution)

    class Layer(nn.Module, metaclass=EqualToConvolution):
        __module__, __qualname__ = ACmix.__module__, ACmix.__qualname__

        def __new__(cls, *args: Any) -> ACmix:  # type: ignore[misc]
            return ACmix(*args)

    return Layer


def model_yaml(variant: Variant, scale: Scale = "n", num_classes: int = 80) -> dict[str, Any]:
    """The installed package's YOLOv8 with an ACmix after some of the feature maps that its head detects on.

    Args:
        variant: after P3, P4 and P5, or after P5 only. What read such a map, detection or not, reads the ACmix.
        scale: width and depth of the model.
        num_classes: classes to detect.

    Returns:
        What Ultralytics reads from a YAML file; name it to ``DetectionModel`` after :func:`register`.

    Raises:
        UserError: an unknown variant or scale.
        MissingComponent: Ultralytics is not installed.
    """
    if variant not in get_args(Variant) or scale not in get_args(Scale):
        raise UserError(
            f"there is no variant {variant!r} of scale {scale!r}",
            f"Variants are {', '.join(get_args(Variant))}; scales are {', '.join(get_args(Scale))}.",
        )
    utils: Any = ultralytics("utils")
    read = utils.YAML.load if hasattr(utils, "YAML") else utils.yaml_load
    model: dict[str, Any] = read(Path(utils.ROOT) / "cfg/models/v8/yolov8.yaml")
    layers = model["backbone"] + model["head"]
    maps = layers[-1][0] if variant == "p3p4p5" else layers[-1][0][-1:]

    def moved(source: int) -> int:
        return source if source < 0 else source + sum(index <= source for index in maps)

    result = []
    for index, (sources, *layer) in enumerate(layers):
        result.append([[moved(source) for source in sources] if isinstance(sources, list) else moved(sources), *layer])
        if index in maps:
            out_planes = layer[-1][0]
            result.append([-1, 1, "ACmix", [out_planes]])
    backbone = len(model["backbone"])
    return model | {
        "nc": num_classes,
        "scale": scale,
        "yaml_file": f"yolov8{scale}-acmix-{variant}.yaml",
        "backbone": result[:backbone],
        "head": result[backbone:],
    }


def build(variant: Variant, scale: Scale = "n", num_classes: int = 80) -> nn.Module:
    """An untrained YOLOv8 of the installed Ultralytics, with an ACmix after some of its feature maps.

    Args:
        variant: "p3p4p5" for an ACmix after each of the maps P3, P4 and P5, or "p5" for one after P5.
        scale: width and depth of the model.
        num_classes: classes to detect.

    Returns:
        An ``ultralytics.nn.tasks.DetectionModel`` in training mode.

    Raises:
        UserError: an unknown variant or scale.
        MissingComponent: Ultralytics is not installed.
    """
    register()
    model: nn.Module = ultralytics("nn.tasks").DetectionModel(model_yaml(variant, scale, num_classes), verbose=False)
    return model


def smallest() -> nn.Module:
    """The least that is a detector of the installed package, untrained: one convolution and a head of one class."""
    layers = {"backbone": [[-1, 1, "Conv", [8, 3, 2]]], "head": [[[0], 1, "Detect", ["nc"]]], "nc": 1}
    model: nn.Module = ultralytics("nn.tasks").DetectionModel(layers, verbose=False)
    return model


def _is_ultralytics(model: nn.Module) -> bool:
    tasks = sys.modules.get("ultralytics.nn.tasks")
    return tasks is not None and isinstance(model, tasks.BaseModel)


def keep_head(model: nn.Module, version: str = "", wanted: HeadChoice | None = None) -> str:
    """Have a detector with two heads run the one that is wanted, or that it ran where it was saved, and say which.

    YOLOv10 and YOLO26 have an end-to-end head, [B, detections, 6], beside a one-to-many head,
    [B, 4 + classes, anchors]. Where a checkpoint sets neither, the Ultralytics that runs it chooses: below 8.4.142 the
    end-to-end head, from then on the other.

    Args:
        model: as it was loaded; is set to its head.
        version: of the Ultralytics that saved it, where the file tells it.
        wanted: "anchors" is the one-to-many head.

    Returns:
        Which head and why; empty for models with one.

    Raises:
        UserError: the installed Ultralytics cannot run that head, or the model does not have the one that is wanted.
    """
    head = _head(model)
    if getattr(head, "one2one_cv2", None) is None:
        if wanted == "end-to-end":
            raise UserError("the model has no end-to-end head", "Leave out --head.")
        return ""
    here = ultralytics("utils").__version__
    switch = getattr(type(head), "end2end", None)
    saved_by = f", saved by Ultralytics {version}," if version else ""
    if not isinstance(switch, property) and type(head).__name__ != "v10Detect":
        raise UserError(
            f"the model{saved_by} has an end-to-end head, which the installed Ultralytics {here} does not know",
            "Install a newer Ultralytics: 8.4 is the first that knows such models.",
        )
    if wanted == "anchors" and getattr(head, "cv2", None) is None:
        raise UserError("the model's one-to-many head is not in the file", "Leave out --head.")
    end_to_end, why = (wanted == "end-to-end", "--head") if wanted else _saved_head(model, head, version)
    if end_to_end is None:
        end_to_end = _runs_end_to_end(head)
        why = f"the file tells none, and Ultralytics {here} takes it; choose with --head"
    settable = switch.fset is not None if isinstance(switch, property) else isinstance(switch, bool)
    if end_to_end != _runs_end_to_end(head) and settable:
        head.end2end = end_to_end
    if end_to_end != _runs_end_to_end(head):
        raise UserError(
            f"the model{saved_by} is to run its {_HEADS[end_to_end]} head, and the installed Ultralytics {here} "
            f"runs its {_HEADS[not end_to_end]} one",
            "Install the Ultralytics that saved it, or a newer one.",
        )
    return f"of its two heads the {_HEADS[end_to_end]} one is taken: {why}"


_HEADS = {True: "end-to-end", False: "one-to-many"}


def _head(model: nn.Module) -> Any:
    """The last layer of an Ultralytics model; None for other models."""
    layers: Any = model.model if _is_ultralytics(model) else None
    return layers[-1] if layers is not None and hasattr(layers, "__getitem__") else None


def _runs_end_to_end(head: Any) -> bool:
    """Whether a head gives detections, with the Ultralytics that is installed; old forks know no other way."""
    return bool(getattr(head, "end2end", type(head).__name__ == "v10Detect"))


def _saved_head(model: nn.Module, head: Any, version: str) -> tuple[bool | None, str]:
    """Whether the end-to-end head ran where the model was saved, and how that is known; None where it is not."""
    if getattr(head, "cv2", None) is None:
        return True, "the other one is not in the file"
    if (told := vars(head).get("_end2end")) is not None:
        return bool(told), "the checkpoint sets it"
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    by_version = f"Ultralytics {version or 'below 8.4'}, which saved the file, runs it"
    if numbers >= _KNOWS_SETTING:
        return numbers < _ONE_TO_MANY, by_version
    if numbers or "end2end" in vars(model):  # older ones keep it in plain attributes
        told = vars(head).get("end2end")
        return (bool(told), "the checkpoint sets it") if told is not None else (True, by_version)
    return None, ""


_KNOWS_SETTING, _ONE_TO_MANY = (8, 4), (8, 4, 142)
"""Versions of Ultralytics from which a head keeps its setting apart, and from which the default is one-to-many."""


def detection_metadata(model: nn.Module) -> ModelMetadata:
    """What serving needs of a model of Ultralytics, YOLOv5, YOLOv7 or YOLOv9; nothing of other models.

    ``imgsz`` and ``kpt_shape`` are there where the model knows them. ``letterbox`` is the rule of the installed
    Ultralytics, which writes no such entry.
    """
    if rows := _rows(model):
        return _metadata_of_repository(model, rows)
    if not _is_ultralytics(model):
        return ModelMetadata()
    tasks = ultralytics("nn.tasks")
    detector: Any = model
    told = {
        "task": getattr(detector, "task", None) or tasks.guess_model_task(detector),
        "stride": int(max(detector.stride)),
        "names": _class_names(detector.names),
        "channels": int(detector.yaml.get("channels", 3)),
        "end2end": _runs_end_to_end(_head(model)),
        "head": type(_head(model)).__name__,
    }
    if told["head"] == "RTDETRDecoder":  # later releases rank its queries
        told["layout"] = "ranked queries" if hasattr(_head(model), "postprocess") else "queries"
    told["letterbox"] = _letterbox(ModelMetadata().updated(**told))
    if (points := getattr(detector, "kpt_shape", None)) is not None:
        told["kpt_shape"] = [int(number) for number in points]
    return ModelMetadata().updated(**told, **_training_size(detector))


def _training_size(detector: Any) -> dict[str, list[int]]:
    """The entry ``imgsz``, where the arguments of training are known."""
    arguments = getattr(detector, "args", {})
    size = (arguments if isinstance(arguments, dict) else vars(arguments)).get("imgsz")
    if size is None:
        return {}
    return {"imgsz": [size, size] if isinstance(size, int) else [int(side) for side in size]}


def _letterbox(metadata: ModelMetadata) -> Letterbox:
    """The rule of the installed package. What its ``LetterBox`` takes no argument for it does as ours by default."""
    taken = inspect.signature(ultralytics("data.augment").LetterBox.__init__).parameters
    told = {name: taken[name].default for name in Letterbox.model_fields if name in taken}
    return metadata.letterbox.model_copy(update=told)


def _class_names(names: Any) -> dict[int, str]:
    """As Ultralytics keeps them now; older files have a list. What a file says may be of any other form, too."""
    named = dict(names if isinstance(names, dict) else enumerate(names))
    if not all(isinstance(name, (str, int)) for name in named.values()):
        raise TypeError("the names of classes are no text")
    return {int(index): str(name) for index, name in named.items()}


def prepare_for_export(model: nn.Module) -> nn.Module:
    """A copy of an Ultralytics detector that returns one tensor [B, 4 + classes, anchors], for any image size.

    In eval mode, batch normalisation folded into the convolutions, boxes decoded to (x, y, width, height) in pixels
    of the input. An end-to-end head returns [B, detections, 6]: corners, score and class. Models of YOLOv5, YOLOv7 and
    YOLOv9 return what they decode alone, of segmenters with the prototypes, see :class:`Rows`. Others come back as
    they are.
    """
    if rows := _rows(model):
        return _decoding(model, rows)
    if not _is_ultralytics(model):
        return model
    detector = _as_exporter(model).fuse(verbose=False)
    for module in detector.modules():
        if hasattr(module, "forward_split"):  # into parts of given sizes: opset 17 cannot split into a number of parts
            module.forward = module.forward_split
    prepared: nn.Module = detector
    return prepared


def exported(model: nn.Module, image: Tensor, outputs: Sequence[Tensor]) -> list[int]:
    """Which of the tensors that a model gives its export gives too, in the order of the export.

    Args:
        model: in eval mode.
        image: [B, C, H, W] float32.
        outputs: what the model makes of it.

    Raises:
        CheckFailed: an Ultralytics model gives its exporters a result that it does not give by itself.
    """
    if rows := _rows(model):
        return kept(rows, outputs)
    if not _is_ultralytics(model):
        return [*range(len(outputs))]
    from acmix_deploy.runtime.torch import tensors_of

    return [place_of(wanted, outputs) for wanted in tensors_of(_as_exporter(model)(image))]


def place_of(wanted: Tensor, outputs: Sequence[Tensor]) -> int:
    """Index of the tensor that is equal to ``wanted``. Raises CheckFailed where none is."""
    import torch

    for index, own in enumerate(outputs):
        if own.shape != wanted.shape or not torch.equal(own.isfinite(), wanted.isfinite()):
            continue
        finite = wanted.isfinite()
        if (own - wanted)[finite].norm() <= _EQUAL * wanted[finite].norm():
            return index
    raise CheckFailed(
        f"in the form for export the model gives a tensor {list(wanted.shape)} that it does not give by itself",
        "Export with the version of Ultralytics that the model was trained with.",
    )


def _as_exporter(model: nn.Module) -> Any:
    """A copy of an Ultralytics model in eval mode that returns what its exporter writes."""
    detector = copy.deepcopy(model).eval()
    module: Any
    for module in detector.modules():
        if hasattr(module, "export"):  # a head of any task
            # "dynamic" computes the anchors in the graph instead of keeping those of the last size on the module.
            module.export, module.format, module.dynamic = True, "onnx", True
    return detector


# ---------------------------------------------------------------------------------------------------------------------
# Models of the repositories of YOLOv5, YOLOv7 and YOLOv9


@dataclass(frozen=True)
class Rows:
    """What the head of such a model decodes for each of N anchors."""

    axis: int
    """Along which the values of one stand: 2 of [B, N, 5 + classes + masks] with YOLOv5 and YOLOv7, whose fifth value
    is the objectness; 1 of [B, 4 + classes + masks, N] with YOLOv9."""
    width: int
    """How many values there are."""
    raw: int
    """How many there are of each before they are decoded."""
    masks: int
    """How many of them weigh prototypes [B, masks, H, W]; 0 where there are none."""


def _rows(model: nn.Module) -> Rows | None:
    """By the attributes that such models have; None for others, and for heads that give more: keypoints, panoptic."""
    from torch import Tensor, nn

    layers = getattr(model, "model", None)
    if _is_ultralytics(model) or not isinstance(layers, nn.Sequential) or not len(layers):
        return None
    if not hasattr(model, "names") or not isinstance(getattr(model, "stride", None), Tensor):
        return None
    head: Any = layers[-1]
    raw, masks, bins = (getattr(head, name, 0) for name in ("no", "nm", "reg_max"))
    if not all(isinstance(number, int) for number in (raw, masks, bins)) or hasattr(head, "sem_nc"):
        return None
    anchors = isinstance(getattr(head, "anchors", None), Tensor)
    return rows_of(len(_class_names(model.names)), raw, masks, bins, anchors=anchors)


def rows_of(classes: int, raw: int, masks: int, bins: int, *, anchors: bool) -> Rows | None:
    """What a head decodes by its numbers; None where they fit no such head.

    Args:
        classes: how many there are.
        raw: ``no``, the values of an anchor in the maps.
        masks: ``nm``, those among them that weigh prototypes.
        bins: ``reg_max``, steps of a distance.
        anchors: whether the head has sizes of anchors.
    """
    if bins and raw == classes + 4 * bins:
        return Rows(1, 4 + classes + masks, raw, masks)
    if not bins and anchors and raw == 5 + classes + masks:
        return Rows(2, raw, raw, masks)
    return None


def kept(rows: Rows, outputs: Sequence[Tensor]) -> list[int]:
    """Which of a model's tensors hold what is decoded and, after it, the prototypes.

    Of several of one kind, which the auxiliary branches of YOLOv9 give, the last is the main branch's. All are kept
    where there is one that is neither these nor what they are computed from.
    """
    decoded, prototypes, known = list[int](), list[int](), 0
    for index, tensor in enumerate(outputs):
        shape, masks = tensor.shape, rows.masks
        if len(shape) == 3 and shape[rows.axis] == rows.width:
            decoded.append(index)
        elif masks and len(shape) == 4 and shape[1] == masks:
            prototypes.append(index)
        else:
            maps = (len(shape) == 5 and shape[4] == rows.raw) or (len(shape) == 4 and shape[1] == rows.raw)
            known += maps or bool(masks and len(shape) == 3 and shape[1] == masks)
    if not decoded or bool(prototypes) != bool(rows.masks) or len(decoded) + len(prototypes) + known < len(outputs):
        return [*range(len(outputs))]
    return [decoded[-1], *prototypes[-1:]]


def _decoding(model: nn.Module, rows: Rows) -> nn.Module:
    """A copy in eval mode that gives the tensors of :func:`kept`, its grids computed for every image.

    Its own ``fuse`` joins the branches of RepConv layers, and batch normalisation, where that changes nothing. The
    heads' own switch for exports is not used: that of YOLOv7 gives the maps that are not decoded.
    """
    import torch
    from torch import nn

    from acmix_deploy.runtime.torch import quiet, tensors_of

    class Decoding(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, image: Tensor) -> tuple[Tensor, ...]:
            outputs = tensors_of(self.model(image))
            return tuple(outputs[index] for index in kept(rows, outputs))

    def prepared(fused: bool) -> nn.Module:
        detector: Any = copy.deepcopy(model).eval()
        if fused:
            detector.fuse()
        head = detector.model[-1]
        if hasattr(head, "dynamic"):
            head.dynamic = True
        elif isinstance(getattr(head, "grid", None), list):  # none that an image of the same size left
            head.grid = [torch.zeros(1) for _ in head.grid]
        head.inplace = False
        return Decoding(detector)

    def each(tensor: Tensor) -> Tensor:
        """[values, ...]: what is computed for an anchor apart, since sizes in pixels would hide scores."""
        return tensor.transpose(0, rows.axis if tensor.dim() == 3 else 1).flatten(1)

    metadata = _metadata_of_repository(model, rows)
    image = torch.rand(1, metadata.channels, 8 * metadata.stride, 8 * metadata.stride)
    with quiet(), suppress(Exception), torch.no_grad():  # whatever their code raises
        fused = prepared(fused=True)
        pairs = zip(prepared(fused=False)(image), copy.deepcopy(fused)(image), strict=True)
        changes = [each(own - joined).norm(dim=1) / each(own).norm(dim=1) for own, joined in pairs]
        if torch.cat(changes).max() <= 10 * _EQUAL:
            return fused
    return prepared(fused=False)


def _metadata_of_repository(model: Any, rows: Rows) -> ModelMetadata:
    layers = getattr(model, "yaml", None)
    channels = int(layers.get("ch", 3)) if isinstance(layers, dict) else 3
    told = told_of(rows, _class_names(model.names), int(model.stride.max()), channels)
    return ModelMetadata().updated(**told, **_training_size(model))


def told_of(rows: Rows, names: dict[int, str], stride: int, channels: int) -> dict[str, Any]:
    """The entries of the metadata of such a model."""
    return {"task": "segment" if rows.masks else "detect", "stride": stride, "names": names, "channels": channels}
