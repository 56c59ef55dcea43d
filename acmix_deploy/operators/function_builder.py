"""Write an ONNX function as arithmetic: ``(size + 1) * stride`` becomes the nodes that compute it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from acmix_deploy.operators.spec import Operator


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor inside the function being built; ``//`` and ``%`` are for integers."""

    name: str
    builder: FunctionBuilder

    def __add__(self, other: Value | int) -> Value:
        return self.builder("Add", self, other)

    def __sub__(self, other: Value | int) -> Value:
        return self.builder("Sub", self, other)

    def __rsub__(self, other: int) -> Value:
        return self.builder("Sub", other, self)

    def __mul__(self, other: Value | int) -> Value:
        return self.builder("Mul", self, other)

    def __floordiv__(self, other: Value | int) -> Value:
        return self.builder("Div", self, other)

    def __mod__(self, other: Value | int) -> Value:
        return self.builder("Mod", self, other)

    def axes(self, *new: int) -> Value:
        """The tensor with axes of length 1 inserted at the positions ``new`` of the result."""
        return self.builder("Unsqueeze", self, list(new))


class FunctionBuilder:
    """Collects nodes; calling it appends one: ``f("MatMul", a, b)``.

    Plain integers and lists of integers become int64 constants, arrays constants of their own type. Constants are
    ``value`` tensors, since TensorRT 8 misreads ``value_int``; only :meth:`attribute` has no other way.
    """

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Value] = {}

    def __call__(self, op_type: str, *inputs: Value | int | list[int] | npt.NDArray[Any], **attributes: Any) -> Value:
        names = [value.name if isinstance(value, Value) else self.constant(value).name for value in inputs]
        return self._append(helper.make_node(op_type, names, [""], **attributes))

    def constant(self, content: int | list[int] | npt.NDArray[Any]) -> Value:
        """A constant tensor; equal ones are shared."""
        array = np.asarray(content) if isinstance(content, np.ndarray) else np.asarray(content, np.int64)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self._append(
                helper.make_node("Constant", [], [""], value=numpy_helper.from_array(array))
            )
        return self._constants[key]

    def attribute(self, name: str, kind: str) -> Value:
        """The scalar value of the node's attribute ``name`` of ``kind`` "int" or "float"."""
        node = helper.make_node("Constant", [], [""])
        reference = onnx.AttributeProto(name=f"value_{kind}", ref_attr_name=name)
        reference.type = onnx.AttributeProto.INT if kind == "int" else onnx.AttributeProto.FLOAT
        node.attribute.append(reference)
        return self._append(node)

    def input(self, name: str) -> Value:
        """The function's input ``name``."""
        return Value(name, self)

    def range(self, length: Value | int) -> Value:
        """int64 ``[0, 1, ..., length - 1]``."""
        return self("Range", 0, length, 1)

    def shape(self, *sizes: Value | int) -> Value:
        """A shape tensor from scalars; 0 copies the input's size and -1 is inferred, as Reshape defines them."""
        return self("Concat", *(size.axes(0) if isinstance(size, Value) else [size] for size in sizes), axis=0)

    def reshape(self, value: Value, *sizes: Value | int) -> Value:
        """Reshape to ``sizes``, see :meth:`shape`."""
        fixed = [size for size in sizes if isinstance(size, int)]
        return self("Reshape", value, fixed if len(fixed) == len(sizes) else self.shape(*sizes))

    def function(self, operator: Operator, opset: int, result: Value) -> onnx.FunctionProto:
        """The finished body of ``operator`` with one output, ``y``."""
        nodes = [*self.nodes, helper.make_node("Identity", [result.name], ["y"])]
        opsets = [helper.make_opsetid("", opset)]
        inputs = [tensor.name for tensor in operator.inputs]
        attributes = [attribute.name for attribute in operator.attributes]
        return helper.make_function(operator.domain, operator.op_type, inputs, ["y"], nodes, opsets, attributes)

    def _append(self, node: onnx.NodeProto) -> Value:
        node.output[0] = f"{node.op_type.lower()}_{len(self.nodes)}"
        self.nodes.append(node)
        return Value(node.output[0], self)
