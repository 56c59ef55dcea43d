"""Say whether a model became slower: measure it in turn with the one before, and judge that against the noise.

example:
  acmix-deploy gate run --baseline model.onnx --candidate model.fused.onnx -o gate.json
  acmix-deploy gate check gate.json
"""

from acmix_deploy.cli.gate import check, history, run

VERBS = (run, check, history)
