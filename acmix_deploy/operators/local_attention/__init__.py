"""Local attention with reflected borders and a linear position term."""

from acmix_deploy.operators.local_attention.spec import LOCAL_ATTENTION, check_geometry

__all__ = ["LOCAL_ATTENTION", "check_geometry"]
