"""Where along the graph a candidate leaves its reference: the error of every tensor that both files have."""

from __future__ import annotations

import glob
import shlex
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime import InferenceSession
from polygraphy.backend.onnx import modify_outputs
from pydantic import BaseModel, ConfigDict, Field, computed_field

from acmix_deploy.errors import CheckFailed, UserError
from acmix_deploy.families.blocks import FUSED_NODE
from acmix_deploy.graph import RESHAPING, SHAPE_OF, in_order, name_nodes, names_read, read
from acmix_deploy.half import faithful
from acmix_deploy.onnx_file import some
from acmix_deploy.operators.spec import Tolerance
from acmix_deploy.options import FLOAT32, Provider
from acmix_deploy.process import polygraphy_unlogged
from acmix_deploy.processing import detach
from acmix_deploy.runtime.metrics import Array, Deviation, deviation
from acmix_deploy.runtime.onnxruntime import inputs_of, open_session, precision_of
from acmix_deploy.runtime.reason import reason
from acmix_deploy.verify.limits import FILE_TOLERANCES, tolerance_of

INPUTS = 3
"""How many inputs are looked at, the first ones: one of each size that is tried."""

_HELD = 1 << 26  # bytes of the tensors of one file that are held at a time
_FLOATS = {"tensor(float)": 4, "tensor(float16)": 2, "tensor(double)": 8}  # with their bytes
_HALF = "tensor(float16)"
_RANGE = "range"  # the group of what float16 cannot hold, see acmix_deploy.options.FLOAT32
_NAMED = 4  # nodes in place of that group
_SCORES = frozenset({"Sigmoid", "Softmax"})
_MOVING = RESHAPING | {"Concat", "DequantizeLinear", "Gather", "QuantizeLinear", "ReduceMax", "Slice", "Split"}
_CHOOSING = frozenset({"ArgMax", "ArgMin", "NonMaxSuppression", "NonZero", "TopK", "Unique"})
_LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_TYPING = frozenset({"Cast", "DequantizeLinear", "QuantizeLinear"})  # what the conversion of a file puts in


class Mend(BaseModel):
    """What to leave in floating point, so that an error does not begin."""

    model_config = ConfigDict(frozen=True)

    option: Literal["--float32", "--exclude"] = Field(description="option of the verb that made the file")
    nodes: tuple[str, ...] = Field(description="names of the nodes that it has to name, or a group of nodes")

    def spelt(self, float32: Sequence[str] = FLOAT32) -> str:
        """The option as on a command line, of `quantize` where no other verb has it.

        Args:
            float32: what stays in float32 already; ``--float32`` takes one list of all.
        """
        if self.option == "--exclude":
            return " ".join(("quantize", *(f"--exclude {shlex.quote(glob.escape(name))}" for name in self.nodes)))
        names = (glob.escape(name).replace(",", "?") for name in self.nodes)
        return f"--float32 {shlex.quote(','.join(dict.fromkeys((*float32, *names))))}"


class LayerError(Deviation):
    """One tensor of the candidate against that of the same name in the reference, on the input where it is worst."""

    tensor: str = Field(description="its name in both files")
    node: str = Field(description="name of the node of the candidate that computes it")
    operator: str = Field(description="type of that node")
    block: str = Field(default="", description="the fused block that the node is part of; empty where it is in none")
    sources: tuple[str, ...] = Field(description="the nearest tensors before it that were compared")
    unseen: tuple[str, ...] = Field(
        default=(), description="nodes between these and it, whose results the reference does not have"
    )
    end: bool = Field(description="whether it is an output of the graph, or one is moved, joined or chosen from it")
    scores: bool = Field(description="whether it is so and holds what logistic functions give, which has a wider limit")
    limit: float = Field(description="largest relative L2 accepted")
    mend: Mend | None = Field(
        default=None,
        description="what mends it, where the limit of the candidate's type is left; null where it is not, or where no "
        "option does",
    )

    @computed_field(description="whether relative_l2 is there and within the limit")  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool:
        return self.relative_l2 is not None and self.relative_l2 <= self.limit

    @property
    def badness(self) -> float:
        """The error as a multiple of the limit."""
        return np.inf if self.relative_l2 is None else self.relative_l2 / (self.limit or 1)

    def __str__(self) -> str:
        found = self.problem or f"relative L2 {self.relative_l2:.1e}"
        before = f", or at {some(self.unseen)} before it, which the reference does not have" if self.unseen else ""
        return f"at {self.node}{before} ({found})"


