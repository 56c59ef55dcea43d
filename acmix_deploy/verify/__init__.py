"""How far each file is from the model, and whether that is near enough."""

from acmix_deploy.verify.run import Candidate, compare_files, verify
from acmix_deploy.verify.verification import Comparison, Verification

__all__ = ["Candidate", "Comparison", "Verification", "compare_files", "verify"]
