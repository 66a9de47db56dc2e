# SPDX-License-Identifier: Apache-2.0
"""The two charts of docs/benchmarks.md, as plain SVG text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

JOINS = (
    ("CPU per join, following requests, 32 callers", "following request, 32 callers"),
    ("CPU per join, first joins, 32 callers", "first join, 32 callers"),
    ("CPU per join, following requests, 500 callers", "following request, 500 callers"),
    ("CPU per join, first joins, 500 callers", "first join, 500 callers"),
)
GROWTH = (
    ("CPU per join, 10 seats held in the room", "10 seats held in the room"),
    ("CPU per join, 1,000 seats held in the room", "1,000 seats held"),
    ("CPU per join, 10,000 seats held in the room", "10,000 seats held"),
    ("CPU per join, 1 rooms known", "1 room known"),
    ("CPU per join, 1,000 rooms known", "1,000 rooms known"),
    ("CPU per join, 100,000 rooms known", "100,000 rooms known"),
)
WIDTH, LEFT, BAR, GAP, TOP = 760, 230, 16, 16, 52
_SERIES = {
    "guard": ("lotusguard", "#2f6f62"),
    "bare_twisted": ("Twisted alone, as many calls", "#8fb8ae"),
    "peer": ("a thread for each connection", "#b9b4a7"),
}


def joins_chart(figures: Sequence[dict[str, Any]]) -> str:
    """CPU time of a join: the guard, what Twisted alone takes for it, and the guard with threads."""
    return _bars("CPU time of a join in milliseconds; shorter is better", JOINS, figures, tuple(_SERIES))


def growth_chart(figures: Sequence[dict[str, Any]]) -> str:
    """CPU time of a join over the size of the room and the number of rooms."""
    return _bars("CPU time of a join in milliseconds; equal bars are best", GROWTH, figures, ("guard",))


def _bars(
    heading: str, rows: Sequence[tuple[str, str]], figures: Sequence[Mapping[str, Any]], series: Sequence[str]
) -> str:
    """One group of bars for each row, all on one scale; the numbers stand beside them."""
    by_name = {figure["name"]: figure for figure in figures}
    shown = [(title, by_name[name]) for name, title in rows if name in by_name]
    height = TOP + len(shown) * (len(series) * BAR + GAP)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="13" role="img" aria-label="{escape(heading)}">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="20" font-weight="600" fill="#222">{escape(heading)}</text>',
    ]
    if len(series) > 1:
        out += [_legend(12 + 200 * place, *_SERIES[who]) for place, who in enumerate(series)]
    values = [figure[who]["median"] for _, figure in shown for who in series if who in figure]
    longest = max(values, default=1.0) or 1.0
    for number, (title, figure) in enumerate(shown):
        top = TOP + number * (len(series) * BAR + GAP)
        middle = top + len(series) * BAR / 2 + 4
        out.append(f'<text x="12" y="{middle:.0f}" fill="#222">{escape(title)}</text>')
        for place, who in enumerate(series):
            if who not in figure:
                continue
            value, y = figure[who]["median"], top + place * BAR
            length = max(2.0, value / longest * (WIDTH - LEFT - 70))
            size = f'width="{length:.1f}" height="{BAR - 2}"'
            out.append(f'<rect class="bar" x="{LEFT}" y="{y}" {size} fill="{_SERIES[who][1]}"/>')
            out.append(f'<text x="{LEFT + length + 6:.1f}" y="{y + 12}" fill="#222">{value:.2f}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def _legend(x: float, text: str, colour: str) -> str:
    return (
        f'<rect x="{x}" y="30" width="12" height="12" fill="{colour}"/>'
        f'<text x="{x + 18}" y="41" fill="#222">{escape(text)}</text>'
    )
