"""Plots as SVG to stand in a page: its colours are the page's, its text stays text.

Every plot is drawn for a wide and for a narrow page, since text must not shrink with the page.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from acmix_deploy.process import WHOLE_PROCESS

PALETTE: Mapping[str, tuple[str, str]] = {
    "ink": ("#1f2430", "#e6e8ec"),
    "quiet": ("#5d6675", "#9aa3b2"),
    "line": ("#e1e4ea", "#323846"),
    "accent": ("#0072b2", "#4ea8de"),
    "bad": ("#c44e00", "#ff8f4a"),
    "hue-0": ("#0173b3", "#4ea8df"),
    "hue-1": ("#e69f00", "#e9ad2b"),
    "hue-2": ("#009e73", "#2fbf97"),
    "hue-3": ("#cc79a7", "#d992b9"),
    "hue-4": ("#56b4e9", "#8acdf2"),
    "hue-5": ("#d55e00", "#f0813a"),
    "grey-0": ("#7b8494", "#8b94a5"),
    "grey-1": ("#a3abb8", "#6a7384"),
    "grey-2": ("#c3c9d3", "#525a6a"),
    "grey-3": ("#d9dde4", "#434a58"),
}
"""The page's colours by name, in light and in dark; hues after Okabe and Ito, apart for colour-blind eyes too."""

HUES, GREYS = ([name for name in PALETTE if name.startswith(kind)] for kind in ("hue", "grey"))

_WIDTHS = 920, 330  # in px
_MARGIN = 14
_ROW = 58
_AXIS = 26  # below the rows, for the numbers
_HEIGHT = 240  # of a plot without rows
_POINTS = 200  # of a hill, and samples that it is made of
_GLYPH = 6.7  # mean width of a letter
_SVG, _LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
_LINEAR_UP_TO = 30  # times, from the smallest to the largest value
_SALT = count()

Floats = NDArray[np.float64]
Bar = Sequence[tuple[str, float]]
"""Segments by the name of their colour, in order."""


class Plot(NamedTuple):
    """SVG for a wide and for a narrow page."""

    wide: str
    narrow: str


class Error(NamedTuple):
    """A distance, None where nothing could be compared, and its limit, None where it is not judged."""

    label: str
    value: float | None
    limit: float | None
    passed: bool | None


class Step(NamedTuple):
    """A distance in a row of them, None where nothing could be compared, its limit, and the block that it is of."""

    value: float | None
    limit: float
    passed: bool
    block: str


def distributions(samples: Mapping[str, Sequence[float]]) -> Plot:
    """A hill for each label from its smallest sample to the 99th percentile, with the median and 10th to 90th.

    Args:
        samples: latencies in ms.
    """
    found = {label: np.percentile(values, (0, 10, 50, 90, 99)) for label, values in samples.items()}
    low, high = min(marks[0] for marks in found.values()), max(marks[-1] for marks in found.values())

    def paint(axes: Axes, width: int) -> None:
        _horizontal(axes, low, high)
        for index, (label, values) in enumerate(samples.items()):
            smallest, p10, median, p90, p99 = found[label]
            ground = _ROW * (index + 1) - 12
            _label(axes, index, width, label, f"{median:.4g} ms")
            if p99 > smallest:
                where = np.linspace(smallest, p99, _POINTS)
                height = _density(np.percentile(values, np.linspace(0, 99, _POINTS)), where)
                axes.fill_between(where, ground, ground - 20 * height, color=_light("accent"), alpha=0.3, lw=0)
            axes.plot([smallest, p99], [ground, ground], color=_light("quiet"), lw=1)
            axes.plot([p10, p90], [ground, ground], color=_light("accent"), lw=4, solid_capstyle="butt")
            axes.plot([p99, p99], [ground - 5, ground + 5], color=_light("quiet"), lw=1.5)
            axes.plot(median, ground, "o", color=_light("accent"), ms=8, mew=0)

    return _draw(_ROW * len(samples), paint)