class LayerErrors(BaseModel):
    """One candidate along its graph."""

    model_config = ConfigDict(frozen=True)

    candidate: str = Field(description="name of what was compared with the reference")
    precision: str = Field(description="element type that the candidate computes in")
    float32: tuple[str, ...] = Field(description="what stays in float32 by the options of the file, where it is half")
    inputs: tuple[dict[str, tuple[int, ...]], ...] = Field(description="shapes of the inputs that it was looked at on")
    unshared: int = Field(
        description="how many floating-point tensors of the candidate are not in the reference, or in another shape; "
        "those that only change the type left out"
    )
    chosen: int = Field(
        description="how many were left out because they depend on a choice, such as of the best boxes, whose order "
        "rounding decides"
    )
    layers: tuple[LayerError, ...] = Field(description="one for each tensor, in the order of the candidate's nodes")

    @computed_field(  # type: ignore[prop-decorator]
        description="the first that leaves its limit: where an output is beyond its own, or a tensor is infinite or "
        "all zeros in one file alone, on a way to it on which all are; null where none does"
    )
    @property
    def first(self) -> LayerError | None:
        beyond = {layer.tensor: layer for layer in self.layers if not layer.passed}
        queue, reached = self.lasting, set[str]()
        while queue:
            layer = queue.pop()
            if layer.tensor not in reached:
                reached.add(layer.tensor)
                queue.extend(beyond[tensor] for tensor in layer.sources if tensor in beyond)
        return next((layer for name, layer in beyond.items() if name in reached or not reached), None)

    @property
    def lasting(self) -> list[LayerError]:
        """What is beyond its limit, and no error on the way that an output no longer shows."""
        return [layer for layer in self.layers if not layer.passed and (layer.end or layer.problem)]

    def worst(self, most: int = 10) -> list[LayerError]:
        """Those with the largest errors as multiples of their limits."""
        return sorted(self.layers, key=lambda layer: -layer.badness)[:most]

    def judged_by(self, tolerances: Mapping[str, Tolerance | None]) -> LayerErrors:
        """The same under other limits."""
        limits = _limits(tolerances, self.precision)
        layers = tuple(layer.model_copy(update={"limit": limits[layer.scores]}) for layer in self.layers)
        return self.model_copy(update={"layers": layers})

    def __str__(self) -> str:
        first = self.first
        if first is None:
            return f"{self.candidate} is within the limits in all {len(self.layers)} tensors that were compared"
        left = f"{self.candidate} leaves the limit of {first.limit:.1e} first {first}"
        if not self.lasting:
            return f"{left}; in the outputs it is within the limits again"
        return f"{left}; keep it in floating point: {first.mend.spelt(self.float32)}" if first.mend else left


