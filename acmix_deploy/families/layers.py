"""The convolutions that a module is made of, as what predicts weights for neighbours is."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from torch import nn

from acmix_deploy.families.search import NotABlock

_NO_LAYER = (nn.Softmax, nn.Softmax2d, nn.LogSoftmax)


def conv_layers(module: nn.Module) -> list[nn.Sequential]:
    """Convolutions in the order in which they were made, each with the BatchNorm and the activation behind it.

    Returns:
        For each a Sequential of ``conv`` and, where they are there, ``bn`` and ``act``: the layers themselves.

    Raises:
        NotABlock: the module has other parameters, or one part of it has all of them and may be a block itself.
    """
    parameters = {*module.parameters()}
    for part in module.modules():
        if part is not module and type(part) is not nn.Sequential and {*part.parameters()} == parameters:
            raise NotABlock("a part of it holds all its parameters")
    layers: list[OrderedDict[str, nn.Module]] = []
    for _, part in module.named_modules(remove_duplicate=False):  # activations are shared
        if isinstance(part, nn.Conv2d):
            layers.append(OrderedDict(conv=part))
        elif layers and isinstance(part, nn.BatchNorm2d) and [*layers[-1]] == ["conv"]:
            layers[-1]["bn"] = part
        elif layers and _activates(part) and "act" not in layers[-1]:
            layers[-1]["act"] = part
    if parameters != {p for layer in layers for part in layer.values() for p in part.parameters()}:
        raise NotABlock("it has other parameters than those of convolutions with a BatchNorm each")
    return [nn.Sequential(layer) for layer in layers]


def with_activations(layers: Sequence[nn.Sequential]) -> Iterator[Sequence[nn.Sequential]]:
    """The layers, and where the first has no activation, as for one that its forward calls, with the usual ones."""
    yield layers
    if "act" not in dict(layers[0].named_children()):
        for act in (nn.ReLU(), nn.SiLU()):
            yield [nn.Sequential(OrderedDict([*layers[0].named_children(), ("act", act)])), *layers[1:]]


def _activates(part: nn.Module) -> bool:
    return type(part).__module__ == nn.ReLU.__module__ and not isinstance(part, (*_NO_LAYER, nn.MultiheadAttention))
