"""The definitions as C++: all that plugins/ holds of an operator beside its kernels."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from acmix_deploy.operators import OPERATORS
from acmix_deploy.operators.axes import Axis
from acmix_deploy.operators.spec import Attribute, Kernel, Operator, Tensor

_WRITTEN = "// Written by `make docs` from acmix_deploy/operators: edit the definitions there.\n// clang-format off"

_HEADER = """\
{written}
#pragma once

#include <cuda_runtime_api.h>

#include <limits>
#include <tuple>

#include "acmix/definition.h"

namespace acmix {{

{problems}
using Operators = List<{types}>;

}}  // namespace acmix

extern "C" {{
{functions}
}}
"""

_PROBLEM = """\
// {formula}
{tensors}
struct {type} {{
    Dtype dtype;
    Layout layout;
{fields}
}};

template <>
struct Definition<{type}> {{
    using P = {type};
    static constexpr const char* kOpType = "{op_type}";
    static constexpr const char* kVersion = "{version}";
    static constexpr Member<P> kPadded = {padded};
{constants}
}};
"""

_OPERATORS = """\
{written}
#include "dispatch.h"

namespace acmix {{

{tables}
}}  // namespace acmix

extern "C" {{
{functions}
}}
"""

_TABLE = """\
{launchers}

template <>
Span<Entry<{type}>> table() {{
{rows}
    return kRows;
}}

template Found<{type}> find(const {type}&, std::int32_t, const Kernel*);
template std::string launch(const {type}&, const void* const*, void*, cudaStream_t, const Kernel*);
"""

_FUNCTION = """\
{declaration} {{
    const void* const inputs[] = {{{inputs}}};
    return acmix::launch_on_device(problem, kernel, inputs, {output}, stream);
}}"""

_INSTANTIATIONS = """\
{written}
#include "acmix/{kernel}.cuh"

namespace acmix {{

{launchers}

}}  // namespace acmix
"""


def native_sources(operators: Sequence[Operator] = OPERATORS) -> dict[str, str]:
    """The text of each generated file, by its path in ``plugins/``."""
    return {
        "include/acmix/operators.h": _HEADER.format(
            written=_WRITTEN,
            problems=_lines(map(_problem, operators)),
            types=", ".join(map(_type, operators)),
            functions=_lines(f"ACMIX_EXPORT {_declaration(operator)};" for operator in operators),
        ),
        "src/operators.cpp": _OPERATORS.format(
            written=_WRITTEN, tables=_lines(map(_table, operators)), functions=_lines(map(_function, operators))
        ),
        **{
            f"src/{operator.name}_{kernel.name}.cu": _instantiations(operator, kernel)
            for operator in operators
            for kernel in operator.kernels
        },
    }


def _problem(operator: Operator) -> str:
    """What is asked of a kernel, and the definition behind it."""
    tensors = (*operator.inputs, *operator.outputs)
    numbers = [attribute for attribute in operator.attributes if attribute.kind != "string"]
    others = [attribute for attribute in numbers if attribute.name not in operator.axes.values()]
    limits = operator.kernel_limits
    sizes = [
        f'{{"{name}", &P::{name}, {_constant(name)}s}}' if name in limits else f'{{"{name}", &P::{name}}}'
        for name in operator.axes.values()
    ]
    letter, where = operator.minima_where or ("", 0)
    only = f", &P::{operator.axes[letter]}, {where:d}" if letter else ""
    bounds = [
        *((value, least, f"false{only}") for value, least in operator.minima.items()),
        *((value, str(most), "true") for value, most in operator.kernel_maxima.items()),
    ]
    bound_rows = (f"{{{_axis(operator, value)}, {_axis(operator, limit)}, {rest}}}" for value, limit, rest in bounds)
    named = [value for attribute in numbers for value in attribute.names or ()]
    return _PROBLEM.format(
        formula=operator.formula,
        tensors=_lines(f"//   {tensor.name} [{', '.join(tensor.axes)}]: {tensor.meaning}" for tensor in tensors),
        type=_type(operator),
        op_type=operator.op_type,
        version=operator.version,
        padded="&P::head_dim" if operator.head_dims[0] else "nullptr",
        fields=_lines(
            [
                *(f"    std::int32_t {name};  // {letter}" for letter, name in operator.axes.items()),
                *(f"    {_number(attribute)} {attribute.name};" for attribute in others),
            ]
        ),
        constants=_lines(
            [
                *(f"    static constexpr std::int32_t {_constant(value.name)} = {value:d};" for value in named),
                *(
                    f"    static constexpr std::int32_t {_constant(name)}s[] = {{{', '.join(map(str, values))}}};"
                    for name, values in limits.items()
                ),
                _array("Size<P> kSizes[] = ", sizes),
                _array("std::tuple kAttributes", map(_attribute, numbers)),
                *(
                    _array(f"Axis<P> {_constant(tensor.name)}[] = ", (_axis(operator, axis) for axis in tensor.axes))
                    for tensor in tensors
                ),
                _array("Tensor<P> kInputs[] = ", map(_tensor, operator.inputs)),
                _array("Tensor<P> kOutputs[] = ", map(_tensor, operator.outputs)),
                _array("Bound<P> kBounds[] = ", bound_rows),
            ]
        ),
    )


def _table(operator: Operator) -> str:
    """The operator's dispatch table, and what looks into it."""
    rows = (
        f"{{{dtype}, {layout}, {head_dim}, Kernel::{_constant(kernel.name)}, {kernel.min_sm}, "
        f"{operator.name}_{kernel.name}<{dtype}, {layout}, {head_dim}>}}"
        for kernel in operator.kernels
        for dtype, layout, head_dim in _instances(operator, kernel)
    )
    return _TABLE.format(
        launchers=_lines(
            f"template <Dtype, Layout, int>\n{_launcher(operator, kernel)};" for kernel in operator.kernels
        ),
        type=_type(operator),
        rows=_array(f"Entry<{_type(operator)}> kRows[] = ", rows),
    )


