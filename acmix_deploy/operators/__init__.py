"""What blocks reduce to. One folder an operator: definition, oracle and, where graphs carry it, its ONNX body."""

from importlib import import_module
from pkgutil import iter_modules

from acmix_deploy.operators.spec import Operator

_FOLDERS = sorted(module.name for module in iter_modules(__path__) if module.ispkg)

OPERATORS: tuple[Operator, ...] = tuple(
    getattr(import_module(f"{__name__}.{folder}"), folder.upper()) for folder in _FOLDERS
)
"""The constant of each folder that is called as the folder is, in capitals."""

__all__ = ["OPERATORS"]
