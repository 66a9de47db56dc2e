# SPDX-License-Identifier: Apache-2.0
"""``sandbox --play``: it succeeds only when everything turned out as it should, and names what did not."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor

from lotusguard.sandbox.demo import demo as playing
from lotusguard.sandbox.demo.sandbox import Sandbox
from lotusguard.terminal import Account, NotAsItShould, Terminal


class Tty(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


async def told(**settings: Any) -> tuple[bool, str, Account]:
    """Demo it to a text. :param settings: of the guard, over those that the play takes."""
    out = io.StringIO()
    account = Account(Terminal(out, {}), reactor)
    sandbox = Sandbox(reactor, **(playing.SETTINGS | settings))
    await sandbox.start()
    try:
        well = await playing.Demo(sandbox, account).run()
    finally:
        await sandbox.stop()
    return well, out.getvalue(), account


@pytest_twisted.ensureDeferred
async def test_everything_turns_out_as_it_should() -> None:
    out = io.StringIO()
    account = Account(Terminal(out, {}), reactor)
    began = reactor.seconds()
    assert await playing.play(reactor, account)
    assert reactor.seconds() - began < 20
    steps = re.findall(r"^  ✓ +\d+ ms  (.*)$", out.getvalue(), re.MULTILINE)
    assert len(steps) == account.steps
    for what in ("carol is refused at the other token route", "forbidden half-way", "never asked about", "joins again"):
        assert any(what in step for step in steps), what
    assert out.getvalue().count("403 This voice channel is full.") == 3
    assert "✗" not in out.getvalue()


@pytest_twisted.ensureDeferred
async def test_a_guard_that_refuses_nobody_is_found_out() -> None:
    well, text, account = await told(guard_dry_run=True)
    assert not well
    assert account.failed == "carol is refused: answered 200 and a token"
    assert text.rstrip().splitlines()[-1].startswith("✗ Not as it should")
    assert account.failed in text.rstrip().splitlines()[-1]
    assert "A screen share" not in text, "what depends on the failed step is not played"


@pytest_twisted.ensureDeferred
async def test_a_guard_that_does_not_look_after_calls_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(playing, "PATIENCE", 0.5)
    well, _, account = await told(guard_policy_ttl=3600)
    assert not well
    assert account.failed.startswith("screen shares are forbidden half-way")
    assert "she still shares" in account.failed


@pytest_twisted.ensureDeferred
async def test_a_guard_that_forgets_policies_in_an_outage_is_found_out() -> None:
    well, _, account = await told(guard_policy_stale=0.01)
    assert not well
    assert account.failed.startswith("dave is refused")


@pytest_twisted.ensureDeferred
async def test_a_guard_that_gives_nothing_back_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(playing, "PATIENCE", 3.0)
    well, _, account = await told(guard_restore=False)
    assert not well
    assert account.failed.startswith("screen shares are allowed again")


@pytest_twisted.ensureDeferred
async def test_a_step_that_breaks_down_is_a_step_that_failed() -> None:
    out = io.StringIO()
    account = Account(Terminal(out, {}), reactor)

    async def breaks() -> str:
        raise KeyError("room")

    with pytest.raises(NotAsItShould):
        await account.step("something is done", breaks())
    account.end()
    assert account.failed == "something is done: KeyError: 'room'"
    assert "✗ Not as it should" in out.getvalue()


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
def test_colours_are_for_terminals_that_want_them(environ: dict[str, str], coloured: bool) -> None:
    out = Tty()
    terminal = Terminal(out, environ)
    terminal.line(terminal.paint("✓", "green"))
    assert ("\x1b[32m" in out.getvalue()) is coloured


def test_a_pipe_gets_no_colours_and_no_broken_lines() -> None:
    terminal = Terminal(io.StringIO(), {"TERM": "xterm"})
    assert terminal.paint("text", "red") == "text"
    assert terminal.wrapped("word " * 100, 20) == ["word " * 100]


def test_a_terminal_gets_lines_that_fit() -> None:
    lines = Terminal(Tty(), {}).wrapped("word " * 100, 40)
    assert len(lines) > 1


def test_marks_become_words_where_they_cannot_be_written() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    Terminal(out, {}).line("✓ done → next, at “once”")
    assert raw.getvalue() == b"ok done -> next, at ?once?\n"
