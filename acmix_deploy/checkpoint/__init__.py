"""Checkpoint -> module, without running code from the file unless it is trusted."""

from acmix_deploy.checkpoint.load import Contents, LoadedModel, load, read

__all__ = ["Contents", "LoadedModel", "load", "read"]
