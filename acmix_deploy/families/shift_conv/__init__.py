"""ShiftConv: a convolution as 1x1 convolutions, fixed shifts and a sum. See ``module`` for the block itself."""
