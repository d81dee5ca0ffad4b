"""Line charts as inline SVG: no script, no font file, colours from the page's style sheet (classes s0 … s7)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from aimv2_vlm.page import text

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 14, 44
NUM_STYLES = 8


@dataclass(frozen=True)
class Series:
    """One line. `bars` are intervals (x, low, high); `notes` are read out when the pointer rests on a point."""

    name: str
    points: Sequence[tuple[float, float]]
    style: int = 0
    dashed: bool = False
    faint: bool = False
    markers: bool = False
    bars: Sequence[tuple[float, float, float]] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Axis:
    label: str
    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high end."""
        if self.log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        return _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high)


def axis(
    label: str, values: Sequence[float], *, log: bool | None = None, low: float | None = None, high: float | None = None
) -> Axis:
    """An axis with a little room around `values`; log=None: logarithmic when positive values span a factor of 4."""
    bottom = min(values) if low is None else low
    top = max(values) if high is None else high
    if log is None:
        log = bottom > 0 and top / bottom >= 4
    if log:
        room = (top / bottom) ** 0.04 if top > bottom else 1.2
        return Axis(label, bottom / room if low is None else low, top * room if high is None else high, True)
    room = (top - bottom) * 0.05 or abs(top) * 0.1 or 1.0
    return Axis(label, bottom - room if low is None else low, top + room if high is None else high)


def _linear_ticks(low: float, high: float) -> list[float]:
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    found: list[float] = []
    for digits in ((1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 6, 8)):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [round(d * 10.0**e, 12) for e in decades for d in digits if low <= d * 10.0**e <= high]
        if len(found) >= 4:
            return found
    return found if len(found) >= 3 else _linear_ticks(low, high)


def number(value: float) -> str:
    """A tick's number: 20k, 1.5M, 0.05, 3e15."""
    if abs(value) >= 1e12:
        return f"{value:g}".replace("e+", "e")
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
    return f"{value:g}"


_MARKERS = (
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0", "M-3.6,-3.6h7.2v7.2h-7.2z", "M0,-4.8L4.4,3.2H-4.4z", "M0,-5L5,0L0,5L-5,0z",
    "M0,4.8L4.4,-3.2H-4.4z", "M-4,-1.4h2.6v-2.6h2.8v2.6h2.6v2.8h-2.6v2.6h-2.8v-2.6h-2.6z",
    "M-4.6,-2.6h9.2v5.2h-9.2z", "M-2.6,-4.6h5.2v9.2h-5.2z",
)  # fmt: skip


def marker(style: int, x: float = 0, y: float = 0) -> str:
    """The series' own shape, so that lines are told apart without colour."""
    look = style % NUM_STYLES
    return f'<path class="m s{look}" transform="translate({x:.1f},{y:.1f})" d="{_MARKERS[look]}"/>'


def line_chart(series: Sequence[Series], x: Axis, y: Axis, description: str) -> str:
    """One chart; points outside the axes are cut at its frame. `description` is what a screen reader says."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def at(px: float, py: float) -> tuple[float, float]:
        fx, fy = x.place(px), min(1.0, max(0.0, y.place(py)))
        return LEFT + fx * (right - LEFT), bottom - fy * (bottom - TOP)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(description)}">']
    for tick in y.ticks():
        _, ty = at(x.low, tick)
        parts.append(f'<path class="grid" d="M{LEFT},{ty:.1f}H{right}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{ty + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x.ticks():
        tx, _ = at(tick, y.low)
        parts.append(f'<path class="axis" d="M{tx:.1f},{bottom}v5"/>')
        parts.append(f'<text class="tick" x="{tx:.1f}" y="{bottom + 18}" text-anchor="middle">{number(tick)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT},{bottom}H{right}"/>')
    parts.append(
        f'<text class="label" x="{(LEFT + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{text(x.label)}</text>'
    )
    turned = f"translate(12,{(TOP + bottom) / 2}) rotate(-90)"
    parts.append(f'<text class="label" transform="{turned}" text-anchor="middle">{text(y.label)}</text>')
    for line in series:
        look = f"s{line.style % NUM_STYLES}" + (" dashed" if line.dashed else "") + (" faint" if line.faint else "")
        for bx, low, high in line.bars:
            (cx, y0), (_, y1) = at(bx, low), at(bx, high)
            ends = "".join(f"M{cx - 3:.1f},{end:.1f}h6" for end in (y0, y1))
            parts.append(f'<path class="bar s{line.style % NUM_STYLES}" d="M{cx:.1f},{y0:.1f}V{y1:.1f}{ends}"/>')
        placed = [at(px, py) for px, py in line.points]
        if len(placed) > 1:
            parts.append(
                f'<path class="line {look}" d="M' + "L".join(f"{px:.1f},{py:.1f}" for px, py in placed) + '"/>'
            )
        if line.markers or len(placed) == 1:
            notes = list(line.notes) or [f"{line.name}: {py:.4g} at {number(px)}" for px, py in line.points]
            for (px, py), note in zip(placed, notes, strict=True):
                parts.append(f"<g>{marker(line.style, px, py)}<title>{text(note)}</title></g>")
    parts.append("</svg>")
    return "".join(parts)


def legend(series: Sequence[Series]) -> str:
    """The lines' names beside a piece of each."""
    items = []
    for line in series:
        look = f"s{line.style % NUM_STYLES}" + (" dashed" if line.dashed else "") + (" faint" if line.faint else "")
        shape = marker(line.style, 14, 6) if line.markers else ""
        key = f'<svg viewBox="0 0 28 12" aria-hidden="true"><path class="line {look}" d="M1,6H27"/>{shape}</svg>'
        items.append(f"<li>{key}{text(line.name)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'