def compare_layers(
    name: str,
    reference: Path | onnx.ModelProto,
    candidate: Path | onnx.ModelProto,
    feeds: Sequence[Mapping[str, Array]],
    *,
    tolerances: Mapping[str, Tolerance | None] = FILE_TOLERANCES,
    float32: Sequence[str] = FLOAT32,
    provider: Provider = "cpu",
) -> LayerErrors:
    """Compare every floating-point tensor that the graphs of two ONNX files share by name and shape.

    Tensors inside function bodies and branches are not looked at. What is behind a choice, such as of the best boxes,
    is left out: rounding decides the order of what it chose. Tensors are fetched in parts, so that of either file at
    most 64 MiB, or one tensor, are held beside what ONNX Runtime needs; for each part both run once more on each input.

    Args:
        name: of the candidate.
        reference: what is right.
        candidate: what is compared with it.
        feeds: inputs by name, float32; the first three are used.
        tolerances: by precision, as of outputs; what logistic functions give has the limit of scores.
        float32: what stays in float32 in the candidate by its options, for the advice.
        provider: what runs the candidate.

    Returns:
        An error for each tensor, in the order of the candidate's nodes.

    Raises:
        UserError: they share nothing but their outputs, or ONNX Runtime refuses one.
        CheckFailed: one fails on an input.
    """
    right = _Graph.of(reference)
    other = _Graph.of(candidate, provider, {tensor: node.name for tensor, node in right.writers.items()})
    feeds = feeds[:INPUTS]
    outputs = {value.name for value in (*right.model.graph.output, *other.model.graph.output)}
    behind = right.behind_choice() | other.behind_choice()
    both = [tensor for tensor in other.types if tensor in right.types]
    if outputs.issuperset(both):
        raise UserError(
            f"{name} shares no tensor with the reference but {'outputs' if both else 'nothing'}: the names differ",
            "Compare files that were made from one export.",
        )
    shared = [tensor for tensor in both if tensor not in behind]
    sizes = _sizes(right, other, shared, feeds, provider)
    precision = precision_of(other.model)
    limits = _limits(tolerances, precision)
    found: dict[str, Deviation] = {}
    unfit: set[str] = set()
    for part in _parts(sizes):
        sessions = right.fetching(part), other.fetching(part, provider)
        for feed in feeds:
            expected, actual = (_run(session, feed) for session in sessions)
            for tensor in part:
                exact = expected.pop(tensor)
                distance = deviation(exact, actual.pop(tensor))
                found[tensor] = max(found.get(tensor, distance), distance, key=_distance)
                beyond = _distance(distance) > limits[False] and other.types[tensor] == _HALF
                if beyond and not _fits(exact, limits[False]):
                    unfit.add(tensor)
    ends = other.ends()
    scores = other.scores() & ends
    mends = _Mends(right, other, found, unfit, limits[False], float32)
    layers = []
    for tensor in (tensor for tensor in other.types if tensor in found):
        node = other.writer(tensor)
        block = FUSED_NODE.match(node.name)
        sources, between = other.before(node, found.__contains__)
        hidden = (
            one for one in between if one.op_type not in _TYPING and not other.types.keys().isdisjoint(one.output)
        )
        layers.append(
            LayerError(
                **found[tensor].model_dump(),
                tensor=tensor,
                node=node.name,
                operator=node.op_type,
                block=block[1] if block else "",
                sources=tuple(sources),
                unseen=tuple(one.name for one in hidden),
                end=tensor in ends,
                scores=tensor in scores,
                limit=limits[tensor in scores],
                mend=mends.of(tensor, precision) if _distance(found[tensor]) > limits[tensor in scores] else None,
            )
        )
    return LayerErrors(
        candidate=name,
        precision=precision,
        float32=tuple(float32),
        inputs=tuple({key: array.shape for key, array in feed.items()} for feed in feeds),
        unshared=sum(
            other.writers[tensor].op_type not in _TYPING for tensor in other.types.keys() - found.keys() - behind
        ),
        chosen=len(other.types.keys() & behind),
        layers=tuple(layers),
    )