def errors(found: Sequence[Error]) -> Plot:
    """Distances on a logarithmic axis, each with a bar at its limit."""
    told = [error.value for error in found if error.value] + [error.limit for error in found if error.limit]

    def paint(axes: Axes, width: int) -> None:
        axes.set_xscale("log")
        axes.set_xlim(min(told, default=0.1) / 2, max(told, default=1) * 2)
        axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(numticks=width // 70))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        for index, error in enumerate(found):
            ground = _ROW * (index + 1) - 24
            colour = _light("bad" if error.passed is False else "accent")
            _label(axes, index, width, error.label, "" if error.value is None else f"{error.value:.1e}")
            if error.limit:
                axes.plot([error.limit] * 2, [ground - 8, ground + 8], color=_light("ink"), lw=2)
            if error.value:
                between = sorted((error.value, error.limit or error.value))
                axes.plot(between, [ground, ground], color=_light("line"), lw=4)
                axes.plot(error.value, ground, "X" if error.passed is False else "o", color=colour, ms=9, mew=0)

    return _draw(_ROW * len(found), paint)


def bars(found: Mapping[str, Bar], unit: str) -> Plot:
    """A bar for each label, from 0, of one or more segments."""
    sums = {label: sum(value for _, value in bar) for label, bar in found.items()}

    def paint(axes: Axes, width: int) -> None:
        axes.set_xlim(0, max(sums.values()) or 1)
        for index, (label, bar) in enumerate(found.items()):
            _label(axes, index, width, label, f"{sums[label]:.4g} {unit}")
            left = 0.0
            for colour, value in bar:
                axes.barh(_ROW * (index + 1) - 26, value, 16, left=left, color=_light(colour), lw=0)
                left += value

    return _draw(_ROW * len(found), paint)


def history(medians: Sequence[float], bounds: Floats, names: Sequence[str]) -> Plot:
    """Medians of runs in ms, the runs at even distances.

    Args:
        medians: of each run.
        bounds: [runs, 2], lower and upper of each.
        names: of the runs, of which some are written below.
    """
    low, high = bounds.min(), bounds.max()
    pad = 0.12 * (high - low) or 0.05 * high
    steps = np.arange(len(names))

    def paint(axes: Axes, width: int) -> None:
        axes.set_ylim(low - pad, high + pad)
        step = (len(names) - 1 or 1) / (width - 150)
        axes.set_xlim(-90 * step, len(names) - 1 + 30 * step)  # numbers of the other axis stand at the left
        axes.vlines(steps, *bounds.T, color=_light("accent"), alpha=0.3, lw=5)
        axes.plot(steps, medians, "o-", color=_light("accent"), ms=7, lw=1.5, mew=0)
        shown = np.unique(np.linspace(0, len(names) - 1, max(2, width // 160)).round().astype(int))
        axes.set_xticks(shown, [_shortened(names[index], 18) for index in shown])
        axes.get_xticklabels()[-1].set_horizontalalignment("right")
        axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g} ms")
        _numbers_inside(axes)

    return _draw(_HEIGHT, paint)


class Trial(NamedTuple):
    """A set of layers in INT8."""

    share: float
    """Of the multiply-adds that is in INT8, 0 to 1."""
    loss: float
    met: bool
    kept: bool


def trials(found: Sequence[Trial], limit: float) -> Plot:
    """What each set loses over its share in INT8, with a line at the limit; a ring is around the one that is kept."""
    shares, losses = [100 * trial.share for trial in found], [trial.loss for trial in found]
    low, high = min(0.0, *losses), max(limit, *losses)

    def paint(axes: Axes, width: int) -> None:
        height = high - low or 1
        axes.set_ylim(low - 0.1 * height, high + 0.15 * height)
        pad = 0.05 * np.ptp(shares) or 1
        left = (max(shares) - min(shares) + 2 * pad) * 90 / width  # numbers of the other axis stand there
        axes.set_xlim(min(shares) - pad - left, max(shares) + pad)
        axes.axhline(limit, color=_light("ink"), lw=1.5)
        for share, trial in zip(shares, found, strict=True):
            mark, colour = ("o", "accent") if trial.met else ("X", "bad")
            axes.plot(share, trial.loss, mark, color=_light(colour), ms=8, mew=0)
            if trial.kept:
                axes.plot(share, trial.loss, "o", color="none", markeredgecolor=_light("ink"), ms=15, mew=1.5)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(max(2, width // 120)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        _numbers_inside(axes)

    return _draw(_HEIGHT, paint)


def depth(steps: Sequence[Step]) -> Plot:
    """Distances along a graph on a logarithmic axis, with the line of their limits, and fused blocks by their names."""
    told = [step.value for step in steps if step.value] + [step.limit for step in steps if 0 < step.limit < np.inf]
    low, high = min(told, default=0.1) / 3, max(told, default=1) * 3
    blocks: dict[str, list[int]] = {}
    for index, step in enumerate(steps):
        if step.block:
            blocks.setdefault(step.block, []).append(index)
    centres = {block: (places[0] + places[-1]) / 2 for block, places in blocks.items()}

    def paint(axes: Axes, width: int) -> None:
        axes.set_yscale("log")
        axes.set_ylim(low, high)
        step = (len(steps) or 1) / (width - 100)
        axes.set_xlim(-70 * step, len(steps) - 1 + 10 * step)  # numbers of the other axis stand at the left
        for places in blocks.values():
            axes.axvspan(places[0] - 0.5, places[-1] + 0.5, color=_light("line"), lw=0)
        axes.step(range(len(steps)), [one.limit for one in steps], where="mid", color=_light("ink"), lw=1.5)
        for passed, mark, colour in ((True, "o", "accent"), (False, "X", "bad")):
            places = [index for index, one in enumerate(steps) if one.passed is passed and one.value != 0]
            heights = [steps[index].value or high / 1.3 for index in places]
            axes.plot(places, heights, mark, color=_light(colour), ms=5 if passed else 8, mew=0)
        shown: list[str] = []
        for block, centre in sorted(centres.items(), key=lambda pair: pair[1]):
            if not shown or centre - centres[shown[-1]] >= 100 * step:
                shown.append(block)
        axes.set_xticks([centres[block] for block in shown], [_shortened(block, 14) for block in shown])
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(numticks=8))
        axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
        _numbers_inside(axes)

    return _draw(_HEIGHT, paint)


def histogram(values: Sequence[float], limit: float) -> Plot:
    """How many of some positive values are how large, by four bars a decade of a logarithmic axis, with their limit."""
    low = np.floor(np.log10(min(values, default=1e-6)))
    high = np.ceil(np.log10(max([*values, limit if np.isfinite(limit) else 0.0, 10**low * 10])))
    edges = np.logspace(low, high, int(4 * (high - low)) + 1)
    counts, _ = np.histogram(values, edges)

    def paint(axes: Axes, width: int) -> None:
        axes.set_xscale("log")
        pixel = 10 ** ((high - low) / width)
        axes.set_xlim(edges[0] / pixel**60, edges[-1] * pixel**25)  # numbers of the other axis stand at the left
        axes.set_ylim(0, max(counts, default=0) * 1.15 or 1)
        axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=_light("accent"), edgecolor="none", alpha=0.7)
        if np.isfinite(limit):
            axes.axvline(limit, color=_light("ink"), lw=1.5)
        axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(numticks=width // 70))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4, integer=True))
        _numbers_inside(axes)

    return _draw(_HEIGHT, paint)


def printable(text: str) -> str:
    """A text without control characters, which XML does not have, and without those that turn the direction."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "·" for letter in text)


def _draw(height: float, paint: Callable[[Axes, int], None]) -> Plot:
    """Run ``paint`` for both widths on axes whose y is in pixels, downwards."""
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "font.size": 12,
        "text.parse_math": False,
        "text.color": _light("ink"),
        "xtick.labelcolor": _light("quiet"),
        "ytick.labelcolor": _light("quiet"),
        "axes.formatter.min_exponent": 4,
    }
    drawn = []
    for width in _WIDTHS:
        total = height + _AXIS
        with (
            WHOLE_PROCESS,
            matplotlib.rc_context({**settings, "svg.hashsalt": str(next(_SALT))}),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has its own fonts
            figure = Figure(figsize=(width / 72, total / 72), dpi=72)
            axes = figure.add_axes((_MARGIN / width, _AXIS / total, 1 - 2 * _MARGIN / width, height / total))
            axes.set_ylim(height, 0)
            axes.set_frame_on(False)
            axes.set_axisbelow(True)
            axes.yaxis.set_visible(False)
            axes.grid(axis="x", color=_light("line"), lw=1)
            axes.tick_params(axis="x", length=0)
            paint(axes, width)
            file = io.BytesIO()
            figure.savefig(file, format="svg", transparent=True)
        drawn.append(_of_the_page(file.getvalue()))
    return Plot(*drawn)


def _of_the_page(svg: bytes) -> str:
    """What matplotlib wrote, without what is of no use in a page, and with its colours by name."""
    root = ElementTree.fromstring(svg)
    names = {light: name for name, (light, _) in PALETTE.items()}
    for parent in root.iter():
        for child in [child for child in parent if child.tag in (f"{_SVG}metadata", f"{_SVG}style")]:
            parent.remove(child)
        if re.fullmatch(r"[\w.]+_\d+", parent.get("id", "")):
            del parent.attrib["id"]
        if link := parent.attrib.pop(_LINK, None):
            parent.set("href", link)
        if style := parent.get("style"):
            style = re.sub(r"#[0-9a-f]{6}", lambda found: f"var(--{names.get(found[0], 'ink')})", style)
            parent.set("style", re.sub(r"font-family: [^;]*;? ?", "", style))
    for size in ("width", "height"):
        del root.attrib[size]
    ElementTree.register_namespace("", _SVG.strip("{}"))
    return ElementTree.tostring(root, encoding="unicode")


def _light(name: str) -> str:
    return PALETTE[name][0]


def _numbers_inside(axes: Axes) -> None:
    """Have the numbers of the upright axis stand on its lines, inside at the left."""
    axes.grid(axis="x", visible=False)
    axes.grid(axis="y", color=_light("line"), lw=1)
    axes.yaxis.set_visible(True)
    axes.tick_params(axis="y", pad=0, length=0)
    for text in axes.get_yticklabels():
        text.set(horizontalalignment="left", verticalalignment="bottom")


def _label(axes: Axes, index: int, width: int, label: str, value: str) -> None:
    """The name of a row at its left and a number at its right, above what is drawn in it."""
    room = int((width - 2 * _MARGIN) / _GLYPH) - len(value) - 2
    place = axes.get_yaxis_transform()
    axes.text(0, _ROW * index + 13, _shortened(label, room), transform=place, fontsize=12)
    axes.text(1, _ROW * index + 13, value, transform=place, fontsize=12, horizontalalignment="right")


def _shortened(text: str, most: int) -> str:
    text, half = printable(text), (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


def _horizontal(axes: Axes, low: float, high: float) -> None:
    """The limits of the axis of values; logarithmic where they are far apart."""
    if low > 0 and high / low > _LINEAR_UP_TO:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.1, high * 1.1)
        axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    else:
        pad = 0.03 * (high - low) or 0.03 * high or 1
        axes.set_xlim(low - pad, high + pad)


def _density(samples: Floats, where: Floats) -> Floats:
    """A density by Gaussian kernels of Silverman's bandwidth, 1 at its top."""
    quarters = np.subtract(*np.percentile(samples, (75, 25))) / 1.349
    bandwidth = 0.9 * min(samples.std(), quarters or np.inf) * len(samples) ** -0.2 or np.ptp(where) / 100
    height = np.exp(-0.5 * ((where[:, None] - samples) / bandwidth) ** 2).sum(axis=1)
    return np.asarray(height / height.max())
