"""How long models take, layer by layer if wanted, and what the machine does meanwhile."""

from acmix_deploy.profile.run import profile
from acmix_deploy.profile.timing import Machine, Profile, ProfileDocument, compare

__all__ = ["Machine", "Profile", "ProfileDocument", "compare", "profile"]