class _Graph(NamedTuple):
    """A model with what has to be known of its graph."""

    model: onnx.ModelProto
    run: onnx.ModelProto
    """What computes the same here, see :mod:`acmix_deploy.half`."""
    types: dict[str, str]
    """ONNX Runtime's name of the type of every floating-point tensor that a node computes, in order."""
    writers: dict[str, onnx.NodeProto]
    readers: dict[str, list[onnx.NodeProto]]

    @classmethod
    def of(
        cls, source: Path | onnx.ModelProto, provider: Provider = "cpu", known: Mapping[str, str] | None = None
    ) -> _Graph:
        """Nodes without a name are called as what computes the same, before casts, in ``known``: names by tensor."""
        model = onnx.ModelProto()
        model.CopyFrom(read(source) if isinstance(source, Path) else source)
        detach(model)
        taken = {node.name for node in model.graph.node}
        called = dict(known or {})
        for node in reversed(model.graph.node):
            name = next((called[tensor] for tensor in node.output if tensor in called), "")
            if node.op_type == "Cast" and node.input[0] not in called:
                called[node.input[0]] = name
            elif not node.name and name not in taken:
                node.name = name
        name_nodes(model)
        in_order(model)
        computing = [node for node in model.graph.node if node.op_type != "Constant"]
        names = [tensor for node in computing for tensor in node.output if tensor]
        session = open_session(_marked(model, names), optimize=False)
        types = {value.name: value.type for value in session.get_outputs() if value.type in _FLOATS}
        readers: dict[str, list[onnx.NodeProto]] = {}
        for node in computing:
            for tensor in names_read(node):
                readers.setdefault(tensor, []).append(node)
        writers = {tensor: node for node in computing for tensor in node.output if tensor}
        run, _ = faithful(model) if provider == "cpu" else (model, "")
        assert isinstance(run, onnx.ModelProto)
        return cls(model, run, {tensor: types[tensor] for tensor in names if tensor in types}, writers, readers)

    def fetching(self, tensors: Iterable[str], provider: Provider = "cpu") -> InferenceSession:
        """A session that gives these tensors."""
        return open_session(_marked(self.run, tensors), lean=True, provider=provider)

    def measuring(self, tensors: Iterable[str], provider: Provider = "cpu") -> InferenceSession:
        """One that gives the shapes of these tensors by :data:`SHAPE_OF`, and keeps none."""
        told = onnx.ModelProto()
        told.CopyFrom(self.model)
        told.graph.node.extend(helper.make_node("Shape", [tensor], [SHAPE_OF.format(tensor)]) for tensor in tensors)
        named = _marked(told, (SHAPE_OF.format(tensor) for tensor in tensors))
        return open_session(named, reduces=True, lean=True, provider=provider)

    def writer(self, tensor: str) -> onnx.NodeProto:
        """The node that computes a tensor, before the casts that a conversion put behind it."""
        node = self.writers[tensor]
        while node.op_type == "Cast" and node.input[0] in self.types and node.output[0] in self.types:
            node = self.writers[node.input[0]]
        return node

    def behind_choice(self) -> set[str]:
        """The tensors that depend on what a node chose."""
        found: set[str] = set()
        for node in self.model.graph.node:
            if node.op_type in _CHOOSING or not found.isdisjoint(names_read(node)):
                found.update(node.output)
        return found

    def scores(self) -> set[str]:
        """The tensors that hold results of logistic functions, however they were moved and joined."""
        found: set[str] = set()
        for node in self.model.graph.node:
            moved = node.input if node.op_type == "Concat" else node.input[:1]
            if node.op_type in _SCORES or (node.op_type in _MOVING and found.issuperset(moved)):
                found.update(node.output)
        return found

    def ends(self) -> set[str]:
        """The outputs, and what they are moved, joined and chosen from."""
        found: set[str] = set()
        queue = [value.name for value in self.model.graph.output]
        while queue:
            tensor = queue.pop()
            found.add(tensor)
            writer = self.writers.get(tensor)
            if writer is not None and writer.op_type in _MOVING | _CHOOSING:
                queue.extend(name for name in writer.input if name not in found)
        return found

    def before(self, node: onnx.NodeProto, stop: Callable[[str], bool]) -> tuple[list[str], list[onnx.NodeProto]]:
        """The nearest tensors before a node that ``stop`` accepts, and the nodes between them and it."""
        queue, met = deque(names_read(node)), set[str]()
        tensors, nodes = [], dict[int, onnx.NodeProto]()
        while queue:
            tensor = queue.popleft()
            writer = self.writers.get(tensor)
            if tensor in met or writer is None:
                continue
            met.add(tensor)
            if stop(tensor):
                tensors.append(tensor)
            else:
                nodes[id(writer)] = writer
                queue.extend(names_read(writer))
        return tensors, [*nodes.values()]


class _Mends:
    """What mends an error that begins at a tensor."""

    def __init__(
        self,
        right: _Graph,
        other: _Graph,
        found: Mapping[str, Deviation],
        unfit: set[str],
        limit: float,
        float32: Collection[str],
    ) -> None:
        """
        Args:
            right, other: reference and candidate.
            found: errors by tensor.
            unfit: tensors that float16, in which the candidate has them, cannot hold within the limit.
            limit: of the relative L2.
            float32: what stays in float32 in the candidate already.
        """
        self.other, self.found, self.unfit = other, found, unfit
        self.right, self.limit, self.float32 = right, limit, float32
        self.worst = self._layers()

    @cached_property
    def coarse(self) -> set[str]:
        """Weights that the candidate does not hold within the limit."""
        stored, exact = _stored(self.other.model), _stored(self.right.model)
        pairs = {name: (exact[name], weight) for name, weight in stored.items() if name in exact}
        return {
            name
            for name, (right, weight) in pairs.items()
            if weight.dtype == np.float16 and _distance(deviation(right, weight)) > self.limit
        }

    def of(self, tensor: str, precision: str) -> Mend | None:
        node = self.other.writer(tensor)
        if tensor in self.unfit:
            names = tuple(dict.fromkeys((node.name, *self._readers(node))))
            many = len(names) > _NAMED and _RANGE not in self.float32
            return Mend(option="--float32", nodes=(_RANGE,) if many else names)
        if precision == "int8":
            layer = self.worst.get(tensor)
            return Mend(option="--exclude", nodes=(layer[1],)) if layer else None
        if precision != "float16":
            return None
        before = [] if not self.coarse.isdisjoint(node.input) else self._halves_before(node)
        return Mend(option="--float32", nodes=tuple(dict.fromkeys((node.name, *before))))

    def _readers(self, node: onnx.NodeProto) -> list[str]:
        """What reads a result that float16 cannot hold, and what reads theirs where it cannot hold these either: each
        has to compute in float32, or there is a float16 tensor before it."""
        found: list[str] = []
        queue, met = deque(node.output), set[str]()
        while queue:
            for reader in self.other.readers.get(queue.popleft(), ()):
                if reader.output[0] in met:
                    continue
                met.add(reader.output[0])
                if reader.op_type != "Cast":
                    found.append(reader.name)
                if reader.op_type == "Cast" or not self.unfit.isdisjoint(reader.output):
                    queue.extend(reader.output)
        return found

    def _halves_before(self, node: onnx.NodeProto) -> list[str]:
        """The nearest nodes before one that compute in float16; what they give was rounded before it came here."""

        def computed(tensor: str) -> bool:
            return self.other.types.get(tensor) == _HALF and self.other.writers[tensor].op_type != "Cast"

        return [self.other.writers[tensor].name for tensor in self.other.before(node, computed)[0]]

    def _layers(self) -> dict[str, tuple[float, str]]:
        """For each tensor of the INT8 layers that it is computed from the one that adds most to the error: how much, by
        the squares of relative errors, which add up where they are independent, and its name."""
        worst: dict[str, tuple[float, str]] = {}
        error = {tensor: _distance(found) for tensor, found in self.found.items()}
        for node in self.other.model.graph.node:
            before = [worst[tensor] for tensor in node.input if tensor in worst]
            inputs = [self.other.writers.get(tensor) for tensor in node.input]
            quantised = [source for source in inputs if source and source.op_type == "DequantizeLinear"]
            if node.op_type in _TYPING and node.input[0] in error:
                error.setdefault(node.output[0], error[node.input[0]])
            if node.op_type in _LAYERS and quantised and node.output[0] in self.found:
                came = max((error.get(source.output[0], 0) for source in quantised), default=0)
                here = error[node.output[0]]
                before.append((here**2 - came**2 if np.isfinite(came) else 0.0, node.name))
            if before:
                worst.update(dict.fromkeys(node.output, max(before)))
        return worst


