"""Programs that ``torch.export`` saved."""

from __future__ import annotations

import ast
import json
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acmix_deploy.checkpoint.refusals import unreadable, untrusted
from acmix_deploy.process import WHOLE_PROCESS

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_FILES = re.compile(
    r"models/\w+\.json|data/weights/(weight_\d+|\w+\.json)|data/constants/(tensor_\d+|\w+\.json)"
    r"|data/sample_inputs/\w+\.pt|archive_format|archive_version|byteorder|version|\.data/\w+|extra/.*"
)
_NAMES = re.compile(r"[A-Z][A-Za-z]*|[a-z]+\d+|L|torch|max|min")
_ATTRIBUTES = {"size", "stride", "storage_offset", "sym_max", "sym_min", "sym_float", "sym_int"}


def load_program(path: Path, *, trust: bool) -> ExportedProgram:
    """The program of a ``.pt2`` file, as it was saved.

    Raises:
        UserError: it cannot be read, or has what runs as code in it and is not to be trusted.
    """
    import torch

    try:
        refused = [] if trust else _code_in(path)
        if not refused:
            with _weights_only(not trust):
                return torch.export.load(path)
    except Exception as error:
        raise unreadable(path, error) from error
    raise untrusted(path, refused)


@contextmanager
def _weights_only(enforced: bool) -> Iterator[None]:
    """Make every ``torch.load`` within a restricted one: ``torch.export.load`` asks for full ones."""
    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    with WHOLE_PROCESS:
        before = os.environ.get(variable)
        if enforced:
            os.environ[variable] = "1"
        try:
            yield
        finally:
            os.environ.pop(variable, None)
            if before is not None:
                os.environ[variable] = before


def _code_in(path: Path) -> list[str]:
    """What in a ``.pt2`` archive would run as code: files that are no weights, and sizes that are no arithmetic.

    PyTorch evaluates the expressions of symbolic sizes and of the guards on them, and loads pickled objects and
    compiled libraries from the archive.
    """
    found = []
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            inner = name.partition("/")[2]
            if not _FILES.fullmatch(inner):
                found.append(inner or name)
            elif inner.startswith("models/"):
                found += [code for code in _expressions(json.loads(archive.read(name))) if not _is_arithmetic(code)]
    return found


def _expressions(node: Any, key: str = "") -> Iterator[str]:
    """Strings of a program's JSON that PyTorch evaluates."""
    if isinstance(node, str) and key in ("expr_str", "guards_code"):
        yield node
    elif isinstance(node, list):
        for entry in node:
            yield from _expressions(entry, key)
    elif isinstance(node, dict):
        if key == "range_constraints":
            yield from node
        for name, entry in node.items():
            yield from _expressions(entry, name)


def _is_arithmetic(code: str) -> bool:
    """Whether ``code`` only computes with sizes: operators, numbers, names of symbols and of sympy's classes."""
    kinds = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Subscript, ast.Call, ast.keyword)
    signs = (ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context)
    try:
        nodes = list(ast.walk(ast.parse(code, mode="eval")))
    except SyntaxError:
        return False

    def harmless(node: ast.AST) -> bool:
        if isinstance(node, ast.Name):
            return _NAMES.fullmatch(node.id) is not None
        if isinstance(node, ast.Attribute):
            return node.attr in _ATTRIBUTES
        if isinstance(node, ast.Constant):
            return not isinstance(node.value, str) or node.value.isidentifier()
        if isinstance(node, ast.Call) and not isinstance(node.func, (ast.Name, ast.Attribute)):
            return False
        return isinstance(node, kinds + signs)

    return all(map(harmless, nodes))
