"""The names that `acmix_deploy` exports, and that its functions leave the process as they found it."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import acmix_deploy
from tests import ROOT

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


def test_functions_have_an_example() -> None:
    """In docs/python.md, whose blocks tests/scripts/test_docs.py runs; those for engines run in tests/engine alone."""
    page = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    run = "".join(re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S))
    shown = "".join(re.findall(r"^```py\n(.*?)^```$", page, re.M | re.S))
    functions = {name for name in acmix_deploy.__all__ if name[0].islower()}
    called = {name for name in functions if re.search(rf"\b{name}\(", run)}
    assert functions - called == {"build", "adopt"}
    assert all(re.search(rf"\b{name}\(", shown) for name in ("build", "adopt"))


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_importing_the_package_imports_nothing_else() -> None:
    code = "import sys; before = {*sys.modules}; import acmix_deploy; print(sorted({*sys.modules} - before))"
    assert python(code) in ("['acmix_deploy']\n", "['acmix_deploy', 'importlib', 'importlib._abc', 'types']\n")


@pytest.mark.parametrize(
    "imports",
    [
        "import acmix_deploy.export, acmix_deploy.profile.run, acmix_deploy.verify; from acmix_deploy import {}",
        "from acmix_deploy import {}; import acmix_deploy.export, acmix_deploy.profile.run, acmix_deploy.verify",
    ],
)
def test_functions_are_not_the_modules_of_their_names(imports: str) -> None:
    """Whichever was imported first."""
    names = "export, profile, verify"
    code = f"{imports.format(names)}; print([f.__name__ for f in ({names}, acmix_deploy.profile)])"
    assert python(code) == "['export', 'profile', 'verify', 'profile']\n"
