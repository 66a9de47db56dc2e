# SPDX-License-Identifier: Apache-2.0
"""The commands that wait for an answer, and a timeout that is the server's fault and not our own."""

from __future__ import annotations

from collections import deque
from typing import Any

from attrs import define, field
from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.interfaces import IDelayedCall, IReactorTime

BUSY = 0.1
"""Seconds by which the reactor may be late until that counts."""
READ = 0.05
"""Seconds until a call is looked at again, at least."""
LONGEST = 5
"""How many times the timeout a call may take while others are answered, or while this process is not given time."""


@define(eq=False)
class _Command:
    """A command that was sent.

    :ivar left: how many times its timeout may begin anew. :ivar not_before: when it may be given up at the earliest.
    """

    began: float
    left: int
    not_before: float = 0.0
    outcome: Deferred[Any] = field(factory=Deferred)


@define(eq=False)
class Unanswered:
    """The commands of one connection that were not answered yet. The server answers them in their order.

    A command fails with `TimeoutError` if the server says nothing for so many seconds. Timers run before sockets are
    read and written. If this process was busy or stopped for a while, the answer may have arrived long ago, or the
    command may not have been sent: the timeout begins anew. And while a crowd waits, the server may need longer for all
    of them, so a command is waited for as long as others are answered.

    One timer serves all of them. It is not cancelled with each answer: it runs out if nothing waits.
    """

    _clock: IReactorTime
    _timeout: float
    _heard: float = field(init=False, default=0.0)
    _commands: deque[_Command] = field(init=False, factory=deque)
    _timer: IDelayedCall | None = field(init=False, default=None)
    _due: float = field(init=False, default=0.0)

    def sent(self) -> Deferred[Any]:
        """A command was sent. :return: its answer."""
        command = _Command(self._clock.seconds(), LONGEST)
        self._commands.append(command)
        if self._timer is None:
            self._check_at(command.began + self._timeout)
        return command.outcome

    def received(self) -> None:
        """The server has sent something."""
        self._heard = self._clock.seconds()

    def answer(self, answer: Any) -> None:
        """The server has answered the oldest command. :param answer: an exception if it has failed."""
        if not self._commands:  # a server that wants no connection says so unasked
            return
        outcome = self._commands.popleft().outcome
        if outcome.called:  # given up, or cancelled
            return
        if isinstance(answer, Exception):
            outcome.errback(answer)
        else:
            outcome.callback(answer)

    def lose(self, error: Exception) -> None:
        """The connection is lost: no answer comes any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._commands:
            self.answer(error)

    def _check(self) -> None:
        self._timer, now = None, self._clock.seconds()
        waiting = [command for command in self._commands if not command.outcome.called]
        if now - self._due > BUSY:
            self._begin_anew(waiting, now)
        until = {command: self._until(command) for command in waiting}
        left = [at for at in until.values() if at > now]
        if left:
            self._check_at(max(now + READ, min(left)))
        for command, at in until.items():
            if at <= now and not command.outcome.called:
                command.outcome.errback(TimeoutError(self._timeout))

    def _begin_anew(self, waiting: list[_Command], now: float) -> None:
        for command in waiting:
            if command.left:
                command.left, command.not_before = command.left - 1, now + self._timeout

    def _until(self, command: _Command) -> float:
        silent = max(self._heard, command.began) + self._timeout
        return max(command.not_before, min(silent, command.began + LONGEST * self._timeout))

    def _check_at(self, at: float) -> None:
        self._due = at
        self._timer = self._clock.callLater(at - self._clock.seconds(), self._check)
