# SPDX-License-Identifier: Apache-2.0
"""From measurements to figures: percentiles, medians over rounds, ratios within a round, the table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from attrs import Factory, define


def percentile(values: Iterable[float], part: float) -> float:
    """The value that ``part`` (0 to 1) of the values do not exceed; an actual one, not interpolated."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("there are no values")
    return ordered[max(0, min(len(ordered) - 1, -int(-part * len(ordered) // 1) - 1))]


@define
class Figure:
    """One line of the table: the values of every round, for the guard and for what it is compared with.

    :ivar aim: what the ratio (or, without a peer, the guard's value) must not exceed.
    :ivar relay_aim: the same for the guard's ratio to the bare relay.
    """

    name: str
    unit: str
    guard: list[float] = Factory(list)
    peer: list[float] = Factory(list)
    relay: list[float] = Factory(list)
    aim: float | None = None
    digits: int = 2
    relay_aim: float | None = None

    @property
    def ratio(self) -> float | None:
        """The median of the rounds' ratios: guard to peer, as they ran one after the other."""
        return _ratio(self.guard, self.peer)

    @property
    def relay_ratio(self) -> float | None:
        """The same: guard to bare relay."""
        return _ratio(self.guard, self.relay)

    @property
    def met(self) -> bool | None:
        """Whether the aim is reached; ``None`` where there is none."""
        if self.aim is None or not self.guard:
            return None
        judged = self.ratio if self.peer else median(self.guard)
        return judged is not None and judged <= self.aim

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name, "unit": self.unit, "aim": self.aim, "met": self.met,
            "ratio": None if self.ratio is None else round(self.ratio, 3),
            "ratio_to_bare_twisted": None if self.relay_ratio is None else round(self.relay_ratio, 3),
            **{who: {"median": _median(rounds), "rounds": [round(value, 4) for value in rounds]}
               for who, rounds in (("guard", self.guard), ("peer", self.peer), ("bare_twisted", self.relay)) if rounds},
        }  # fmt: skip

    def cells(self) -> tuple[str, ...]:
        """Name, guard, peer, ratio to it, ratio to the bare relay, aims, as text."""
        aims = []
        if self.aim is not None:
            aims.append(f"≤ {self.aim:g}{'' if self.peer else ' ' + self.unit} {_verdict(self.met)}")
        if self.relay_aim is not None and self.relay_ratio is not None:
            aims.append(f"relay ≤ {self.relay_aim:g} {_verdict(self.relay_ratio <= self.relay_aim)}")
        return (
            f"{self.name} [{self.unit}]" if self.unit else self.name,
            self._text(self.guard),
            self._text(self.peer),
            "" if self.ratio is None else f"{self.ratio:.2f}",
            "" if self.relay_ratio is None else f"{self.relay_ratio:.2f}",
            ", ".join(aims),
        )

    def _text(self, rounds: Sequence[float]) -> str:
        return f"{median(rounds):,.{self.digits}f}" if rounds else "–"


def _ratio(values: Sequence[float], others: Sequence[float]) -> float | None:
    pairs = [(value, other) for value, other in zip(values, others, strict=False) if other]
    return median(value / other for value, other in pairs) if pairs else None


def _verdict(met: bool | None) -> str:
    return "met" if met else "**missed**"


def _median(rounds: Sequence[float]) -> float | None:
    return round(median(rounds), 4) if rounds else None


def markdown(figures: Iterable[Figure]) -> str:
    """The table."""
    rows = [
        ("", "lotusguard", "threaded peer", "ratio", "to bare relay", "aim"),
        ("---", "---:", "---:", "---:", "---:", "---"),
    ]
    rows += [figure.cells() for figure in figures]  # type: ignore[misc]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
