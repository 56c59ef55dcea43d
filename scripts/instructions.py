"""Count the warp instructions of the kernels in their compiled code and write them to plugins/instructions.csv.

A count is what a warp issues on its way from the first instruction to the last one, loops as often as they run. Warps
take the way of those that are inside the image: no branch for the border, the whole warp active.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from acmix_deploy.errors import CheckFailed, MissingComponent
from acmix_deploy.operators import OPERATORS
from acmix_deploy.operators.axes import shapes
from acmix_deploy.operators.neighborhood_attention import Border
from acmix_deploy.operators.spec import Operator
from acmix_deploy.plugin.toolchain import Cuda, find_cuda
from scripts import resources
from tests.plugin import kernels
from tests.plugin.kernels import PLUGINS

TABLE = Path(__file__).resolve().parents[1] / "plugins" / "instructions.csv"
ARCHITECTURES = (87, 90, 110, 120)
HEADINGS = ("prologue", "loads", "rows", "epilogue")
"""The sections of a kernel, which comments of its source begin with."""

UNITS = {
    "fma": "FADD FFMA FMUL HADD2 HFMA2 HMUL2 IMAD",
    "alu": "CS2R F2FP FMNMX FMNMX3 FSEL FSETP I2FP IABS IADD IADD3 IMNMX ISETP LEA LOP3 MOV P2R PLOP3 PRMT R2P SEL SHF "
    "VIADD VIADDMNMX VIMNMX",
    "tensor": "HMMA",
    "mufu": "F2F F2I I2F MUFU",
    "lsu": "LD LDG LDGSTS LDL LDS LDSM SHFL ST STG STL STS",
    "": "BAR BMOV BRA BSSY BSYNC CALL DEPBAR EXIT LDC LDCU LDGDEPBAR NOP R2UR S2R S2UR WARPSYNC",
}
"""What executes an opcode. The last ones, and those of uniform registers, take no unit that is ever the bound."""
UNIT_OF = {opcode: unit for unit, opcodes in UNITS.items() for opcode in opcodes.split()}

JUMPS = ("BRA", "CALL")


HEADS = 4
WINDOWS = {"local_attention": 7, "neighborhood_attention": 7, "outlook_attention": 3}
"""kernel_size by operator: that of the detectors' ACmix blocks, of NATTEN's networks, and of VOLO."""
LOADERS = {"local_attention": "Loader", "neighborhood_attention": "NeighborhoodLoader"}
"""The class of a kernel on tensor cores that brings keys and values."""


@dataclass(frozen=True)
class Shape:
    """A map on which a kernel runs."""

    channels: int
    side: int
    stride: int = 1

    def __str__(self) -> str:
        return f"{self.channels} ch, {self.side}x{self.side}, stride {self.stride}"


SHAPES = (Shape(64, 80), Shape(128, 40), Shape(256, 20), Shape(128, 40, stride=2))
"""Three levels of the detectors, and a smaller map."""


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel as it is compiled for one shape."""

    operator: Operator
    name: str
    dtype: str
    layout: str
    shape: Shape

    @property
    def sizes(self) -> dict[str, int]:
        """Attributes and axes, by their names in the definition."""
        shape = self.shape
        sizes = {"num_heads": HEADS, "kernel_size": WINDOWS[self.operator.name], "stride": shape.stride}
        sizes |= {"dilation": 1, "border": Border.SHIFTED}
        return {**sizes, "batch": 1, "head_dim": shape.channels // HEADS, "height": shape.side, "width": shape.side}

    @property
    def tensors(self) -> list[tuple[int, ...]]:
        """Shapes of inputs and output."""
        return shapes(self.operator, self.sizes)

    @property
    def queries(self) -> int:
        """Pixels of the output, of all heads."""
        *_, height, width = self.tensors[-1]
        return HEADS * height * width

    @property
    def header(self) -> str:
        return f"{self.operator.name}_{self.name}.cuh"

    @property
    def instance(self) -> str:
        """An expression of C++, spelt as the demangled symbol is."""
        dtype, layout = f"(Dtype){kernels.DTYPES.index(self.dtype)}", f"(Layout){kernels.LAYOUTS.index(self.layout)}"
        strides = [self.sizes["stride"]] * (self.name == "mma" and "stride" in self.operator.axes.values())
        types = [layout] if self.name == "mma" else [dtype, layout]
        values = (*types, self.sizes["head_dim"], *strides, self.sizes["kernel_size"])
        return f"{self.operator.name}_{self.name}_kernel<{', '.join(map(str, values))}>"

    @property
    def scope(self) -> str:
        """Declarations of C++ by which the bounds of its loops have values."""
        if self.name == "simt":
            return f"constexpr int kKernelSize = {self.sizes['kernel_size']};"
        sizes = ", ".join(str(self.sizes[name]) for name in ("head_dim", "stride", "kernel_size"))
        layout = self.instance[self.instance.index("<") + 1 :].partition(",")[0]
        loader = LOADERS[self.operator.name]
        return f"using Shape = MmaShape<{layout}, {sizes}>; constexpr int kWords = {loader}<{layout}, Shape>::kWords;"

    def __str__(self) -> str:
        return f"{self.operator.name}_{self.name} {self.dtype} {self.layout}"


KERNELS = tuple(
    Kernel(operator, kernel.name, dtype, layout, shape)
    for operator in OPERATORS
    if operator.name in WINDOWS
    for kernel in operator.kernels
    for dtype, layout in kernel.formats
    for shape in SHAPES
    # Which windows of outlook attention a pixel lies in depends on the pixel where they are further apart.
    if operator.name == "local_attention" or shape.stride == 1
)

AT_BORDER = "bring_each"
"""The function that only warps at the border of the image call."""


@dataclass(frozen=True)
class Instruction:
    """A machine instruction, with the lines of source that it stems from, the innermost one first."""

    opcode: str
    predicate: str
    operands: str
    frames: tuple[tuple[str, int], ...]
    target: int | None = None
    """Where it may jump to, as an index."""

    @property
    def conditional(self) -> bool:
        return bool(self.predicate) or bool(re.match(r"!?U?P\d", self.operands))

    def wavefronts(self) -> int:
        """Words of 128 bytes that it moves through L1 and shared memory, without conflicts, the whole warp active."""
        name, *suffixes = self.opcode.split(".")
        if name == "LDSM":
            return int(suffixes[-1]) if suffixes[-1].isdigit() else 1
        return 4 if "128" in suffixes else 2 if "64" in suffixes else 1


def parse(sass: str) -> dict[str, list[Instruction]]:
    """The kernels in what ``nvdisasm -c -gi`` prints, by symbol."""
    _, *parts = re.split(r"^//-+ \.text\.(\S+) -+$", sass, flags=re.MULTILINE)
    return dict(zip(parts[::2], map(_instructions, parts[1::2]), strict=True))


def _instructions(text: str) -> list[Instruction]:
    lines: list[tuple[str, str, str, tuple[tuple[str, int], ...]]] = []
    labels: dict[str, int] = {}
    frames: list[tuple[str, int]] = []
    fresh = False
    for line in text.splitlines():
        if location := re.match(r'\s*//## File "(?:[^"]*/)?([^"/]+)", line (\d+)', line):
            frames = [*(frames if fresh else ()), (location[1], int(location[2]))]
            fresh = True
        elif label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(lines)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(@!?U?PT?\d?)?\s*([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;", line):
            lines.append((found[2], found[1] or "", found[3], tuple(frames)))
            fresh = False

    def target(opcode: str, operands: str) -> int | None:
        label = re.search(r"`\((\.L\w+)\)", operands)
        return labels[label[1]] if label and opcode.split(".")[0] in JUMPS else None

    return [Instruction(*line[:3], line[3], target(line[0], line[2])) for line in lines]


class Source:
    """What the text of a kernel's header says of its lines."""

    def __init__(self, text: str) -> None:
        self.lines = text.splitlines()
        kernel = next(i for i, line in enumerate(self.lines) if "__global__" in line)
        while not self.lines[kernel].startswith("template"):
            kernel -= 1
        end = next(i for i, line in enumerate(self.lines) if i > kernel and line == "}")
        self.sections: dict[int, str] = {}
        section = HEADINGS[0]
        for number in range(kernel, end + 1):
            if heading := re.match(rf"\s*// ({'|'.join(HEADINGS)})(:|$)", self.lines[number], re.IGNORECASE):
                section = heading[1].lower()
            self.sections[number + 1] = section
        begins = [i for i, line in enumerate(self.lines) if f"void {AT_BORDER}(" in line]
        self.border = range(begins[0] + 1, self.lines.index("    }", begins[0]) + 2) if begins else range(0)

    def bound(self, line: int) -> str | None:
        """How often the innermost loop around a line runs that is not unrolled."""
        enclosing = math.inf
        for number in range(line - 1, 0, -1):
            text = self.lines[number]
            depth = len(text) - len(text.lstrip())
            if not text or text.startswith("#") or depth >= enclosing:
                continue
            enclosing = depth
            loop = re.match(r"\s*for \(int (\w+) = 0; \1 < ([^;]+); \+\+\1\b", text)
            if loop and self.lines[number - 1] != "#pragma unroll":
                return loop[2]
        return None


class Code:
    """The compiled code of one kernel, with its source."""

    def __init__(self, instructions: Sequence[Instruction], header: str, source: Source) -> None:
        self.instructions, self.header, self.source = instructions, header, source

    def bound(self, index: int) -> str | None:
        """How often the loop runs that this instruction ends, in C++; None where it ends none, or one at the border."""
        instruction = self.instructions[index]
        if instruction.target is None or instruction.target >= index or self.at_border(instruction):
            return None
        for file, line in instruction.frames:
            if file == self.header and (bound := self.source.bound(line)):
                return bound
        raise CheckFailed(f"a loop ends at {instruction.frames}; found none in {self.header} that runs from 0 on")

    def bounds(self) -> set[str]:
        return {bound for index in range(len(self.instructions)) if (bound := self.bound(index))}

    def section(self, instruction: Instruction) -> str:
        """That of the innermost line inside the kernel itself."""
        lines = (line for file, line in instruction.frames if file == self.header)
        return next((section for line in lines if (section := self.source.sections.get(line))), HEADINGS[0])

    def at_border(self, instruction: Instruction) -> bool:
        return any(file == self.header and line in self.source.border for file, line in instruction.frames)

    def executed(self, trips: Mapping[str, int]) -> Iterator[Instruction]:
        """The instructions that a warp issues. A branch forward is taken where it always is, or skips what is rare."""
        left: dict[int, int] = {}
        index = 0
        while True:
            instruction = self.instructions[index]
            yield instruction
            if instruction.opcode == "EXIT" and not instruction.predicate:
                return
            bound, target = self.bound(index), instruction.target
            index += 1
            if bound and target is not None:
                left[index] = left.get(index, trips[bound]) - 1
                if left[index] > 0:
                    index = target
                else:
                    del left[index]
            elif target is not None and target > index and (not instruction.conditional or self._rare(index, target)):
                index = target

    def _rare(self, begin: int, end: int) -> bool:
        """Whether a warp inside the image jumps over this: memory for the border alone, or a call of a slow path."""
        skipped = self.instructions[begin:end]
        memory = [instruction for instruction in skipped if unit_of(instruction) == "lsu"]
        jump = next((instruction for instruction in skipped if instruction.target is not None), None)
        calls = jump is not None and jump.opcode.startswith("CALL") and not jump.conditional
        return calls or (bool(memory) and all(map(self.at_border, memory)))

    def count(self, trips: Mapping[str, int]) -> Counter[str]:
        """What a warp executes: by section, unit, wavefronts and opcode."""
        found: Counter[str] = Counter()
        for instruction in self.executed(trips):
            found[self.section(instruction)] += 1
            found[instruction.opcode] += 1
            if instruction.predicate == "@!PT" or (instruction.predicate and self.at_border(instruction)):
                continue  # issued, and then dropped
            unit = unit_of(instruction)
            # A product of depth 8 takes half of the time of one of depth 16.
            found[unit] += 0.5 if instruction.opcode.startswith("HMMA.1688.") else 1
            found["imad"] += instruction.opcode.startswith("IMAD")
            found["shared"] += instruction.wavefronts() if unit == "lsu" else 0
        return found


def unit_of(instruction: Instruction) -> str:
    name = instruction.opcode.split(".")[0]
    if name.startswith("U"):
        return ""
    if name not in UNIT_OF:
        raise CheckFailed(f"{name} in the compiled code is not known; say in UNITS what executes it")
    return UNIT_OF[name]


def find_tool(name: str, *folders: Path) -> Path:
    """A program of CUDA such as nvdisasm: on the PATH, in folders such as that of nvcc, or of its Python package.

    Raises:
        MissingComponent: there is none.
    """
    packages = importlib.util.find_spec("nvidia")
    installed = packages.submodule_search_locations or [] if packages else []
    candidates = [
        *([Path(found)] if (found := shutil.which(name)) else []),
        *(folder / name for folder in folders),
        *(path for folder in installed for path in sorted(Path(folder).glob(f"cu*/bin/{name}"), reverse=True)),
    ]
    for path in candidates:
        if path.is_file():
            return path
    raise MissingComponent(
        f"{name} was looked for on the PATH, beside nvcc and among the Python packages, and not found",
        f"Run: pip install nvidia-cuda-{name}",
    )


def compile_kernels(cuda: Cuda, architecture: int, wanted: Iterable[Kernel]) -> dict[Kernel, Code]:
    """The kernels as the build compiles them for an architecture, disassembled."""
    nvdisasm = find_tool("nvdisasm", cuda.nvcc.resolve().parent)
    wanted = list(wanted)
    headers = dict.fromkeys(kernel.header for kernel in wanted)
    instances = dict.fromkeys(kernel.instance for kernel in wanted)
    source = "".join(f'#include "acmix/{header}"\n' for header in headers)
    source += f"namespace acmix {{ void* kernels[] = {{{', '.join(f'(void*){name}' for name in instances)}}}; }}\n"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernels.cu")
        file.write_text(source)
        cubin = file.with_suffix(".cubin")
        # -lineinfo changes no instruction; the rest is what CMake passes that could.
        flags = [
            "-O3",
            "-DNDEBUG",
            "-std=c++17",
            "-lineinfo",
            f"-arch=sm_{architecture}",
            "-I",
            PLUGINS / "include",
        ]
        resources.run([cuda.nvcc, *flags, "-cubin", file, "-o", cubin], cuda)
        found = parse(kernels.run([nvdisasm, "-c", "-gi", cubin]))
    code = dict(zip(resources.readable(list(found)), found.values(), strict=True))
    sources = {header: Source((PLUGINS / "include/acmix" / header).read_text(encoding="utf-8")) for header in headers}
    return {kernel: Code(code[kernel.instance], kernel.header, sources[kernel.header]) for kernel in wanted}


def evaluate(bounds: Mapping[Kernel, Iterable[str]]) -> dict[Kernel, dict[str, int]]:
    """How often loops run, by their bounds; the C++ compiler says it."""
    headers = dict.fromkeys(kernel.header for kernel in bounds)
    expressions = [(kernel, bound) for kernel, found in bounds.items() for bound in sorted(found)]
    prints = "".join(f'{{ {kernel.scope} std::printf("%d\\n", {bound}); }}\n' for kernel, bound in expressions)
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "bounds.cpp"), Path(folder, "bounds")
        source.write_text(
            "#include <cstdio>\n"
            + "".join(f'#include "acmix/{header}"\n' for header in headers)
            + f"using namespace acmix;\nint main() {{\n{prints}}}\n"
        )
        kernels.run(["g++", *kernels.FLAGS, "-fno-access-control", "-w", source, "-o", program])
        values = map(int, kernels.run([program]).split())
    trips: dict[Kernel, dict[str, int]] = {kernel: {} for kernel in bounds}
    for (kernel, bound), value in zip(expressions, values, strict=True):
        trips[kernel][bound] = value
    return trips


def launch(library: kernels.Kernels, kernel: Kernel) -> tuple[int, int]:
    """The blocks and the warps by which a kernel is launched for one image.

    The block in the middle runs; the emulator knows what it executed.
    """
    inputs = [np.zeros(shape, kernel.dtype) for shape in kernel.tensors[:-1]]
    attributes = {attribute.name: kernel.sizes.get(attribute.name, 1.0) for attribute in kernel.operator.attributes}
    library.launch(kernel.operator, *inputs, layout=kernel.layout, kernel=kernel.name, only_middle=True, **attributes)
    return library.blocks(), library.warps()


@dataclass(frozen=True)
class Row:
    """What 16 queries of a head cost: warp instructions, by section and by unit.

    ``imad`` is the part of ``fma`` that multiplies integers; ``shared`` are words of 128 bytes of L1 and shared memory.
    """

    architecture: str
    kernel: str
    shape: str
    queries: int
    """Of one image, in all heads, as the next two are."""
    bytes: int
    """Of all tensors."""
    blocks: int
    warps: float
    """More than 1 where lanes have no query."""
    prologue: float
    loads: float
    rows: float
    epilogue: float
    total: float
    fma: float
    imad: float
    alu: float
    tensor: float
    mufu: float
    lsu: float
    shared: float


def row(architecture: int, kernel: Kernel, count: Counter[str], blocks: int, warps: int) -> Row:
    """One line of the table, from what one warp executes."""
    factor = warps * 16 / kernel.queries
    moved = sum(map(math.prod, kernel.tensors)) * np.dtype(kernel.dtype).itemsize
    count["warps"], count["total"] = 1, sum(count[heading] for heading in HEADINGS)
    numbers = {
        field.name: round(count[field.name] * factor, 2 if field.name == "warps" else 1) for field in fields(Row)[6:]
    }
    return Row(f"sm_{architecture}", str(kernel), str(kernel.shape), kernel.queries, moved, blocks, **numbers)


def measure(cuda: Cuda, architectures: Iterable[int], library: kernels.Kernels) -> list[Row]:
    """The rows of the table, in order."""
    rows = []
    for architecture in architectures:
        code = compile_kernels(cuda, architecture, KERNELS)
        trips = evaluate({kernel: found.bounds() for kernel, found in code.items()})
        rows += [
            row(architecture, kernel, found.count(trips[kernel]), *launch(library, kernel))
            for kernel, found in code.items()
        ]
    return rows


def read_table() -> tuple[str, list[Row]]:
    """The CUDA release that the committed table was made with, and its rows."""
    release, rows = resources.read_cells(TABLE)
    return release, [Row(*row[:3], *map(int, row[3:6]), *map(float, row[6:])) for row in rows]


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    cuda = find_cuda()
    rows = measure(cuda, ARCHITECTURES, kernels.Kernels(kernels.library()))
    resources.write_table(TABLE, cuda.version, rows)
    print(f"{TABLE.name}: {len(rows)} kernels, CUDA {cuda.version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
