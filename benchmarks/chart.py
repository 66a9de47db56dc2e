# SPDX-License-Identifier: Apache-2.0
"""The chart: pairs of bars, guard against peer, as plain SVG text."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

SHOWN = (
    ("CPU per join, 32 callers", "CPU per join, 32 callers (ms)"),
    ("CPU per join, 500 callers", "CPU per join, 500 callers (ms)"),
    ("p99, 500 callers", "p99 of a join, 500 callers (ms)"),
    ("4,000 callers at once: p99", "4,000 callers at once: p99 (s)"),
    ("4,000 callers at once: peak memory", "4,000 callers at once: peak memory (MB)"),
)
WIDTH, LEFT, BAR, GAP, TOP = 760, 290, 16, 18, 46
_COLOURS = {"guard": "#2f6f62", "peer": "#b9b4a7"}


def chart(figures: Sequence[dict[str, Any]]) -> str:
    """Each pair is scaled to its longer bar; the numbers stand beside them."""
    by_name = {figure["name"]: figure for figure in figures}
    shown = [(title, by_name[name]) for name, title in SHOWN if name in by_name]
    height = TOP + len(shown) * (2 * BAR + GAP) + 6
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="13" role="img" '
        'aria-label="lotusguard against a thread-per-connection guard; shorter is better">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        '<text x="12" y="24" font-weight="600" fill="#222">shorter is better</text>',
        _legend(LEFT, "guard", "lotusguard: limit and sources"),
        _legend(LEFT + 230, "peer", "threaded peer: limit alone"),
    ]
    for number, (title, figure) in enumerate(shown):
        top = TOP + number * (2 * BAR + GAP)
        out.append(f'<text x="12" y="{top + BAR + 5}" fill="#222">{escape(title)}</text>')
        longest = max(figure[who]["median"] for who in _COLOURS) or 1.0
        for place, who in enumerate(_COLOURS):
            value = figure[who]["median"]
            length = max(2.0, value / longest * (WIDTH - LEFT - 80))
            y = top + place * BAR
            out.append(f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR - 2}" fill="{_COLOURS[who]}"/>')
            out.append(f'<text x="{LEFT + length + 6:.1f}" y="{y + 12}" fill="#222">{_number(value)}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def _legend(x: float, who: str, text: str) -> str:
    return (
        f'<rect x="{x}" y="13" width="14" height="14" fill="{_COLOURS[who]}"/>'
        f'<text x="{x + 20}" y="24" fill="#222">{escape(text)}</text>'
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}" if value < 10 else f"{value:.1f}"
