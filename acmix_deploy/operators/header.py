"""The definitions as a C++ header: names, defaults and limits for the native kernels and their wrappers."""

from __future__ import annotations

import re

from acmix_deploy.operators import OPERATORS
from acmix_deploy.operators.spec import Attribute, Operator

_HEAD = """\
// Written by `make docs` from acmix_deploy/operators: edit the definitions there.
#pragma once

#include <cstdint>

namespace acmix {

struct IntAttribute {
    const char* name;
    std::int32_t fallback;
    std::int32_t minimum;
};

struct FloatAttribute {
    const char* name;
    float fallback;
};
"""


def cpp_header() -> str:
    """The text of ``plugins/include/acmix/operators.h``."""
    return "\n".join([_HEAD, *map(_namespace, OPERATORS), "}  // namespace acmix\n"])


def _namespace(operator: Operator) -> str:
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", operator.op_type.removeprefix("Acmix")).lower()
    lines = [
        f"namespace {name} {{",
        f'inline constexpr const char* kOpType = "{operator.op_type}";',
        f'inline constexpr const char* kVersion = "{operator.version}";',
        *(_attribute(attribute) for attribute in operator.attributes if attribute.kind != "string"),
        *(
            f"inline constexpr std::int32_t {_constant(quantity)}s[] = {{{', '.join(map(str, values))}}};"
            for quantity, values in operator.kernel_limits.items()
        ),
        f"}}  // namespace {name}\n",
    ]
    return "\n".join(lines)


def _attribute(attribute: Attribute) -> str:
    name = f'{_constant(attribute.name)}{{"{attribute.name}"'
    if attribute.kind == "int":
        return f"inline constexpr IntAttribute {name}, {attribute.default}, {attribute.minimum}}};"
    return f"inline constexpr FloatAttribute {name}, {float(attribute.default)}f}};"


def _constant(name: str) -> str:
    """``num_heads`` as ``kNumHeads``."""
    return "k" + "".join(part.capitalize() for part in name.split("_"))
