"""Name machines that verbs run on behind ssh, look at them, and install this package there.

example:
  acmix-deploy device add bench-1 user@10.0.0.7 --folder /opt/acmix-deploy --install
  acmix-deploy device check bench-1
  acmix-deploy profile model.onnx --on bench-1
"""

from acmix_deploy.cli.device import add, check, list, remove

VERBS = (add, check, list, remove)
