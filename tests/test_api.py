"""The names that `acmix_deploy` exports, and that its functions leave the process as they found it."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import onnx
import pytest
import torch
from pydantic import BaseModel

import acmix_deploy
from acmix_deploy.families import FAMILIES
from tests import ROOT

SOURCE = Path(acmix_deploy.__file__)
PUBLIC = [name for name in acmix_deploy.__all__ if name != "__version__"]


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


@pytest.mark.parametrize("name", PUBLIC)
def test_name_is_what_its_module_has(name: str) -> None:
    module, _, original = acmix_deploy._WHERE[name].partition(":")
    found = getattr(acmix_deploy, name)
    assert found is getattr(importlib.import_module(f"acmix_deploy.{module}"), original)
    assert found.__doc__
    assert callable(found)
    assert not inspect.isclass(found) or found.__name__ == name


def sections(text: str | None) -> dict[str, str]:
    """A docstring by its headings; what stands before them is the summary."""
    parts = re.split(r"^(Args|Returns|Raises):\n", text or "", flags=re.M)
    return {"summary": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def described(section: str) -> list[str]:
    """The names that a section describes, `a, b: what they are` among them."""
    lines = re.findall(r"^    (\w+(?:, \w+)*): \S", section, re.M)
    return [name for line in lines for name in line.split(", ")]


BLOCKS = {family.recogniser.block.__name__ for family in FAMILIES}


def test_blocks_of_all_families_are_public() -> None:
    assert {*PUBLIC} >= BLOCKS


FUNCTIONS = [name for name in PUBLIC if not inspect.isclass(getattr(acmix_deploy, name))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_says_what_it_takes_gives_and_raises(name: str) -> None:
    function = getattr(acmix_deploy, name)
    signature = inspect.signature(function)
    said = sections(inspect.getdoc(function))
    assert said["summary"].strip()
    assert sorted(described(said.get("Args", ""))) == sorted(signature.parameters)
    assert ("Returns" in said) == (str(signature.return_annotation) != "None")
    errors = described(said.get("Raises", ""))
    assert bool(errors) == (name not in {"explain", "random_images"})
    assert all(issubclass(getattr(acmix_deploy, error), acmix_deploy.AcmixDeployError) for error in errors)


def test_every_function_is_held_to_leave_the_process_as_it_was() -> None:
    """But for what changes or makes models of Ultralytics."""
    tests = "".join((ROOT / "tests" / name).read_text() for name in ("test_library.py", "engine/test_documented.py"))
    called = {name for name in FUNCTIONS if re.search(rf"\bacmix\.{name}\(", tests)}
    assert {*FUNCTIONS} - called == {"register_acmix", "yolo_model", "yolo_yaml"}


@pytest.mark.parametrize("name", [name for name in PUBLIC if name not in FUNCTIONS])
def test_class_says_what_it_takes_and_holds(name: str) -> None:
    found = getattr(acmix_deploy, name)
    said = sections(inspect.getdoc(found))
    assert said["summary"].strip()
    if issubclass(found, BaseModel):
        fields = found.model_fields | found.model_computed_fields
        assert [key for key, field in fields.items() if not field.description and key != "document"] == []
        return
    body = next(node for node in ast.walk(ast.parse(inspect.getsource(found))) if isinstance(node, ast.ClassDef)).body
    texts = {  # what stands behind each field
        before.target.id: isinstance(after, ast.Expr)
        for before, after in zip(body, [*body[1:], None], strict=True)
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name)
    }
    if is_dataclass(found) or issubclass(found, tuple):
        assert [field for field, text in texts.items() if not text] == []
    elif "__init__" in vars(found) and name != "Detector":  # which is made by Detector.load
        assert sorted(described(said["Args"])) == sorted(inspect.signature(found).parameters)


@pytest.mark.parametrize("name", PUBLIC)
def test_what_a_docstring_names_is_public(name: str) -> None:
    found = getattr(acmix_deploy, name)
    texts = [inspect.getdoc(found) or ""]
    if inspect.isclass(found):
        own = [getattr(found, member) for member in vars(found) if not member.startswith("_")]
        texts += [member.__doc__ or "" for member in own if inspect.isroutine(member)]
        texts += [field.description or "" for field in getattr(found, "model_fields", {}).values()]
    public = [getattr(acmix_deploy, other) for other in PUBLIC]
    for named in re.findall(r":\w+:`~?([\w.]+)`", "\n".join(texts)):
        first, _, member = named.partition(".")
        if inspect.isclass(found) and re.search(
            rf"def {first}\(|^    {first}:|\bself\.{first}\b", inspect.getsource(found), re.M
        ):
            continue
        target = vars(sys.modules[found.__module__]).get(first, getattr(acmix_deploy, first, None))
        assert target in public, named
        assert not member or hasattr(target, member), named


HINTS = {"onnx": onnx, "nn": torch.nn}
"""What annotations name and their modules import only when it is used."""
NOT_MADE_BY_CALLERS = {"Detector", "Source"}
"""Whose `load` and `load_source` make them."""


def of_ours(annotation: object) -> set[type]:
    """The classes of this package in an annotation."""
    if isinstance(annotation, list):  # arguments of a Callable
        return {found for part in annotation for found in of_ours(part)}
    if arguments := get_args(annotation):
        return of_ours([get_origin(annotation), *arguments])
    ours = isinstance(annotation, type) and annotation.__module__.startswith("acmix_deploy")
    return {annotation} if ours and isinstance(annotation, type) else set()


@pytest.mark.parametrize("name", [name for name in PUBLIC if name not in NOT_MADE_BY_CALLERS])
def test_what_arguments_take_and_functions_return_is_public(name: str) -> None:
    found = getattr(acmix_deploy, name)
    call = vars(found).get("__init__") if inspect.isclass(found) else inspect.unwrap(found)
    if not inspect.isfunction(call):
        return  # of a class that has none of its own
    own = {cls.__name__ for hint in get_type_hints(call, localns=HINTS).values() for cls in of_ours(hint)}
    assert own - {*PUBLIC} == ({"Device"} if name == "DeviceSession" else set())  # which also takes its name


NEEDS_TORCH = {
    "Source", "TorchRunner", "deploy", "export", "load_source", *BLOCKS,
}  # fmt: skip


def test_what_needs_pytorch_says_so() -> None:
    code = """
