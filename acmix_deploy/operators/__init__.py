"""What blocks reduce to. One folder an operator: definition, oracle and, where graphs carry it, its ONNX body."""

from acmix_deploy.operators.local_attention import LOCAL_ATTENTION
from acmix_deploy.operators.outlook_attention import OUTLOOK_ATTENTION

OPERATORS = (LOCAL_ATTENTION, OUTLOOK_ATTENTION)

__all__ = ["OPERATORS"]
