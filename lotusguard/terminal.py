# SPDX-License-Identifier: Apache-2.0
"""Output for terminals: marks, colours, and a report of steps, line by line."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Awaitable, Mapping
from typing import TextIO

from twisted.internet.defer import CancelledError
from twisted.internet.interfaces import IReactorTime

_CODES = {"green": "32", "red": "31", "yellow": "33", "bold": "1", "dim": "2"}
_PLAIN = {"✓": "ok", "✗": "no", "→": "->", "…": "...", "–": "-"}


class Terminal:
    """A stream to write lines to.

    Colours are used on terminals that support them, unless ``NO_COLOR`` is set (no-color.org). If the stream's
    encoding has no ``✓``, words replace the marks.
    """

    def __init__(self, stream: TextIO, environ: Mapping[str, str]) -> None:
        self._stream = stream
        self._encoding = getattr(stream, "encoding", None) or "utf-8"
        capable = environ.get("TERM", "") not in ("", "dumb")
        self.coloured = stream.isatty() and capable and not environ.get("NO_COLOR")
        try:
            "".join(_PLAIN).encode(self._encoding)
            self._marks: Mapping[int, str] = {}
        except UnicodeEncodeError:
            self._marks = {ord(mark): plain for mark, plain in _PLAIN.items()}

    def paint(self, text: str, *styles: str) -> str:
        """The text in these styles (green, red, yellow, bold, dim); unchanged if colours are off."""
        if not self.coloured or not text:
            return text
        return f"\x1b[{';'.join(_CODES[style] for style in styles)}m{text}\x1b[0m"

    def wrapped(self, text: str, indent: int) -> list[str]:
        """The text in lines that fit the terminal after indentation; in one line if the stream is not a terminal."""
        if not self._stream.isatty():
            return [text]
        return textwrap.wrap(text, max(30, shutil.get_terminal_size().columns - indent), break_on_hyphens=False)

    def line(self, text: str = "") -> None:
        """Write one line and flush."""
        line = text.translate(self._marks) if self._marks else text
        # texts from dependencies may contain characters that the stream cannot encode
        self._stream.write(line.encode(self._encoding, "replace").decode(self._encoding) + "\n")
        self._stream.flush()


class StepFailed(Exception):
    """A step failed. The text describes what was observed instead."""


class StepReport:
    """Reports each step when it ends: whether it succeeded, what was observed, and how long it took.

    :ivar steps: number of steps that succeeded.
    :ivar failed: the failed step and the reason; empty if none failed.
    """

    def __init__(self, terminal: Terminal, clock: IReactorTime) -> None:
        self.steps = 0
        self.failed = ""
        self._terminal = terminal
        self._clock = clock
        self._began = clock.seconds()

    def title(self, text: str, *below: str) -> None:
        self._terminal.line(self._terminal.paint(text, "bold"))
        for line in below:
            self._terminal.line(self._terminal.paint(line, "dim"))

    def section(self, text: str, *below: str) -> None:
        self._terminal.line()
        self.title(text, *below)

    async def step(self, what: str, work: Awaitable[str]) -> None:
        """Run one step and report it.

        :param work: performs and checks the step, and returns what was observed.
        :raises StepFailed: the step failed, which has been reported.
        """
        began = self._clock.seconds()
        try:
            seen, mark = await work, self._terminal.paint("✓", "green")
        except CancelledError:
            raise
        except Exception as error:
            reason = str(error) if isinstance(error, StepFailed) else f"{type(error).__name__}: {error}"
            self._report(self._terminal.paint("✗", "red", "bold"), began, what, reason, "red")
            self.failed = f"{what}: {reason}"
            raise StepFailed(reason) from error
        self.steps += 1
        self._report(mark, began, what, seen, "dim")

    def _report(self, mark: str, began: float, what: str, seen: str, style: str) -> None:
        took = f"{(self._clock.seconds() - began) * 1000:5.0f} ms"
        self._terminal.line(f"  {mark} {self._terminal.paint(took, 'dim')}  {what}")
        for line in self._terminal.wrapped(seen, 14):
            self._terminal.line(f"              {self._terminal.paint(line, style)}")

    def end(self) -> None:
        """Write the last line."""
        took = f"{self._clock.seconds() - self._began:.1f} s"
        self._terminal.line()
        if self.failed:
            text = f"✗ Failed after {self.steps} steps and {took}. {self.failed}"
            self._terminal.line(self._terminal.paint(text, "red", "bold"))
        else:
            text = f"✓ All {self.steps} steps succeeded in {took}."
            self._terminal.line(self._terminal.paint(text, "green", "bold"))
