"""How long models take on ONNX Runtime."""

from acmix_deploy.profile.run import profile
from acmix_deploy.profile.timing import Machine, Profile

__all__ = ["Machine", "Profile", "profile"]
