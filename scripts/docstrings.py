"""Docstrings as the site shows them: an extension of Griffe, which reads the package for mkdocstrings."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

import griffe

import acmix_deploy

_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([^`]+)`")
_TOGETHER = re.compile(r"^( +)(\w+(?:, \w+)+)(: .*(?:\n\1 +\S.*)*)", re.M)


class Docstrings(griffe.Extension):
    """Of what ``acmix_deploy.__all__`` names: Sphinx's roles as code, linked where the page has what they name;
    arguments that are described together one by one; attributes and Pydantic's fields as a table of their class;
    defaults by their values."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        named = [pkg[where.replace(":", ".")] for where in acmix_deploy._WHERE.values()]
        shown = [found.final_target if isinstance(found, griffe.Alias) else found for found in named]
        linked = {found.path for found in shown}
        linked |= {member.path for found in shown for member in found.members.values() if member.is_function}
        for found in shown:
            if isinstance(found, griffe.Class):
                tabulate(found)
            for described in (found, *found.members.values()):
                if not isinstance(described, griffe.Alias):
                    rewrite(described, linked)


def tabulate(found: griffe.Class) -> None:
    """Describe the attributes of a class in its docstring, and not one by one."""
    fields = {}
    if any("Field(" in str(attribute.value) for attribute in found.attributes.values()):
        module, _, name = found.path.rpartition(".")
        fields = getattr(import_module(module), name).model_fields
    rows = []
    for name, member in found.members.items():
        if member.is_attribute and not name.startswith("_") and (member.docstring or member.annotation):
            text = member.docstring.value if member.docstring else (name in fields and fields[name].description) or ""
            rows.append(f"    {name}: " + text.replace("\n", "\n        "))
            member.docstring = None
    if rows:
        text = found.docstring.value if found.docstring else ""
        found.docstring = griffe.Docstring("\n".join([text, "", "Attributes:", *rows]), parent=found)


def rewrite(found: griffe.Object, linked: set[str]) -> None:
    """Put an object's docstring and defaults into the form in which they are shown."""

    def code(match: re.Match[str]) -> str:
        first, dot, rest = match[1].partition(".")
        try:
            path = found.resolve(first) + dot + rest
        except griffe.NameResolutionError:
            path = match[1]
        return f"[`{match[1]}`][{path}]" if path in linked else f"`{match[1]}`"

    if found.docstring:
        text = _ROLE.sub(code, found.docstring.value)
        head, args, rest = text.partition("Args:\n")
        together, end, rest = rest.partition("\n\n")
        found.docstring.value = head + args + _TOGETHER.sub(separate, together) + end + rest
    for parameter in found.parameters if isinstance(found, griffe.Function) else ():
        if isinstance(parameter.default, griffe.ExprName):
            parameter.default = value_of(found, parameter.default) or parameter.default


def separate(match: re.Match[str]) -> str:
    return "\n".join(match[1] + name + match[3] for name in match[2].split(", "))


def value_of(scope: griffe.Object, name: griffe.ExprName) -> str | None:
    """What a constant is, where it is a number or a string."""
    try:
        value = scope.modules_collection[name.canonical_path].value
    except (KeyError, griffe.AliasResolutionError):
        return None
    return value if isinstance(value, str) else None
