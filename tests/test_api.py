"""The names that `acmix_deploy` exports, and that its functions leave the process as they found it."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import acmix_deploy

SOURCE = Path(acmix_deploy.__file__)


def test_names_are_said_alike_in_all_places() -> None:
    """Type checkers read the imports and `__all__`, Python reads `_WHERE`."""
    (block,) = (node for node in ast.parse(SOURCE.read_text()).body if isinstance(node, ast.If) and not node.orelse
                if isinstance(node.test, ast.Name))  # fmt: skip
    imported = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {f"{name}": tuple(where.split(":")) for name, where in acmix_deploy._WHERE.items()} == {
        name: (str(module).removeprefix("acmix_deploy."), original) for name, (module, original) in imported.items()
    }
    assert {*acmix_deploy.__all__} == {*imported, "__version__"}
    assert {*acmix_deploy.__all__} <= {*dir(acmix_deploy)}


@pytest.mark.parametrize("name", [name for name in acmix_deploy.__all__ if name != "__version__"])
def test_name_is_what_its_module_has(name: str) -> None:
    module, _, original = acmix_deploy._WHERE[name].partition(":")
    found = getattr(acmix_deploy, name)
    assert found is getattr(importlib.import_module(f"acmix_deploy.{module}"), original)
    assert found.__doc__
    assert callable(found)


def test_unknown_name() -> None:
    with pytest.raises(ImportError, match="fuze"):
        from acmix_deploy import fuze  # noqa: F401
    with pytest.raises(AttributeError, match="fuze"):
        _ = acmix_deploy.fuze


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_importing_the_package_imports_nothing_else() -> None:
    code = "import sys; before = {*sys.modules}; import acmix_deploy; print(sorted({*sys.modules} - before))"
    assert python(code) in ("['acmix_deploy']\n", "['acmix_deploy', 'importlib', 'importlib._abc', 'types']\n")


@pytest.mark.parametrize("name", ["profile", "verify"])
@pytest.mark.parametrize(
    "before", ["", "import acmix_deploy.{0}", "from acmix_deploy.{0} import {0}", "import acmix_deploy.{0}.run"]
)
def test_function_is_not_its_module(name: str, before: str) -> None:
    """Whatever was imported before or is imported after."""
    code = f"{before.format(name)}\nfrom acmix_deploy import {name}\nimport acmix_deploy.{name}\n"
    assert python(f"{code}print({name}.__name__, acmix_deploy.{name} is {name})") == f"{name} True\n"
