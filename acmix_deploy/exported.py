"""What is told of an export, and of the model that files are compared with: readable without PyTorch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, computed_field

from acmix_deploy.detection.suppression import Suppression
from acmix_deploy.faults import FaultId
from acmix_deploy.runtime.inputs import Shapes

Exporter = Literal["dynamo", "torchscript"]


class ReferenceReport(BaseModel):
    """What files were compared with: the model as it was loaded, unless something is listed here."""

    model_config = ConfigDict(frozen=True)

    repaired: tuple[FaultId, ...] = Field(default=(), description="what of the model was changed so that it runs here")
    uncompared: tuple[str, ...] = Field(
        default=(), description="blocks that were known by their parts alone: their own code was not there to run"
    )

    @computed_field(description="whether all that was loaded took part, unchanged")  # type: ignore[prop-decorator]
    @property
    def as_loaded(self) -> bool:
        return not self.repaired and not self.uncompared

    def __str__(self) -> str:
        loaded = f"the model as it was {'repaired' if self.repaired else 'loaded'}"
        return f"{loaded} (except {', '.join(self.uncompared)})" if self.uncompared else loaded


class TensorInfo(BaseModel):
    """An input or output of an ONNX file."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(description="tensor name")
    dtype: str = Field(default="float32", description="element type by NumPy's name")
    shape: tuple[int | str, ...] = Field(description="sizes; names or expressions of names where dynamic")


class ExportResult(BaseModel):
    """What was exported and how."""

    model_config = ConfigDict(frozen=True)

    exporter: Exporter = Field(description="which of PyTorch's exporters wrote the file")
    opset: int = Field(description="version of the standard operator set")
    ir_version: int = Field(description="version of the ONNX file format")
    inputs: tuple[TensorInfo, ...] = Field(description="inputs of the file")
    outputs: tuple[TensorInfo, ...] = Field(description="outputs of the file")
    checked_shapes: tuple[tuple[int, ...], ...] = Field(description="input shapes at which file and module agreed")
    relative_l2: float = Field(description="largest relative L2 distance of the file from the module over all of them")
    suppression: Suppression | None = Field(default=None, description="what the files suppress boxes by, where they do")
    notes: tuple[str, ...] = Field(default=(), description="what did not go the usual way, and why")

    @property
    def shapes_to_build(self) -> Shapes | None:
        """The range of the shapes that the file was checked at; None where no axis is free."""
        if all(isinstance(size, int) for size in self.inputs[0].shape):
            return None
        sizes = list(zip(*self.checked_shapes, strict=True))
        return tuple(map(min, sizes)), self.checked_shapes[0], tuple(map(max, sizes))
