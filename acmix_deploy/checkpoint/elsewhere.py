"""A checkpoint in the environment that it was trained in: what the interpreter of ``--python`` runs.

This file is started as a script, by a Python of 3.8 or newer that need not have this project: it imports the standard
library, PyTorch, NumPy and what the checkpoint needs. Requests come on stdin and are answered on stdout, a line of JSON
each; arrays and models are files. What it is asked is said in :mod:`acmix_deploy.checkpoint.interpreter`.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import platform
import sys
import traceback
from pathlib import Path
from typing import Any


def tensors_of(output: Any) -> list[Any]:
    """The tensors in a module's output, whatever tuples, lists and dicts hold them."""
    import torch

    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    return [tensor for entry in output for tensor in tensors_of(entry)] if isinstance(output, (list, tuple)) else []


def _taken(function: Any, **options: Any) -> dict[str, Any]:
    """Those options that a function of this PyTorch has."""
    return {name: value for name, value in options.items() if name in inspect.signature(function).parameters}


class Elsewhere:
    """One checkpoint, and what can be asked of it."""

    model: Any
    """As it was saved, in eval mode and float32."""
    prepared: Any
    """The copy that is exported."""

    def load(self, checkpoint: str, code: str | None) -> dict[str, Any]:
        """Unpickle it, which runs code from the file, and say what is known of its model."""
        import torch
        from torch import nn

        sys.path[:0] = [code, str(Path.cwd())] if code else [str(Path.cwd())]
        loaded = torch.load(checkpoint, map_location="cpu", **_taken(torch.load, weights_only=False))
        model: Any = loaded
        notes = []
        if isinstance(loaded, dict):
            found = [key for key in ("ema", "model", "state_dict") if isinstance(loaded.get(key), nn.Module)]
            if not found:
                raise ValueError("the file holds no module, as itself or under 'ema' or 'model'")
            model = loaded[found[0]]
            notes += ["took 'ema' from the checkpoint"] * (found[0] == "ema")
        if isinstance(model, nn.DataParallel):
            model = model.module
        if not isinstance(model, nn.Module):
            raise ValueError(f"the file holds a {type(loaded).__name__} and no module")
        types = sorted({str(tensor.dtype)[6:] for tensor in model.state_dict().values() if tensor.is_floating_point()})
        notes += [f"weights converted from {name} to float32" for name in types if name != "float32"]
        self.model = model.float().eval()
        for layer in self.model.modules():
            if type(layer) is nn.Upsample:  # PyTorch below 1.11 had no such setting
                vars(layer).setdefault("recompute_scale_factor", None)
        self.prepared = self._prepared()
        arguments: Any = loaded if isinstance(loaded, dict) else {}
        arguments = arguments.get("train_args") or arguments.get("opt") or getattr(model, "args", None) or {}
        size = arguments.get("imgsz") if isinstance(arguments, dict) else getattr(arguments, "imgsz", None)
        versions = {"Python": platform.python_version(), "torch": str(torch.__version__)}
        if self._tasks():
            versions["ultralytics"] = sys.modules["ultralytics"].__version__
        told = self._told_by_ultralytics() if self._tasks() else {}
        if size is not None:
            told["imgsz"] = [size, size] if isinstance(size, int) else [int(side) for side in size]
        return {"versions": versions, "notes": notes, "told": told, "head": self._head_of_repository()}

    def run(self, image: str, outputs: str, prepared: bool) -> dict[str, Any]:
        """What the model makes of an image [B, C, H, W], or the form of it that is exported: arrays by number."""
        import numpy
        import torch

        module = self.prepared if prepared else self.model
        with torch.no_grad():
            found = tensors_of(module(torch.from_numpy(numpy.load(image)["image"])))
        numpy.savez(outputs, **{str(index): tensor.cpu().numpy() for index, tensor in enumerate(found)})
        return {"count": len(found)}

    def export(
        self,
        file: str,
        shape: list[int],
        kept: list[int],
        names: list[str],
        dynamic_axes: dict[str, dict[str, str]],
        opset: int,
    ) -> dict[str, Any]:
        """Write the ONNX file of the outputs ``kept``, in that opset or the newest below it that PyTorch writes."""
        import torch

        class Kept(torch.nn.Module):
            def __init__(self, model: torch.nn.Module) -> None:
                super().__init__()
                self.model = model

            def forward(self, image: torch.Tensor) -> Any:
                found = tensors_of(self.model(image))
                return tuple(found[index] for index in kept)

        axes = {name: {int(axis): called for axis, called in free.items()} for name, free in dynamic_axes.items()}
        for version in range(opset, 10, -1):
            try:
                with torch.no_grad():
                    torch.onnx.export(
                        Kept(copy.deepcopy(self.prepared)).eval(),
                        (torch.zeros(shape),),
                        file,
                        opset_version=version,
                        input_names=["images"],
                        output_names=names,
                        dynamic_axes=axes,
                        **_taken(torch.onnx.export, dynamo=False),
                    )
                return {"opset": version}
            except ValueError as error:
                if "opset" not in str(error).lower() or version == 11:
                    raise
        raise ValueError(f"no opset of 11 to {opset} is written here")

    def _tasks(self) -> Any:
        """The module of Ultralytics that the model comes from; None for other models."""
        tasks = sys.modules.get("ultralytics.nn.tasks")
        return tasks if tasks and isinstance(self.model, tasks.BaseModel) else None

    def _prepared(self) -> Any:
        """A copy that computes its grids for every image, and of Ultralytics' gives what its exporter writes."""
        import torch

        model: Any = copy.deepcopy(self.model).eval()
        if self._tasks():
            for module in model.modules():
                if hasattr(module, "export"):  # a head of any task
                    module.export, module.format, module.dynamic = True, "onnx", True
            model = model.fuse(verbose=False)
            for module in model.modules():
                if hasattr(module, "forward_split"):
                    module.forward = module.forward_split
            return model
        layers = getattr(model, "model", None)
        head: Any = layers[-1] if isinstance(layers, torch.nn.Sequential) and len(layers) else None
        if head is not None and hasattr(head, "dynamic"):
            head.dynamic = True
        elif head is not None and isinstance(getattr(head, "grid", None), list):
            head.grid = [torch.zeros(1) for _ in head.grid]
        if hasattr(head, "inplace"):
            head.inplace = False
        return model

    def _told_by_ultralytics(self) -> dict[str, Any]:
        from ultralytics.data.augment import LetterBox

        model, head = self.model, self.model.model[-1]
        taken = inspect.signature(LetterBox.__init__).parameters
        rule = {name: taken[name].default for name in ("center", "scaleup", "padding_value") if name in taken}
        told = {
            "task": getattr(model, "task", None) or self._tasks().guess_model_task(model),
            "stride": int(max(model.stride)),
            "names": self._names(),
            "channels": int(model.yaml.get("channels", model.yaml.get("ch", 3))),
            "end2end": bool(getattr(head, "end2end", type(head).__name__ == "v10Detect")),
            "head": type(head).__name__,
            "letterbox": rule,
        }
        if told["head"] == "RTDETRDecoder":  # later releases rank its queries
            told["layout"] = "ranked queries" if hasattr(head, "postprocess") else "queries"
        if getattr(model, "kpt_shape", None) is not None:
            told["kpt_shape"] = [int(number) for number in model.kpt_shape]
        return told

    def _head_of_repository(self) -> dict[str, Any] | None:
        """What tells the head of a model of YOLOv5, YOLOv7 or YOLOv9; None for other models."""
        import torch

        layers, stride = getattr(self.model, "model", None), getattr(self.model, "stride", None)
        if self._tasks() or not isinstance(layers, torch.nn.Sequential) or not len(layers):
            return None
        if not hasattr(self.model, "names") or not isinstance(stride, torch.Tensor) or hasattr(layers[-1], "sem_nc"):
            return None
        numbers = [getattr(layers[-1], name, 0) for name in ("no", "nm", "reg_max")]
        if not all(isinstance(number, int) for number in numbers):
            return None
        definition = getattr(self.model, "yaml", None)
        return {
            "numbers": numbers,
            "anchors": isinstance(getattr(layers[-1], "anchors", None), torch.Tensor),
            "names": self._names(),
            "stride": int(stride.max()),
            "channels": int(definition.get("ch", 3)) if isinstance(definition, dict) else 3,
        }

    def _names(self) -> dict[str, str]:
        names = self.model.names
        named = names.items() if isinstance(names, dict) else enumerate(names)
        return {str(int(index)): str(name) for index, name in named}


def main() -> None:
    """Answer requests ``[name, arguments]`` until there are no more."""
    del sys.path[0]  # the folder of this file, whose modules are not meant
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the user's packages print is no answer
    elsewhere = Elsewhere()
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = {"found": getattr(elsewhere, name)(**arguments)}
        except Exception as error:  # whatever the user's code raises
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
            where = f"{frames[-1].filename}, line {frames[-1].lineno}, in {frames[-1].name}" if frames else ""
            answer = {"error": f"{type(error).__name__}: {error}", "where": where}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
