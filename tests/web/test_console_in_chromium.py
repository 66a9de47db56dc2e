# SPDX-License-Identifier: Apache-2.0
"""The console as people see and use it, in a real Chromium; skipped where there is none.

``CHROMIUM`` names the browser, ``CONSOLE_PICTURES`` a folder for screenshots.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.threads import blockingCallFromThread

from lotusguard.clients.http import Answer
from lotusguard.guard.seats.book import Presence, RoomSnapshot
from lotusguard.guard.seats.memory import MemorySeatBook
from lotusguard.sandbox.demo.sandbox import SERVER_NAME, Sandbox
from lotusguard.web.console.view import PER_PAGE
from tests.calls import ALICE, BOB, CAROL, counted, room_of
from tests.conftest import until
from tests.web.chromium import SCHEMES, WIDTHS, Visit, accessibility_faults, overflows, visit

if TYPE_CHECKING:
    from playwright.sync_api import Dialog

ROOMS, PEOPLE = 300, 500
FIRST_PAINT = 3000.0
"""Milliseconds, on a busy machine. docs/benchmarks.md has what was measured."""
HOSTILE = "<img src=x onerror=alert(1)>"


def named_room(sandbox: Sandbox, name: str, max_users: int | None = None) -> str:
    room_id = room_of(sandbox, max_users)
    sandbox.homeserver.set_state(room_id, "m.room.name", {"name": name})
    return room_id


def crowded_call(sandbox: Sandbox, name: str, people: int, limit: int | None = None) -> RoomSnapshot:
    """A call as the seat book would describe it: joins of hundreds of people would take long."""
    users = [f"@person{number}:{SERVER_NAME}" for number in range(people)]
    present = [Presence("alias", f"PA_{user}", f"{user}:PHONE", user, "present") for user in users]
    return RoomSnapshot(named_room(sandbox, name, limit), people, (), present)


def look_around(shown: Visit, calls: int, looks: Sequence[tuple[int, str]]) -> None:
    """Look at the front page with this many calls, in each of these widths and colour schemes."""
    for width, scheme in looks:
        page = shown.page(width, scheme)
        page.get_by_text(f"Live calls ({calls})").wait_for()
        shown.picture(page, f"console-{calls}-{scheme}-{width}")
        assert not overflows(page), (width, scheme)
        assert accessibility_faults(page) == [], (width, scheme)
        page.context.close()


async def begin_to_wait(sandbox: Sandbox, user: str) -> Deferred[Answer]:
    """Somebody asks to join a call with a lobby. :return: the answer to come."""
    room_id = named_room(sandbox, "Weekly")
    sandbox.homeserver.set_state(room_id, "io.lotus.lobby", {"enabled": True, "message": "Who are you?"})
    asked = Deferred.fromCoroutine(sandbox.ask_token(user, room_id))
    await until(lambda: counted(sandbox, "lobby_waiting"), 60)
    return asked


def show_calls(monkeypatch: pytest.MonkeyPatch, calls: Sequence[RoomSnapshot]) -> None:
    async def snapshots(book: MemorySeatBook) -> Sequence[RoomSnapshot]:
        return calls

    async def snapshot(book: MemorySeatBook, room_id: str) -> RoomSnapshot | None:
        return next((call for call in calls if call.room_id == room_id), None)

    monkeypatch.setattr(MemorySeatBook, "snapshots", snapshots)
    monkeypatch.setattr(MemorySeatBook, "snapshot", snapshot)


@pytest_twisted.ensureDeferred
async def test_the_front_page_is_readable_and_fast_with_any_number_of_calls(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    paints: dict[int, float] = {}

    def look(calls: int, *looks: tuple[int, str]) -> Callable[[Visit], None]:
        def run(shown: Visit) -> None:
            look_around(shown, calls, looks)
            paints[calls] = shown.first_paint(shown.page())

        return run

    await visit(sandbox, look(0, (360, "light")))
    await sandbox.enter(ALICE, room_of(sandbox, 2))
    await sandbox.ask_token(BOB, room_of(sandbox, 0), device="TABLET")
    asked = await begin_to_wait(sandbox, CAROL)
    show_calls(monkeypatch, [crowded_call(sandbox, "Team 0", 2, 4)])
    await visit(sandbox, look(1, *product(WIDTHS, SCHEMES)))
    show_calls(monkeypatch, [crowded_call(sandbox, f"Team {n}", 2 + n % 3, 4 + n % 2) for n in range(ROOMS)])
    await visit(sandbox, look(ROOMS, (1920, "dark")))
    print({calls: round(paint) for calls, paint in paints.items()})  # noqa: T201
    assert max(paints.values()) < FIRST_PAINT
    assert not asked.called
    asked.addErrback(lambda failure: None)
    asked.cancel()


@pytest_twisted.ensureDeferred
async def test_long_lists_are_readable(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [crowded_call(sandbox, f"Team {n}", 2 + n % 3) for n in range(ROOMS - 1)]
    show_calls(monkeypatch, [*calls, crowded_call(sandbox, "All hands", PEOPLE)])

    def look(shown: Visit) -> None:
        page = shown.page(360, "dark")
        page.get_by_role("link", name=f"Show all {ROOMS} calls").click()
        page.get_by_text("Show all").wait_for(state="detached")
        assert page.locator("tbody tr").count() == PER_PAGE
        page.get_by_role("link", name="Next").click()
        page.get_by_text("Page 2 of 2").wait_for()
        assert page.locator("tbody tr").count() == ROOMS - PER_PAGE
        page.get_by_role("link", name="Previous").click()
        page.get_by_text("Page 1 of 2").wait_for()
        assert not overflows(page)
        page.get_by_role("link", name="All hands", exact=True).click()
        page.get_by_text(f"{PEOPLE}, no limit").wait_for()
        shown.picture(page, "console-room-dark-360")
        assert page.get_by_role("link", name="Mute @").count() == min(PEOPLE, PER_PAGE)
        assert not overflows(page)
        assert accessibility_faults(page) == []

    await visit(sandbox, look)


@pytest_twisted.ensureDeferred
async def test_an_operator_admits_somebody_with_the_keyboard_alone(sandbox: Sandbox) -> None:
    asked = await begin_to_wait(sandbox, CAROL)

    def look(shown: Visit) -> None:
        page = shown.page()
        link = page.get_by_role("link", name=f"Admit {CAROL}")
        link.wait_for()
        page.locator("body").focus()
        for _ in range(20):
            page.keyboard.press("Tab")
            if link.evaluate("one => one === document.activeElement"):
                break
        page.keyboard.press("Enter")
        page.get_by_role("heading", name=f"Admit {CAROL} to the call?").wait_for()
        assert accessibility_faults(page) == []
        page.get_by_role("button", name="Admit").press("Enter")
        page.get_by_role("heading", name="Live calls").wait_for()

    await visit(sandbox, look)
    assert (await asked).code == 200


@pytest_twisted.ensureDeferred
async def test_the_front_page_updates_itself_and_says_when_it_is_out_of_date(sandbox: Sandbox) -> None:
    room_id = named_room(sandbox, "Weekly")

    def in_the_reactor(work: Callable[[], Coroutine[Any, Any, object]]) -> None:
        blockingCallFromThread(reactor, lambda: Deferred.fromCoroutine(work()))  # type: ignore[arg-type]

    async def stop() -> None:
        assert sandbox.guard.admin is not None
        await sandbox.guard.admin.close(0.1)

    def look(shown: Visit) -> None:
        page = shown.page()
        page.get_by_text("There are no calls.").wait_for()
        in_the_reactor(lambda: sandbox.enter(ALICE, room_id))
        page.get_by_role("link", name="Weekly").wait_for()
        outdated = page.get_by_text("may be out of date")
        assert not outdated.is_visible()
        in_the_reactor(stop)
        outdated.wait_for()
        assert page.get_by_role("link", name="Weekly").is_visible()

    await visit(sandbox, look)


@pytest_twisted.ensureDeferred
async def test_everything_can_be_read_and_done_without_javascript(sandbox: Sandbox) -> None:
    asked = await begin_to_wait(sandbox, CAROL)

    def look(shown: Visit) -> None:
        page = shown.page(script=False)
        page.get_by_role("link", name=f"Deny {CAROL}").click()
        page.get_by_role("button", name="Deny").click()
        page.get_by_role("heading", name="Latest decisions").wait_for()
        assert page.get_by_text("Everything is enforced.").is_visible()

    await visit(sandbox, look)
    assert (await asked).code == 403


@pytest_twisted.ensureDeferred
async def test_names_of_rooms_run_no_script(sandbox: Sandbox) -> None:
    await sandbox.enter(ALICE, named_room(sandbox, HOSTILE))

    def look(shown: Visit) -> list[str]:
        alerts: list[str] = []

        def dismiss(dialog: Dialog) -> None:
            alerts.append(dialog.message)
            dialog.dismiss()

        page = shown.page()
        page.on("dialog", dismiss)
        page.get_by_role("link", name=HOSTILE).click()
        page.get_by_role("heading", name=HOSTILE).wait_for()
        assert page.locator("img").count() == 0
        return alerts

    assert await visit(sandbox, look) == []
