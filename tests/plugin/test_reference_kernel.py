"""The CUDA reference that the kernels are compared with on a GPU, compiled for the CPU, against the PyTorch oracles."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
import pytest
import torch

from acmix_deploy.operators.local_attention.oracle import local_attention
from acmix_deploy.operators.outlook_attention.oracle import outlook_attention
from tests.plugin import kernels
from tests.plugin.kernels import Array, Problem

pytestmark = pytest.mark.skipif(bool(kernels.missing_compiler()), reason=kernels.missing_compiler())

ORACLES = {"local_attention": local_attention, "outlook_attention": outlook_attention}


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("reference") / "libreference_cpu.so"
    return ctypes.CDLL(str(kernels.build([kernels.PLUGINS / "tests/gpu/reference.cu"], path, "-shared")))


def reference(
    library: ctypes.CDLL, operator: str, problem: Problem, inputs: list[Array | None], shape: tuple[int, ...]
) -> Array:
    """What ``operator`` computes, float64 NCHW of ``shape``."""
    function = getattr(library, f"reference_{operator}")
    function.restype = ctypes.c_char_p
    layout = kernels.LAYOUTS[problem.layout]
    arrays = [None if x is None else np.ascontiguousarray(kernels.to_memory(x, layout)) for x in inputs]
    y = np.full(shape, np.nan)
    pointers = [None if array is None else ctypes.c_void_p(array.ctypes.data) for array in [*arrays, y]]
    reason = function(ctypes.byref(problem), *pointers, None)
    assert reason is None, reason
    return y


@pytest.mark.parametrize("operator", ORACLES)
def test_reference(library, operator):
    random = np.random.default_rng(0)
    for dtype, layout, stride, kernel_size in itertools.product(kernels.DTYPES, kernels.LAYOUTS, (1, 2), (3, 5)):
        attributes = {"num_heads": 2, "kernel_size": kernel_size, "stride": stride, "scale": -0.75}
        memory = {"dtype": kernels.DTYPES.index(dtype), "layout": kernels.LAYOUTS.index(layout)}
        if operator == "local_attention":
            height, shapes = 4, ((2, 18, 4, 6), (3, 2))
        else:
            height, shapes = 5, ((2, 2 * kernel_size**4, -(-5 // stride), 6 // stride), (2, 6, 5, 6))
        problem = Problem(batch=2, head_dim=3, height=height, width=6, **memory, **attributes)
        inputs = [random.standard_normal(shape).astype(dtype) for shape in shapes]
        expected = ORACLES[operator](*map(torch.from_numpy, inputs), **attributes).numpy()
        y = reference(library, operator, problem, inputs, expected.shape)
        assert np.linalg.norm(y - expected) <= 1e-12 * np.linalg.norm(expected), (dtype, layout, stride, kernel_size)


def test_reference_without_position(library):
    qkv = np.random.default_rng(0).standard_normal((1, 9, 5, 4)).astype(np.float32)
    problem = Problem(batch=1, num_heads=1, head_dim=3, height=5, width=4, kernel_size=3, stride=1, scale=1.0)
    zero, none = (
        reference(library, "local_attention", problem, [qkv, position], (1, 3, 5, 4))
        for position in (np.zeros((3, 2), np.float32), None)
    )
    assert np.array_equal(zero, none)
