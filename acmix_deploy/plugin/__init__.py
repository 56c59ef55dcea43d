"""The TensorRT plugin: built on the target from the sources that come with the package, and looked into."""

from acmix_deploy.plugin.build import build
from acmix_deploy.plugin.library import Creator, Entry, Library, check, describe

__all__ = ["Creator", "Entry", "Library", "build", "check", "describe"]
