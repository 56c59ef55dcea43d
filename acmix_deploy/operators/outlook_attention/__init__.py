"""Outlook attention: each window mixes its values by weights that its own pixel predicts, and windows overlap-add."""

from acmix_deploy.operators.outlook_attention.spec import OUTLOOK_ATTENTION, check_geometry

__all__ = ["OUTLOOK_ATTENTION", "check_geometry"]
