# SPDX-License-Identifier: Apache-2.0
"""The findings of ``lotusguard check``, each with a reason and a remedy, as a table or JSON."""

from __future__ import annotations

from typing import Any, Literal

from attrs import Factory, asdict, define, frozen

from lotusguard import __version__
from lotusguard.terminal import Terminal

State = Literal["fine", "warning", "wrong", "unknown"]
_MARKS = {"fine": ("✓", "green"), "warning": ("!", "yellow"), "wrong": ("✗", "red"), "unknown": ("?", "dim")}


@frozen
class Finding:
    """One question and its answer.

    :ivar about: what it is about: synapse, livekit, upstream …
    :ivar remedy: what to do about it; empty if there is nothing to do.
    """

    about: str
    asked: str
    state: State
    reason: str
    remedy: str = ""


@define
class Report:
    """All findings, in the order in which they were added."""

    findings: list[Finding] = Factory(list)
    order: list[str] = Factory(list)
    """The order in which they are written, by what they are about."""

    @property
    def fine(self) -> bool:
        """Whether nothing is wrong; warnings do not count."""
        return not any(finding.state == "wrong" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        return {"version": __version__, "fine": self.fine, "findings": [asdict(one) for one in self._sorted()]}

    def tell(self, terminal: Terminal) -> None:
        """Write the table."""
        terminal.line(terminal.paint(f"lotusguard {__version__}: would this configuration enforce anything?", "bold"))
        width = max((len(finding.asked) for finding in self.findings), default=0)
        about = ""
        for finding in self._sorted():
            if finding.about != about:
                about = finding.about
                terminal.line()
                terminal.line(terminal.paint(about, "bold"))
            mark, colour = _MARKS[finding.state]
            reason, *more = terminal.wrapped(finding.reason, width + 6)
            terminal.line(f"  {terminal.paint(mark, colour)} {finding.asked:{width}}  {reason}")
            remedy = terminal.wrapped(f"→ {finding.remedy}", width + 6) if finding.remedy else []
            for line in [*more, *(terminal.paint(line, colour) for line in remedy)]:
                terminal.line(f"    {'':{width}}  {line}")
        terminal.line()
        terminal.line(self._summary(terminal))

    def _summary(self, terminal: Terminal) -> str:
        wrong, warnings = self._count("wrong"), self._count("warning")
        also = f", {warnings} to look at (!)" if warnings else ""
        if wrong:
            return terminal.paint(f"✗ {wrong} wrong{also}.", "red", "bold")
        return terminal.paint(f"✓ Nothing is wrong{also}.", "green", "bold")

    def _count(self, state: State) -> int:
        return sum(finding.state == state for finding in self.findings)

    def _sorted(self) -> list[Finding]:
        place = {about: number for number, about in enumerate(self.order)}
        return sorted(self.findings, key=lambda finding: place.get(finding.about, len(place)))


class Findings:
    """Adds findings about one thing to a report.

    :param about: the thing, as in `Finding.about`.
    """

    def __init__(self, report: Report, about: str) -> None:
        self._report = report
        self._about = about

    def fine(self, asked: str, reason: str) -> None:
        self._add(asked, "fine", reason)

    def warning(self, asked: str, reason: str, remedy: str) -> None:
        self._add(asked, "warning", reason, remedy)

    def wrong(self, asked: str, reason: str, remedy: str) -> None:
        self._add(asked, "wrong", reason, remedy)

    def unknown(self, asked: str, reason: str, remedy: str = "") -> None:
        """It could not be determined."""
        self._add(asked, "unknown", reason, remedy)

    def _add(self, asked: str, state: State, reason: str, remedy: str = "") -> None:
        self._report.findings.append(Finding(self._about, asked, state, _plain(reason), _plain(remedy)))


def _plain(text: str) -> str:
    """Text of a service must not move the terminal's cursor or look like lines of ours."""
    return "".join(character if character.isprintable() else "?" for character in text)
