# SPDX-License-Identifier: Apache-2.0
"""Timeouts of calls to Redis when this process itself was busy or stopped."""

from __future__ import annotations

from typing import Any

from attrs import define, field
from twisted.internet.defer import CancelledError, TimeoutError
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from lotusguard.clients.redis.patience import Unanswered


@define
class Connection:
    """The commands of a connection, and what became of each; commands time out after one second."""

    clock: Clock = field(factory=Clock)
    commands: Unanswered = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.commands = Unanswered(self.clock, 1.0)

    def send(self) -> list[Any]:
        """:return: where the outcome appears."""
        outcome: list[Any] = []
        self.commands.sent().addBoth(outcome.append)
        return outcome

    def answer(self, answer: Any) -> None:
        self.commands.received()
        self.commands.answer(answer)


def is_timeout(outcome: list[Any]) -> bool:
    return bool(outcome) and isinstance(outcome[0], Failure) and outcome[0].check(TimeoutError) is not None


def test_an_answer_that_does_not_come_is_a_timeout() -> None:
    connection = Connection()
    outcome = connection.send()
    connection.clock.advance(0.9)
    assert not outcome
    connection.clock.advance(0.1)
    assert is_timeout(outcome)


def test_a_command_is_given_up_by_its_own_time() -> None:
    connection = Connection()
    first = connection.send()
    connection.clock.advance(0.5)
    second = connection.send()
    connection.clock.advance(0.5)
    assert is_timeout(first)
    assert not second
    connection.clock.advance(0.5)
    assert is_timeout(second)


def test_an_answer_that_comes_too_late_is_not_that_of_the_next_command() -> None:
    connection = Connection()
    late = connection.send()
    connection.clock.advance(1.0)
    following = connection.send()
    connection.answer("late")
    assert is_timeout(late)
    assert not following
    connection.answer("following")
    assert following == ["following"]


def test_a_cancelled_command_leaves_the_answers_of_the_others_in_order() -> None:
    connection = Connection()
    cancelled = connection.commands.sent()
    errors: list[Any] = []
    cancelled.addErrback(errors.append)
    following = connection.send()
    cancelled.cancel()
    connection.answer("of the cancelled one")
    connection.answer("of the following one")
    assert errors[0].check(CancelledError)
    assert following == ["of the following one"]


def test_an_answer_that_arrived_while_the_process_was_stopped_is_read() -> None:
    connection = Connection()
    outcome = connection.send()
    connection.clock.advance(30.0)
    connection.answer("answer")
    assert outcome == ["answer"]


def test_a_process_that_stays_busy_gives_up_in_the_end() -> None:
    connection = Connection()
    outcome = connection.send()
    for _ in range(100):
        connection.clock.advance(5.0)
    assert is_timeout(outcome)
    assert not connection.clock.getDelayedCalls()


def test_a_command_is_waited_for_while_others_are_answered() -> None:
    connection = Connection()
    outcome = connection.send()
    for _ in range(40):
        connection.clock.advance(0.1)
        connection.commands.received()
    assert not outcome
    for _ in range(15):
        connection.clock.advance(0.1)
        connection.commands.received()
    assert is_timeout(outcome), "five times the timeout is enough"


def test_answered_commands_leave_no_timer_once_their_time_is_over() -> None:
    connection = Connection()
    for answer in range(100):
        outcome = connection.send()
        connection.answer(answer)
        assert outcome == [answer]
    assert len(connection.clock.getDelayedCalls()) == 1
    connection.clock.advance(1.0)
    assert not connection.clock.getDelayedCalls()


def test_a_lost_connection_fails_all_commands_and_leaves_no_timer() -> None:
    connection = Connection()
    outcomes = [connection.send(), connection.send()]
    connection.commands.lose(ConnectionError("lost"))
    assert all(outcome[0].check(ConnectionError) for outcome in outcomes)
    assert not connection.clock.getDelayedCalls()


def test_an_answer_that_nobody_asked_for_is_ignored() -> None:
    connection = Connection()
    connection.answer(ConnectionError("max number of clients reached"))
    outcome = connection.send()
    connection.answer("answer")
    assert outcome == ["answer"]
