"""Charts as SVG: axes, curves, shaded stages, stacked shares. Sizes are in pixels; all text is escaped."""

import dataclasses
import html
import math
import re
from collections.abc import Callable, Iterable, Sequence

from tools.report.series import Point

WIDE, SMALL = (1120, 330), (548, 240)
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 24, 38
_CHARACTER = 6.4  # width of a character in stages' labels
_HOVER_COLUMNS = 120
# Characters that XML forbids even when escaped.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

Format = Callable[[float], str]


def text(value: object) -> str:
    """Converts any value to escaped text for elements and attributes of HTML and XML."""
    return html.escape(_FORBIDDEN.sub("\ufffd", str(value)))


def short(value: float) -> str:
    """Formats a number for an axis: 1.5M, 0.02, 6e-4."""
    if value == 0:
        return "0"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.4g}{unit}"
    if abs(value) < 0.01:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def percent(value: float) -> str:
    return f"{100 * value:.3g}%"


@dataclasses.dataclass(frozen=True)
class Axis:
    """Maps values to pixels. `start` is the pixel of `low`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, value = (math.log10(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def value(self, pixel: float) -> float:
        """Returns the value at a pixel of a linear axis."""
        return self.low + (pixel - self.start) / (self.end - self.start) * (self.high - self.low)

    def ticks(self, count: int) -> list[float]:
        """Returns about `count` round values."""
        if not self.log:
            return _round_values(self.low, self.high, count)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1,), (1, 3), (1, 2, 5)):
            found = [digit * 10.0**decade for decade in decades for digit in digits]
            inside = [value for value in found if self.low <= value <= self.high]
            if len(inside) >= 3:
                return inside[:: max(len(inside) // count, 1)]
        return [value for value in _round_values(self.low, self.high, count) if value > 0]


def _round_values(low: float, high: float, count: int) -> list[float]:
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * digit for digit in (1, 2, 2.5, 5, 10) if size * digit >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def value_axis(values: Iterable[float], start: float, end: float, *, zero: bool = False, log: bool = False) -> Axis:
    """Returns an axis around the values, with a margin.

    Args:
        values: The values to show.
        start: Pixel of the low end.
        end: Pixel of the high end.
        zero: Whether the axis starts at 0.
        log: Whether it is logarithmic; all values must be above 0.
    """
    found = list(values)
    low, high = min(found), max(found)
    if log:
        air = max((high / low) ** 0.04, 1.02)
        return Axis(low / air, high * air, start, end, log=True)
    if zero:
        return Axis(0.0, high * 1.06 or 1.0, start, end)
    air = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return Axis(low - air, high + air, start, end)


@dataclasses.dataclass(frozen=True)
class Curve:
    """A curve. `color` is an index in the page's style. With `notes`, one text per point, points are marked."""

    label: str
    points: Sequence[Point]
    color: int
    notes: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Band:
    """A stage, as a band from one token count to another."""

    first: float
    last: float
    number: int
    name: str
    note: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frame:
    """The parts shared by all charts: the token axis, shaded stages, and the tooltip at a token count."""

    last_token: float
    bands: Sequence[Band]
    hover: Callable[[float], str]


def line_chart(
    frame: Frame,
    title: str,
    curves: Sequence[Curve],
    *,
    size: tuple[int, int] = SMALL,
    zero: bool = False,
    log: bool = False,
    form: Format = short,
) -> str:
    """Draws curves over tokens. With `log`, values of 0 and below are omitted."""
    drawn = [dataclasses.replace(curve, points=_above_zero(curve.points)) if log else curve for curve in curves]
    values = [y for curve in drawn for _, y in curve.points]
    x, (top, bottom) = _x_axis(frame, size), _span(size)
    y = value_axis(values, bottom, top, zero=zero, log=log)
    parts = [*_stages(frame.bands, x, top, bottom), *_grid(x, y, size, form)]
    for curve in drawn:
        path = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in curve.points)
        kind = "line marked" if curve.notes else "line"
        parts.append(f'<polyline class="{kind} s{curve.color}" points="{path}"><title>{text(curve.label)}</title>')
        parts.append("</polyline>")
    parts += _hover(frame, x, top, bottom)
    for curve in drawn:
        for (a, b), note in zip(curve.points, curve.notes, strict=False):
            place = f'cx="{x.at(a):.1f}" cy="{y.at(b):.1f}"'
            parts.append(f'<circle class="mark f{curve.color}" r="3.5" {place}><title>{text(note)}</title></circle>')
    return _svg(title, size, parts)


def _above_zero(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if point[1] > 0]


@dataclasses.dataclass(frozen=True)
class Shares:
    """The layers' shares between two token counts. They sum to 1."""

    first: float
    last: float
    shares: Sequence[float]
    note: str


