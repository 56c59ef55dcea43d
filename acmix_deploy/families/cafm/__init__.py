"""Channel attention beside a convolution over its queries, keys and values. See ``module`` for the block itself."""
