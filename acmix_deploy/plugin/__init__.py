"""The TensorRT plugin: built on the target from the sources that come with the package, and looked into."""
