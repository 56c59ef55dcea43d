"""Window attention beside a depthwise convolution, on channels-last maps. See ``module`` for the block itself."""
