"""Problems that an operator is defined for, drawn by Hypothesis; a machine for GPU tests may lack it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hypothesis import strategies as st

from acmix_deploy.operators.axes import Axis
from acmix_deploy.operators.spec import Operator


@st.composite
def sizes(draw, operator: Operator, side: int, choices: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Sizes by name for which the operator is defined: out of ``choices``, the others up to ``side``."""
    known = {name: values for name, values in choices.items() if name in operator.axes.values()}
    if {"stride", "upsampling"} <= {*operator.axes.values()}:  # one of the two is 1
        known[draw(st.sampled_from(["stride", "upsampling"]))] = [1]
    drawn = {letter: draw(st.sampled_from(known[name])) for letter, name in operator.axes.items() if name in known}
    axes = [Axis.parse(axis) for tensor in (*operator.inputs, *operator.outputs) for axis in tensor.axes]
    for letter in [letter for letter in operator.axes if letter not in drawn]:
        exact = [axis.powers for axis in axes if axis.divides and not axis.rounds_up and axis.powers.get(letter) == 1]
        step = next((drawn[divisor] for powers in exact for divisor, power in powers.items() if power < 0), 1)
        least = -(-Axis.parse(operator.least(letter, drawn)).length(drawn) // step)
        drawn[letter] = step * draw(st.integers(least, max(least, side // step)))
    return {operator.axes[letter]: size for letter, size in drawn.items()}
