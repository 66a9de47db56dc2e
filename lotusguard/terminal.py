# SPDX-License-Identifier: Apache-2.0
"""What people see on their terminal: marks, colours, and the account of a play, line by line. Under the roof."""

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

    Coloured when it is a terminal that can, and its owner did not set ``NO_COLOR`` (no-color.org). Where the
    stream's encoding has no ``✓``, plain words stand for the marks.
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
        """The text in these styles (green, red, yellow, bold, dim), or as it is where there are no colours."""
        if not self.coloured or not text:
            return text
        return f"\x1b[{';'.join(_CODES[style] for style in styles)}m{text}\x1b[0m"

    def wrapped(self, text: str, indent: int) -> list[str]:
        """The text in lines that fit a terminal when they are indented so far; elsewhere in one line."""
        if not self._stream.isatty():
            return [text]
        return textwrap.wrap(text, max(30, shutil.get_terminal_size().columns - indent), break_on_hyphens=False)

    def line(self, text: str = "") -> None:
        """Write one line, at once."""
        line = text.translate(self._marks) if self._marks else text
        # what a dependency said may hold anything
        self._stream.write(line.encode(self._encoding, "replace").decode(self._encoding) + "\n")
        self._stream.flush()


class NotAsItShould(Exception):
    """A step did not turn out as it should. The text says what was seen instead."""


class Account:
    """Tells of steps as they are taken: whether each turned out as it should, what was seen, and how long it took.

    :ivar steps: how many went well.
    :ivar failed: the step that did not, with the reason.
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

    def act(self, text: str, *below: str) -> None:
        self._terminal.line()
        self.title(text, *below)

    async def step(self, what: str, work: Awaitable[str]) -> None:
        """Take one step.

        :param work: does it, looks whether it went well, and gives what was seen.
        :raises NotAsItShould: it did not; that has been told then.
        """
        began = self._clock.seconds()
        try:
            seen, mark = await work, self._terminal.paint("✓", "green")
        except CancelledError:
            raise
        except Exception as trouble:
            reason = str(trouble) if isinstance(trouble, NotAsItShould) else f"{type(trouble).__name__}: {trouble}"
            self._tell(self._terminal.paint("✗", "red", "bold"), began, what, reason, "red")
            self.failed = f"{what}: {reason}"
            raise NotAsItShould(reason) from trouble
        self.steps += 1
        self._tell(mark, began, what, seen, "dim")

    def _tell(self, mark: str, began: float, what: str, seen: str, style: str) -> None:
        took = f"{(self._clock.seconds() - began) * 1000:5.0f} ms"
        self._terminal.line(f"  {mark} {self._terminal.paint(took, 'dim')}  {what}")
        for line in self._terminal.wrapped(seen, 14):
            self._terminal.line(f"              {self._terminal.paint(line, style)}")

    def end(self) -> None:
        """The last line."""
        took = f"{self._clock.seconds() - self._began:.1f} s"
        self._terminal.line()
        if self.failed:
            text = f"✗ Not as it should, after {self.steps} steps and {took}. {self.failed}"
            self._terminal.line(self._terminal.paint(text, "red", "bold"))
        else:
            text = f"✓ All {self.steps} steps turned out as they should, in {took}."
            self._terminal.line(self._terminal.paint(text, "green", "bold"))
