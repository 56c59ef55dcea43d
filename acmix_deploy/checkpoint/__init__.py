"""Checkpoint -> module, without running code from the file unless it is trusted."""

from acmix_deploy.checkpoint.load import SUFFIXES, Contents, LoadedModel, load, read

__all__ = ["SUFFIXES", "Contents", "LoadedModel", "load", "read"]