def stack_chart(
    frame: Frame, title: str, layers: int, spans: Sequence[Shares], targets: Sequence[Shares], size: tuple[int, int]
) -> str:
    """Draws stacked shares over tokens, with layer 0 at the bottom and targets as dashed lines."""
    x, (top, bottom) = _x_axis(frame, size), _span(size)
    y = Axis(0.0, 1.0, bottom, top)
    parts = []
    for layer in range(layers):
        upper = [_edge(x, y, span, sum(span.shares[: layer + 1])) for span in spans]
        lower = [_edge(x, y, span, sum(span.shares[:layer])) for span in spans]
        outline = [*upper, *(" ".join(reversed(edge.split(" "))) for edge in reversed(lower))]
        parts.append(f'<polygon class="layer f{layer}" points="{" ".join(outline)}"/>')
    parts += [*_stages(frame.bands, x, top, bottom, shaded=False), *_grid(x, y, size, percent)]
    for target in targets:
        borders = {share for layer in range(layers) if 0 < (share := round(sum(target.shares[:layer]), 6)) < 1}
        for height in map(y.at, sorted(borders)):
            ends = f'x1="{x.at(target.first):.1f}" x2="{x.at(target.last):.1f}" y1="{height:.1f}" y2="{height:.1f}"'
            parts.append(f'<line class="target" {ends}><title>{text(target.note)}</title></line>')
    for span in spans:
        width = max(x.at(span.last) - x.at(span.first), 0.1)
        place = f'x="{x.at(span.first):.1f}" y="{top}" width="{width:.1f}" height="{bottom - top}"'
        parts.append(f'<rect class="hover" {place}><title>{text(span.note)}</title></rect>')
    return _svg(title, size, parts)


def _edge(x: Axis, y: Axis, span: Shares, share: float) -> str:
    height = f"{y.at(share):.1f}"
    return f"{x.at(span.first):.1f},{height} {x.at(span.last):.1f},{height}"


def bar(parts: Sequence[tuple[str, float, str]]) -> str:
    """Draws one full-width bar, divided into parts: (style class, share, note)."""
    found, begin = [], 0.0
    for kind, share, note in parts:
        place = f'x="{600 * begin:.1f}" y="0" width="{600 * share:.1f}" height="18"'
        found.append(f'<rect class="part {kind}" {place}><title>{text(note)}</title></rect>')
        begin += share
    return f'<svg class="bar" viewBox="0 0 600 18" role="img" preserveAspectRatio="none">{"".join(found)}</svg>'


def _x_axis(frame: Frame, size: tuple[int, int]) -> Axis:
    return Axis(0.0, frame.last_token, _LEFT, size[0] - _RIGHT)


def _span(size: tuple[int, int]) -> tuple[int, int]:
    return _TOP, size[1] - _BOTTOM


def _svg(title: str, size: tuple[int, int], parts: Iterable[str]) -> str:
    head = f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{text(title)}">'
    return "\n".join([head, *parts, "</svg>"])


def _grid(x: Axis, y: Axis, size: tuple[int, int], form: Format) -> list[str]:
    top, bottom = _span(size)
    parts = []
    for value in y.ticks(max((bottom - top) // 30, 3)):
        at = f"{y.at(value):.1f}"
        parts.append(f'<line class="grid" x1="{x.start}" x2="{x.end}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="tick y" x="{x.start - 6}" y="{at}" dy="4">{text(form(value))}</text>')
    for value in x.ticks(size[0] // 90):
        at = f"{x.at(value):.1f}"
        parts.append(f'<line class="axis" x1="{at}" x2="{at}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text class="tick x" x="{at}" y="{bottom + 16}">{text(short(value))}</text>')
    parts.append(f'<line class="axis" x1="{x.start}" x2="{x.end}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text class="unit" x="{x.end}" y="{bottom + 32}">tokens</text>')
    return parts


def _stages(bands: Sequence[Band], x: Axis, top: int, bottom: int, shaded: bool = True) -> list[str]:
    """Shades every other stage. Labels are names if they fit, else numbers, else left to the tooltip."""
    parts = []
    for band in bands:
        left, right = x.at(band.first), x.at(band.last)
        if shaded:
            place = f'x="{left:.1f}" y="{top}" width="{right - left:.1f}" height="{bottom - top}"'
            kind = "stage odd" if band.number % 2 else "stage"
            parts.append(f'<rect class="{kind}" {place}><title>{text(band.note)}</title></rect>')
        if band.first > 0:
            at = f'x1="{left:.1f}" x2="{left:.1f}" y1="{top - 14}" y2="{bottom}"'
            parts.append(f'<line class="boundary" {at}/>')
        label = next((one for one in (band.name, str(band.number)) if len(one) * _CHARACTER < right - left), None)
        if label is not None:
            place = f'x="{(left + right) / 2:.1f}" y="{top - 7}"'
            parts.append(f'<text class="name" {place}>{text(label)}<title>{text(band.note)}</title></text>')
    return parts


def _hover(frame: Frame, x: Axis, top: int, bottom: int) -> list[str]:
    """Draws invisible columns with tooltips."""
    width, parts = (x.end - x.start) / _HOVER_COLUMNS, []
    for column in range(_HOVER_COLUMNS):
        left = x.start + column * width
        place = f'x="{left:.1f}" y="{top}" width="{width:.1f}" height="{bottom - top}"'
        note = text(frame.hover(x.value(left + width / 2)))
        parts.append(f'<rect class="hover" {place}><title>{note}</title></rect>')
    return parts