def _limits(tolerances: Mapping[str, Tolerance | None], precision: str) -> dict[bool, float]:
    """Of a tensor, and of one that holds scores."""
    found = {}
    for scores in (False, True):
        tolerance = tolerance_of(tolerances, precision, "scores" if scores else "")
        assert tolerance
        found[scores] = tolerance.limit()
    return found


def _distance(found: Deviation) -> float:
    return np.inf if found.relative_l2 is None else found.relative_l2


def _fits(exact: Array, limit: float) -> bool:
    """Whether float16 holds an array within the limit."""
    with np.errstate(all="ignore"):
        return _distance(deviation(exact, exact.astype(np.float16))) <= limit


def _stored(model: onnx.ModelProto) -> dict[str, Array]:
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
    return {
        tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.data_type in floats
    }


def _marked(model: onnx.ModelProto, tensors: Iterable[str]) -> onnx.ModelProto:
    """The model with these tensors as its outputs."""
    with polygraphy_unlogged():
        marked: onnx.ModelProto = modify_outputs(model, outputs=[*map(glob.escape, tensors)], copy=True)
    return marked


def _run(session: InferenceSession, feed: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs by name. Raises CheckFailed."""
    inputs = {node.name: feed[node.name].astype(node.dtype) for node in inputs_of(session)}
    names = [value.name for value in session.get_outputs()]
    try:
        with np.errstate(all="ignore"):
            return dict(zip(names, session.run(names, inputs), strict=True))
    except Exception as error:  # ONNX Runtime's error types share no base of their own
        raise CheckFailed(f"with all its tensors as outputs a file fails on the inputs: {reason(error)}") from error


def _sizes(
    right: _Graph, other: _Graph, tensors: Sequence[str], feeds: Sequence[Mapping[str, Array]], provider: Provider
) -> dict[str, int]:
    """Bytes, of the largest input, of each tensor that has the same shape in both on every input."""
    sizes = dict.fromkeys(tensors, 0)
    sessions = right.measuring(tensors), other.measuring(tensors, provider)
    for feed in feeds:
        expected, actual = (_run(session, feed) for session in sessions)
        for tensor in [*sizes]:
            shape = expected[SHAPE_OF.format(tensor)]
            if np.array_equal(shape, actual[SHAPE_OF.format(tensor)]):
                sizes[tensor] = max(sizes[tensor], int(shape.prod()) * _FLOATS[right.types[tensor]])
            else:
                del sizes[tensor]
    return sizes


def _parts(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """The tensors in parts that can be held."""
    part: list[str] = []
    held = 0
    for tensor, size in sizes.items():
        if part and held + size > _HELD:
            yield part
            part, held = [], 0
        part.append(tensor)
        held += size
    if part:
        yield part
