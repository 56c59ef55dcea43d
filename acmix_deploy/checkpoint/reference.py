"""The model as it was loaded: what every file that is made of it is compared with."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from acmix_deploy import yolo
from acmix_deploy.checkpoint.load import LoadedModel
from acmix_deploy.checkpoint.refusals import does_not_run
from acmix_deploy.errors import AcmixDeployError, UserError
from acmix_deploy.exported import ReferenceReport
from acmix_deploy.faults import FaultId
from acmix_deploy.runtime.inputs import Shape, random_images
from acmix_deploy.runtime.metrics import Array
from acmix_deploy.runtime.torch import OnCpu, quiet, tensors_of


class Reference(nn.Module):
    """A copy of a loaded model that gives, in their order, the tensors that its export gives.

    Args:
        loaded: its module is copied; a program is run as it is.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__()
        module = loaded.module
        self.model = module.module() if isinstance(module, ExportedProgram) else copy.deepcopy(module)
        self.saved_by = getattr(module, "saved_by", "")
        self.uncompared = loaded.by_parts
        self._faults: dict[FaultId, None] = {}
        self._exported: list[int] | None = None

    def forward(self, image: Tensor) -> list[Tensor]:
        """[B, C, H, W] float32 to the model's own results. Raises what the model does."""
        with OnCpu() as watch:
            outputs = tensors_of(self.model(image))
            if self._exported is None:
                self._exported = yolo.exported(self.model, image, outputs)
        self._faults |= watch.faults
        return [outputs[index] for index in self._exported]

    @property
    def report(self) -> ReferenceReport:
        """What it took to run, so far."""
        moved = tuple(fault for fault in self._faults if fault == "cuda-position")
        return ReferenceReport(repaired=moved, uncompared=self.uncompared)


def run(module: nn.Module, shape: Shape, dtype: torch.dtype = torch.float32) -> list[Array]:
    """The outputs of a module on noise [B, C, H, W]. What it cannot compute, no file can: raises UserError."""
    try:
        with quiet(), torch.no_grad():
            outputs = tensors_of(module(torch.from_numpy(random_images(shape)).to(dtype)))
    except AcmixDeployError:
        raise
    except Exception as error:  # the model's own code
        raise does_not_run("the model", module, shape, error) from error
    if not outputs:
        raise UserError("the model returns no tensor")
    return [output.numpy() for output in outputs]
