"""A detector as models of NVIDIA's Triton Inference Server."""

from typing import Literal

Backend = Literal["native", "python"]
"""What runs a detector in Triton: its own backends, or this package."""
