"""Package a detector for other servers.

example:
  acmix-deploy package triton model.engine -o repository
"""

from acmix_deploy.cli.package import deepstream, triton

VERBS = (triton, deepstream)
