"""ACmix: self-attention and convolution over shared projections. See ``module`` for the block itself."""
