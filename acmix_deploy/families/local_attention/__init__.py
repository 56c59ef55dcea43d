"""Local attention without the convolution of ACmix."""