import json, sys
sys.modules["torch"] = None
import acmix_deploy
said = {}
for name in acmix_deploy.__all__:
    try:
        getattr(acmix_deploy, name)
    except ModuleNotFoundError as error:
        said[name] = str(error)
print(json.dumps(said))
"""
    said = json.loads(python(code))
    assert {*said} == NEEDS_TORCH
    for name, message in said.items():
        assert message.startswith(f"acmix_deploy.{name} needs PyTorch, which is not installed. Run: pip install ")
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    (sentence,) = re.findall(r"These\s+need it: (.+?) and the\s+\[blocks\]", page, re.S)
    assert {*re.findall(r"`(\w+)`", sentence)} == NEEDS_TORCH - BLOCKS


def test_unknown_name() -> None:
    with pytest.raises(ImportError, match="fuze"):
        from acmix_deploy import fuze  # noqa: F401
    with pytest.raises(AttributeError, match="fuze"):
        _ = acmix_deploy.fuze


def code(language: str) -> str:
    """What the pages of docs/ show in a language."""
    pages = (path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/*.md")))
    return "\n".join(block for page in pages for block in re.findall(rf"^```{language}\n(.*?)^```$", page, re.M | re.S))


def returned() -> set[str]:
    """Names that callers get and need not make: types of results, and errors."""
    objects = [getattr(acmix_deploy, name) for name in PUBLIC]
    functions = [found for found in objects if not inspect.isclass(found)]
    functions.append(acmix_deploy.Detector.__call__)
    text = " ".join(str(inspect.signature(function).return_annotation) for function in functions)
    errors = {found.__name__ for found in objects if inspect.isclass(found) and issubclass(found, Exception)}
    aliases = {where.partition(":")[2]: name for name, where in acmix_deploy._WHERE.items()}
    return errors | {aliases.get(word, word) for word in re.findall(r"\w+", text)}


def test_what_is_called_has_an_example_that_runs() -> None:
    """By tests/scripts/test_docs.py, and what needs an engine or a device by test_documented.py in tests/engine and
    tests/device."""
    called = {name for name in PUBLIC if re.search(rf"\b{name}\b[(.]", code("python"))}
    elsewhere = {"DeviceSession", "EngineRunner", "RemoteStages", "adopt", "build", "build_plugin"}
    assert {*PUBLIC} - returned() - called == elsewhere
    tests = "".join((ROOT / f"tests/{folder}/test_documented.py").read_text() for folder in ("engine", "device"))
    assert all(f'"{name}"' in tests for name in elsewhere)


def test_examples_import_what_is_public() -> None:
    imported = []
    for language in ("python", "py"):
        for names in re.findall(r"^ *from acmix_deploy import (.+)$", code(language), re.M):
            imported += [name.strip() for name in names.split(",")]
        others = re.findall(r"^ *(?:import|from) acmix_deploy\.\S+", code(language), re.M)
        assert {*others} <= {"import acmix_deploy.ultralytics"}
    assert len({*imported}) > 50
    assert {*imported} <= {*PUBLIC}


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


def test_the_command_of_ultralytics_without_it() -> None:
    play = "import runpy, sys; sys.modules['ultralytics'] = None"
    code = f"{play}; runpy.run_module('acmix_deploy.ultralytics', None, '__main__')"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 3
    found, to_do = done.stderr.splitlines()
    assert found == "error: Ultralytics is needed here and is not installed"
    assert to_do.startswith("Run: pip install ")
