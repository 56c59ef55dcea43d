"""PyTorch modules behind polygraphy's runner interface."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from acmix_deploy.faults import FaultId
from acmix_deploy.process import unprinted
from acmix_deploy.runtime.metrics import Array


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors in a module's output, whatever tuples, lists and dicts hold them, in the exporter's order."""
    return [leaf for leaf in _pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


class OnCpu(TorchFunctionMode):
    """Keeps on the CPU what code inside would move to CUDA, and notes the faults of published blocks that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: dict[FaultId, None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            self.faults["cuda-position"] = None
            return args[0]
        if func is torch.linspace:
            self.faults["linspace-position"] = None
        if func is torch.nn.functional.fold:
            self.faults["col2im"] = None
        return func(*map(self._moved, args), **{key: self._moved(value) for key, value in (kwargs or {}).items()})

    def _moved(self, value: Any) -> Any:
        if not isinstance(value, (str, torch.device)) or not str(value).startswith("cuda"):
            return value
        self.faults["cuda-position"] = None
        return "cpu"


class TorchRunner(BaseRunner):  # type: ignore[misc]
    """Runs a module of one image input in its own element type: float32 arrays in, float32 arrays out.

    Args:
        module: in eval mode, on any device; its floating-point type is that of its first parameter.
        name: how reports call it.
        input_name: name of the input in the feed.
        output_names: names of the output tensors in their order; ``output0``, ``output1``, ... by default.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str = "torch",
        *,
        input_name: str = "images",
        output_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(name=name)
        self.module = module
        self.input_name = input_name
        self.output_names = output_names

    def get_input_metadata_impl(self) -> TensorMetadata:
        """One float32 image input [B, C, H, W] of any size."""
        return TensorMetadata().add(self.input_name, dtype=np.dtype(np.float32), shape=[None] * 4)

    def infer_impl(self, feed_dict: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name, each float32 (integers keep their type)."""
        parameter = next(self.module.parameters(), torch.empty(0))
        image = torch.from_numpy(feed_dict[self.input_name]).to(parameter.device, parameter.dtype)
        start = time.perf_counter()
        with torch.no_grad():  # not inference mode: what the module caches must stay usable for export
            outputs = tensors_of(self.module(image))
        self.inference_time = time.perf_counter() - start
        arrays = [(out.float() if out.is_floating_point() else out).cpu().numpy() for out in outputs]
        names = self.output_names or [f"output{index}" for index in range(len(arrays))]
        return dict(zip(names, arrays, strict=True))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' prints, warnings and logs from the user; stderr stays open for progress."""
    with unprinted(), warnings.catch_warnings():
        before = logging.root.manager.disable
        logging.disable(logging.ERROR)
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(before)
