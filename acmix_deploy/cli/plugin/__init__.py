"""Build the TensorRT plugin on the target and look into built ones.

example:
  acmix-deploy plugin build
  acmix-deploy plugin check libacmix_plugin.so
"""

from acmix_deploy.cli.plugin import build, check

VERBS = (build, check)
