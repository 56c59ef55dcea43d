"""The convolutions that a module is made of, as what predicts weights for neighbours is."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from acmix_deploy.families.search import NotABlock

_NO_ACTIVATIONS = (nn.LogSoftmax, nn.MultiheadAttention, nn.Softmax, nn.Softmax2d)


@dataclass(frozen=True)
class ConvLayer:
    """A convolution with the BatchNorm and the activation behind it."""

    conv: nn.Conv2d
    bn: nn.BatchNorm2d | None = None
    act: nn.Module | None = None

    @property
    def module(self) -> nn.Sequential:
        """These layers themselves, no copies, one after the other."""
        parts = {"conv": self.conv, "bn": self.bn, "act": self.act}
        return nn.Sequential(OrderedDict((name, part) for name, part in parts.items() if part is not None))


def conv_layers(module: nn.Module) -> list[ConvLayer]:
    """The convolutions of a module, in the order in which they were made.

    Raises:
        NotABlock: the module has other parameters, or one part of it has all of them and may be a block itself.
    """
    parameters = {*module.parameters()}
    for part in module.modules():
        if part is not module and type(part) is not nn.Sequential and {*part.parameters()} == parameters:
            raise NotABlock("a part of it holds all its parameters")
    layers: list[ConvLayer] = []
    for _, part in module.named_modules(remove_duplicate=False):  # activations are shared
        if isinstance(part, nn.Conv2d):
            layers.append(ConvLayer(part))
        elif layers and isinstance(part, nn.BatchNorm2d) and layers[-1].bn is layers[-1].act is None:
            layers[-1] = replace(layers[-1], bn=part)
        elif layers and _activates(part) and layers[-1].act is None:
            layers[-1] = replace(layers[-1], act=part)
    if parameters != {parameter for layer in layers for parameter in layer.module.parameters()}:
        raise NotABlock("it has other parameters than those of convolutions with a BatchNorm each")
    return layers


def with_activations(layers: Sequence[ConvLayer]) -> Iterator[Sequence[ConvLayer]]:
    """The layers, and where the first has no activation, as for one that its forward calls, with the usual ones."""
    yield layers
    if layers[0].act is None:
        for act in (nn.ReLU(), nn.SiLU()):
            yield [replace(layers[0], act=act), *layers[1:]]


def _activates(part: nn.Module) -> bool:
    return type(part).__module__ == nn.ReLU.__module__ and not isinstance(part, _NO_ACTIVATIONS)
