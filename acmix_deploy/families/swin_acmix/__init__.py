"""The Swin variant of ACmix: attention in shifted windows and convolution. See ``module`` for the block itself."""