def _function(operator: Operator) -> str:
    inputs = ", ".join(tensor.name for tensor in operator.inputs)
    return _FUNCTION.format(declaration=_declaration(operator), inputs=inputs, output=operator.outputs[0].name)


def _declaration(operator: Operator) -> str:
    """The operator's function in C."""
    inputs = "".join(f"const void* {tensor.name}, " for tensor in operator.inputs)
    return (
        f"const char* acmix_{operator.name}(const acmix::{_type(operator)}* problem, int kernel, "
        f"{inputs}void* {operator.outputs[0].name}, cudaStream_t stream)"
    )


def _instantiations(operator: Operator, kernel: Kernel) -> str:
    launchers = (
        f"template {_launcher(operator, kernel, f'<{dtype}, {layout}, {head_dim}>')};"
        for dtype, layout, head_dim in _instances(operator, kernel)
    )
    return _INSTANTIATIONS.format(
        written=_WRITTEN, kernel=f"{operator.name}_{kernel.name}", launchers=_lines(launchers)
    )


def _launcher(operator: Operator, kernel: Kernel, arguments: str = "") -> str:
    """The function of the kernel's header, or one instance of it."""
    name = f"{operator.name}_{kernel.name}{arguments}"
    return f"cudaError_t {name}(const {_type(operator)}&, const void* const*, void*, cudaStream_t)"


def _instances(operator: Operator, kernel: Kernel) -> list[tuple[str, str, int]]:
    """Element type, layout and padded head_dim of each row of the dispatch table."""
    return [
        (f"Dtype::{_constant(dtype)}", f"Layout::{_constant(layout)}", head_dim)
        for dtype, layout in kernel.formats
        for head_dim in operator.head_dims
    ]


def _attribute(attribute: Attribute) -> str:
    name, number = attribute.name, _number(attribute)
    default = attribute.default if attribute.kind == "int" else f"{float(attribute.default)}f"
    minimum = f"std::numeric_limits<{number}>::lowest()" if attribute.minimum is None else attribute.minimum
    return f'Attribute<P, {number}>{{"{name}", &P::{name}, {default}, {minimum}}}'


def _number(attribute: Attribute) -> str:
    return "std::int32_t" if attribute.kind == "int" else "float"


def _tensor(tensor: Tensor) -> str:
    return f'{{"{tensor.name}", {_constant(tensor.name)}}}'


def _axis(operator: Operator, text: str) -> str:
    axis = Axis.parse(text)
    spaced = re.sub(r"[-*/]", r" \g<0> ", text)
    named = re.sub(r"\w+", lambda word: operator.axes.get(word[0], word[0]), spaced)
    factors = ", ".join(f"{{&P::{operator.axes[letter]}, {power}}}" for letter, power in axis.powers.items())
    fields = [f'"{named}"', str(axis.coefficient), f"{{{factors}}}", str(axis.divisor), str(axis.rounds_up).lower()]
    fields += [str(axis.less)] * bool(axis.less)
    return f"{{{', '.join(fields)}}}"


def _array(declaration: str, items: Iterable[str]) -> str:
    rows = ",\n        ".join(items)
    return f"    static constexpr {declaration}{{\n        {rows}}};"


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(lines)


def _type(operator: Operator) -> str:
    """The struct that holds a problem, such as ``LocalAttention``."""
    return operator.op_type.removeprefix("Acmix")


def _constant(name: str) -> str:
    """``num_heads`` as ``kNumHeads``."""
    return "k" + "".join(part.capitalize() for part in name.split("_"))
