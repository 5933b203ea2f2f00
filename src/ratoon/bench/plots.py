"""Plots as SVG, drawn by hand: every sample is a dot, every median a bar."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from statistics import median

WIDTH, HEIGHT = 760, 380
LEFT, RIGHT, TOP, BOTTOM = 66, 16, 62, 52
#: Okabe and Ito's: told apart by everybody.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")


@dataclass(frozen=True)
class Series:
    """One colour: for each place on the x axis, the samples there."""

    name: str
    points: tuple[tuple[str, tuple[float, ...]], ...]


@dataclass(frozen=True)
class Plot:
    """`name` is the file's, without `.svg`. `log`: the y axis is logarithmic."""

    name: str
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    log: bool = False
    #: Whether the places follow each other, so that lines between them mean something.
    linked: bool = True


def svg(plot: Plot) -> str:
    """The plot as the text of an SVG file; the same for the same plot."""
    places = list(dict.fromkeys(x for series in plot.series for x, _ in series.points))
    values = [value for series in plot.series for _, found in series.points for value in found]
    scale = _Scale(values, log=plot.log)
    step = (WIDTH - LEFT - RIGHT) / len(places)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">',
        f"<title>{escape(plot.title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        _text(LEFT, 20, plot.title, size=14, weight="bold"),
        *_legend(plot.series),
    ]
    for tick in scale.ticks:
        y = scale.y(tick)
        lines.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#dddddd"/>')
        lines.append(_text(LEFT - 6, y + 4, f"{tick:,.6g}", anchor="end"))
    for number, place in enumerate(places):
        lines.append(_text(LEFT + (number + 0.5) * step, HEIGHT - BOTTOM + 18, place, "middle"))
    lines.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, plot.x_label, "middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    lines.append(
        f'<text x="14" y="{middle}" text-anchor="middle" fill="#222222" '
        f'transform="rotate(-90 14 {middle})">{escape(plot.y_label)}</text>'
    )
    for number, series in enumerate(plot.series):
        shift = (number - (len(plot.series) - 1) / 2) * min(14.0, step / (len(plot.series) + 1))
        at = {place: LEFT + (i + 0.5) * step + shift for i, place in enumerate(places)}
        lines += _drawn(series, COLOURS[number % len(COLOURS)], at, scale, linked=plot.linked)
    return "\n".join([*lines, "</svg>"]) + "\n"


class _Scale:
    """The y axis: from zero, or from the power of ten below the least."""

    def __init__(self, values: list[float], *, log: bool) -> None:
        self._log = log
        top = max(values)
        if log:
            least = min(value for value in values if value > 0)
            low, high = math.floor(math.log10(least)), math.ceil(math.log10(top))
            self._bounds = float(low), float(max(high, low + 1))
            powers = range(low, int(self._bounds[1]) + 1)
            self.ticks = [10.0**power for power in powers]
        else:
            unit = 10.0 ** math.floor(math.log10(top))
            step = next(unit * m for m in (0.1, 0.2, 0.5, 1, 2) if top / (unit * m) <= 7)
            count = math.ceil(top / step)
            self._bounds = 0.0, count * step
            self.ticks = [number * step for number in range(count + 1)]

    def y(self, value: float) -> float:
        low, high = self._bounds
        at = math.log10(max(value, 10.0**low)) if self._log else value
        return HEIGHT - BOTTOM - (at - low) / (high - low) * (HEIGHT - BOTTOM - TOP)


def _legend(series: tuple[Series, ...]) -> Iterator[str]:
    x = float(LEFT)
    for number, each in enumerate(series):
        yield f'<circle cx="{x + 5:.1f}" cy="40" r="5" fill="{COLOURS[number % len(COLOURS)]}"/>'
        yield _text(x + 14, 44, each.name)
        x += 14 + 6.6 * len(each.name) + 18


def _drawn(
    series: Series, colour: str, at: dict[str, float], scale: _Scale, *, linked: bool
) -> Iterator[str]:
    medians = [(at[place], scale.y(median(found))) for place, found in series.points]
    if linked:
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in medians)
        yield f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.2" opacity="0.6"/>'
    for place, found in series.points:
        for value in found:
            dot = f'cx="{at[place]:.1f}" cy="{scale.y(value):.1f}" r="2.5"'
            yield f'<circle {dot} fill="{colour}" opacity="0.4"/>'
    for x, y in medians:
        yield f'<path d="M{x - 6:.1f} {y:.1f}h12" stroke="{colour}" stroke-width="2.5"/>'


def _text(
    x: float, y: float, text: str, anchor: str = "start", *, size: int = 12, weight: str = "normal"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
        f'font-weight="{weight}" fill="#222222">{escape(text)}</text>'
    )
