"""A detector as models of NVIDIA's Triton Inference Server."""
