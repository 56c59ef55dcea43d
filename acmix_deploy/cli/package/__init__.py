"""Package a detector for other servers.

example:
  acmix-deploy package triton model.engine -o repository
  acmix-deploy package deepstream model.engine -o deepstream
"""

from acmix_deploy.cli.package import deepstream, triton

VERBS = (triton, deepstream)
