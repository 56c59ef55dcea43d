"""A detector as files of NVIDIA's DeepStream: what its element nvinfer reads, and a library that reads the outputs."""
