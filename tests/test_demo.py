# SPDX-License-Identifier: Apache-2.0
"""``sandbox --demo``: it succeeds only if every step did, and names the step that failed."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor

from lotusguard.sandbox.demo import demo, observer
from lotusguard.sandbox.demo.sandbox import Sandbox
from lotusguard.terminal import StepFailed, StepReport, Terminal


class Tty(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


async def run_demo(**settings: Any) -> tuple[bool, str, StepReport]:
    """Run the demo and return whether it succeeded, its output and the report.

    :param settings: of the guard; they override the demo's.
    """
    out = io.StringIO()
    report = StepReport(Terminal(out, {}), reactor)
    sandbox = Sandbox(reactor, **(demo.SETTINGS | settings))
    await sandbox.start()
    try:
        succeeded = await demo.Demo(sandbox, report).run()
    finally:
        await sandbox.stop()
    return succeeded, out.getvalue(), report


@pytest_twisted.ensureDeferred
async def test_every_step_succeeds() -> None:
    out = io.StringIO()
    report = StepReport(Terminal(out, {}), reactor)
    began = reactor.seconds()
    assert await demo.run_demo(reactor, report)
    assert reactor.seconds() - began < 60
    steps = re.findall(r"^  ✓ +\d+ ms  (.*)$", out.getvalue(), re.MULTILINE)
    assert len(steps) == report.steps
    for what in (
        "carol is refused at the other token route",
        "forbidden during the call",
        "has never looked up",
        "joins again",
    ):
        assert any(what in step for step in steps), what
    assert out.getvalue().count("403 This voice channel is full.") == 3
    assert "✗" not in out.getvalue()


@pytest_twisted.ensureDeferred
async def test_a_guard_that_refuses_nobody_fails_the_demo() -> None:
    succeeded, text, report = await run_demo(guard_dry_run=True)
    assert not succeeded
    assert report.failed == "carol is refused: answered 200 and a token"
    assert text.rstrip().splitlines()[-1].startswith("✗ Failed")
    assert report.failed in text.rstrip().splitlines()[-1]
    assert "A screen share" not in text, "steps after the failed one are not run"


@pytest_twisted.ensureDeferred
async def test_a_guard_that_does_not_enforce_running_calls_fails_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observer, "PATIENCE", 0.5)
    succeeded, _, report = await run_demo(guard_policy_ttl=3600)
    assert not succeeded
    assert report.failed.startswith("screen shares are forbidden during the call")
    assert "she still shares" in report.failed


@pytest_twisted.ensureDeferred
async def test_a_guard_that_forgets_policies_in_an_outage_fails_the_demo() -> None:
    succeeded, _, report = await run_demo(guard_policy_stale=0.01)
    assert not succeeded
    assert report.failed.startswith("dave is refused")


@pytest_twisted.ensureDeferred
async def test_a_guard_that_restores_nothing_fails_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observer, "PATIENCE", 3.0)
    succeeded, _, report = await run_demo(guard_restore=False)
    assert not succeeded
    assert report.failed.startswith("screen shares are allowed again")


@pytest_twisted.ensureDeferred
async def test_a_step_that_raises_any_exception_has_failed() -> None:
    out = io.StringIO()
    report = StepReport(Terminal(out, {}), reactor)

    async def breaks() -> str:
        raise KeyError("room")

    with pytest.raises(StepFailed):
        await report.step("something is done", breaks())
    report.end()
    assert report.failed == "something is done: KeyError: 'room'"
    assert "✗ Failed" in out.getvalue()


@pytest.mark.parametrize(
    ("environ", "coloured"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "xterm", "NO_COLOR": ""}, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
        ({}, False),
    ],
)
def test_colours_are_used_on_terminals_that_support_them(environ: dict[str, str], coloured: bool) -> None:
    out = Tty()
    terminal = Terminal(out, environ)
    terminal.line(terminal.paint("✓", "green"))
    assert ("\x1b[32m" in out.getvalue()) is coloured


def test_a_pipe_gets_no_colours_and_unbroken_lines() -> None:
    terminal = Terminal(io.StringIO(), {"TERM": "xterm"})
    assert terminal.paint("text", "red") == "text"
    assert terminal.wrapped("word " * 100, 20) == ["word " * 100]


def test_a_terminal_gets_lines_that_fit() -> None:
    lines = Terminal(Tty(), {}).wrapped("word " * 100, 40)
    assert len(lines) > 1


def test_marks_become_words_if_the_encoding_lacks_them() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    Terminal(out, {}).line("✓ done → next, at “once”")
    assert raw.getvalue() == b"ok done -> next, at ?once?\n"
