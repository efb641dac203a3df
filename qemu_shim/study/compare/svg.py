"""Four kinds of plots as SVG text: lines over time, stacked bars, a fan of curves with bands, a histogram.

Colours, widths and dashes are the page's style sheet's (`report.html`): an element only says whose it is.
Numbers are rounded to what can be seen, and points that a straight line passes anyway are left out: a
report has dozens of plots in one small file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 280, 180
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 8, 30
FLOOR, ACROSS, DOWN = HEIGHT - BOTTOM, WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
BAR_STEP, BAR_HEIGHT = 26, 15
TICKS = 4
LEAST = 1e-3  # of a logarithmic axis

Place = tuple[float, float]
Text = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Line:
    name: str
    points: Sequence[Place]


@dataclass(frozen=True, slots=True)
class Bar:
    """`parts` of a length each, in this order: the bar's text stands behind them."""

    name: str
    parts: Mapping[str, float]
    text: str


@dataclass(frozen=True, slots=True)
class Curve:
    """For each x its value, and how far it may be off."""

    name: str
    low: Sequence[float]
    middle: Sequence[float]
    high: Sequence[float]


def ticks(most: float, base: int = 10) -> list[float]:
    """From 0 to at least `most`, in round steps: 1, 2 or 5 of a power of ten, or powers of two."""
    if most <= 0:
        return [0.0, 1.0]
    rough = most / TICKS
    power = float(base) ** math.floor(math.log(rough, base))
    step = next(
        power * digit for digit in ((1, 2, 5, 10) if base == 10 else (1, 2)) if power * digit >= rough * 0.999
    )
    return [step * number for number in range(math.ceil(most / step - 1e-9) + 1)]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten around low..high."""
    first, last = math.floor(math.log10(max(low, LEAST))), math.ceil(math.log10(max(high, LEAST)))
    return [10.0**power for power in range(first, max(last, first + 1) + 1)]


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _text(x: float, y: float, anchor: str, words: str, kind: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    return f'<text x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}"{kind}>{escape(words)}</text>'


def _frame(title: str, body: Sequence[str], width: float = WIDTH, height: float = HEIGHT) -> Markup:
    head = f'<svg viewBox="0 0 {_n(width)} {_n(height)}" role="img" aria-label="{escape(title)}">'
    return Markup(f"{head}{''.join(body)}</svg>")  # every part is ours or was escaped by _text


def lines(title: str, drawn: Sequence[Line], x_text: Text, y_text: Text, y_base: int = 10) -> Markup:
    xs = ticks(max((x for line in drawn for x, _ in line.points), default=0))
    ys = ticks(max((y for line in drawn for _, y in line.points), default=0), y_base)
    body = [
        _y_axis([(FLOOR - y / ys[-1] * DOWN, y_text(y)) for y in ys]),
        *_x_axis([(LEFT + x / xs[-1] * ACROSS, x_text(x)) for x in (xs[0], xs[-1])]),
    ]
    for line in drawn:
        places = [(LEFT + x / xs[-1] * ACROSS, FLOOR - y / ys[-1] * DOWN) for x, y in line.points]
        body.append(_polyline(line.name, places))
    return _frame(title, body)


def fan(title: str, xs: Sequence[float], drawn: Sequence[Curve], x_text: Text, y_text: Text) -> Markup:
    """Both axes are logarithmic."""
    bounds = [value for curve in drawn for of in (curve.low, curve.high) for value in of]
    ys = decades(min(bounds, default=1), max(bounds, default=1))
    tall = math.log10(ys[-1] / ys[0])

    def places(values: Sequence[float]) -> list[Place]:
        return [
            (
                LEFT + math.log(x / xs[0]) / math.log(xs[-1] / xs[0]) * ACROSS,
                FLOOR - math.log10(max(y, ys[0]) / ys[0]) / tall * DOWN,
            )
            for x, y in zip(xs, values, strict=True)
        ]

    every = -(-len(ys) // (TICKS + 1))
    body = [
        _y_axis([(FLOOR - math.log10(y / ys[0]) / tall * DOWN, y_text(y)) for y in ys[::every]]),
        *_x_axis([(LEFT, x_text(xs[0])), (LEFT + ACROSS, x_text(xs[-1]))]),
    ]
    for curve in drawn:
        around = _corners([*places(curve.low), *reversed(places(curve.high))])
        body.append(f'<polygon class="{curve.name}" points="{around}"/>')
    body += [_polyline(curve.name, places(curve.middle)) for curve in drawn]
    return _frame(title, body)


def _corners(places: Sequence[Place]) -> str:
    return " ".join(f"{_n(x)},{_n(y)}" for x, y in straightened(places))


def _polyline(name: str, places: Sequence[Place]) -> str:
    return f'<polyline class="{name}" points="{_corners(places)}"><title>{name}</title></polyline>'


def straightened(places: Sequence[Place]) -> list[Place]:
    """Without the points that are on the line between their neighbours, to a tenth of a unit."""
    kept: list[Place] = []
    for place in places:
        while len(kept) > 1 and _on_the_way(kept[-2], kept[-1], place):
            kept.pop()
        kept.append(place)
    return kept


def _on_the_way(start: Place, middle: Place, end: Place) -> bool:
    (x0, y0), (x1, y1), (x2, y2) = start, middle, end
    length = math.hypot(x2 - x0, y2 - y0)
    off = abs((x2 - x0) * (y1 - y0) - (y2 - y0) * (x1 - x0))
    along = (x1 - x0) * (x2 - x0) + (y1 - y0) * (y2 - y0)
    return off <= 0.1 * length and 0 <= along <= length * length


def _y_axis(marks: Sequence[tuple[float, str]]) -> str:
    rules = "".join(f"M{LEFT} {_n(y)}h{ACROSS}" for y, _ in marks)
    words = "".join(_text(LEFT - 5, y + 4, "end", text) for y, text in marks)
    return f'<path class="rule" d="{rules}"/>{words}'


def _x_axis(ends: Sequence[tuple[float, str]]) -> list[str]:
    return [_text(x, FLOOR + 15, "middle" if x < WIDTH / 2 else "end", text) for x, text in ends]


def bars(title: str, drawn: Sequence[Bar], width: float = WIDTH, right: float = 58) -> Markup:
    left = 60
    across = (width - left - right) / (max((sum(bar.parts.values()) for bar in drawn), default=0) or 1)
    body = []
    for number, bar in enumerate(drawn):
        y, x = TOP + number * BAR_STEP, float(left)
        body.append(_text(left - 6, y + 12, "end", bar.name))
        for part, value in bar.parts.items():
            if value * across >= 0.05:
                size = f'width="{_n(value * across)}" height="{BAR_HEIGHT}"'
                body.append(f'<rect class="{bar.name} {part}" x="{_n(x)}" y="{y}" {size}/>')
            x += value * across
        body.append(_text(x + 5, y + 12, "start", bar.text))
    return _frame(title, body, width, TOP + len(drawn) * BAR_STEP)


def histogram(
    title: str, classes: Sequence[str], counts: Mapping[str, Sequence[int]], y_text: Text
) -> Markup:
    """On a logarithmic scale that has a 0; a class's name is a range and its unit."""
    top = math.ceil(height_of(max((count for of in counts.values() for count in of), default=0))) or 1
    marks = (0, *(10**power for power in range(top)))
    body = [_y_axis([(FLOOR - height_of(mark) / top * DOWN, y_text(mark)) for mark in marks])]
    group = ACROSS / len(classes)
    wide = (group - 6) / max(1, len(counts))
    for place, class_name in enumerate(classes):
        left = LEFT + place * group + 3
        for row, word in enumerate(class_name.split()):
            body.append(_text(left + group / 2 - 3, FLOOR + 12 + 11 * row, "middle", word, "class"))
        for number, (name, of) in enumerate(counts.items()):
            if of[place]:
                height = height_of(of[place]) / top * DOWN
                size = f'width="{_n(wide)}" height="{_n(height)}"'
                body.append(
                    f'<rect class="{name}" x="{_n(left + number * wide)}" y="{_n(FLOOR - height)}" {size}>'
                    f"<title>{name}: {of[place]}</title></rect>"
                )
    return _frame(title, body)


def height_of(count: int) -> float:
    return math.log10(count + 1)
