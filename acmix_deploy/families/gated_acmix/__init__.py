"""Global attention and a convolution, weighed by a gate. See ``module`` for the block itself."""
