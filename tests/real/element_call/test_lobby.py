# SPDX-License-Identifier: Apache-2.0
"""Waiting in a lobby as people see it in Element Call. The moderator uses another client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from signal import SIGKILL, SIGTERM, Signals

import pytest

from lotusguard.web.held import PUBLIC_SILENCE
from tests.proxies import PROXIES, Place, begun, free_port, is_listening, program_for
from tests.real.element_call.calls import USUAL_MODE, in_mode
from tests.real.element_call.conftest import OpenPage
from tests.real.element_call.person import Person
from tests.real.element_call.rooms import call_room, members
from tests.real.element_call.site import MODES, Site
from tests.real.lobby import ADMIT, DENY, LobbyRoom, run_resident_guard
from tests.real.processes import eventually
from tests.real.stack import Stack

LONG = 90_000.0
"""Milliseconds: longer than proxies wait for an answer by default, and than the guard stays silent."""
SHORT = 5_000.0
MODERATES = 50


def open_lobby(stack: Stack, account: str, users: list[str], first_moderates: bool = True) -> LobbyRoom:
    """A room with a lobby. The first of its members does not wait, if they moderate."""
    room_id = call_room(stack, users)
    if first_moderates:
        stack.set_level(room_id, users[0], MODERATES)
    return LobbyRoom.open(stack, room_id, account)


def joins(person: Person, url: str) -> None:
    """Open the page of a call and press the button. People who wait see the call as well."""
    person.open(url)
    person.press_join()
    person.is_in_the_call()


def waits(lobby: LobbyRoom, *people: Person) -> None:
    """Wait until the lobby has exactly these people in it."""
    users = sorted(person.user for person in people)
    people[0].until(lambda: lobby.waiting() == users, f"waiting in the lobby: {users}")


def asks_the_room(lobby: LobbyRoom, person: Person) -> str:
    """Wait for the guard's notice about a person. :return: its event ID."""
    notice: str = person.until(lambda: lobby.notice(person.user), f"a notice about {person.user}")
    return notice


def in_the_call(lobby: LobbyRoom, *people: Person) -> None:
    """Wait until exactly these people are in the call, and see each other."""
    for person in people:
        person.sees_tiles(len(people))
        person.sees_moving_pictures(len(people))
    stack = lobby.stack
    people[0].until(lambda: len(stack.participants(lobby.room_id)) == len(people), "one connection for each")


def test_a_person_who_waits_is_admitted_by_a_reaction(
    services: Stack, guard_account: str, sites: Callable[[str], Site], open_page: OpenPage
) -> None:
    run_resident_guard(services, guard_account)
    users = members(services, "Alice", "Bob")
    lobby = open_lobby(services, guard_account, users)
    url = sites(USUAL_MODE).room_url(lobby.room_id)
    alice, bob = (open_page(user) for user in users)
    joins(alice, url)
    alice.sees_tiles(1)
    joins(bob, url)
    waits(lobby, bob)
    notice = asks_the_room(lobby, bob)
    bob.page.wait_for_timeout(LONG)
    bob.picture("lobby-waiting")
    alice.picture("lobby-others-see-nobody")
    alice.sees_tiles(1)
    waits(lobby, bob)
    lobby.react(notice, ADMIT, bob.user)
    bob.page.wait_for_timeout(SHORT)
    waits(lobby, bob)
    lobby.react(notice, ADMIT)
    in_the_call(lobby, alice, bob)
    bob.picture("lobby-admitted")
    bob.until(lambda: not lobby.notice(bob.user), "the notice is redacted")
    assert lobby.waiting() == []


@pytest.mark.parametrize("mode", MODES)
def test_a_person_who_is_denied_at_once_is_told_so(
    services: Stack, guard_account: str, sites: Callable[[str], Site], open_page: OpenPage, mode: str
) -> None:
    run_resident_guard(services, guard_account)
    users = members(services, "Bob")
    lobby = open_lobby(services, guard_account, users, first_moderates=False)
    bob = open_page(users[0])
    joins(bob, sites(mode).room_url(lobby.room_id))
    waits(lobby, bob)
    lobby.react(asks_the_room(lobby, bob), DENY)
    bob.is_refused("You were not admitted to this call.")
    bob.picture(in_mode("lobby-denied", mode))
    assert all(request.endswith(" 403") for request in bob.asked())


def test_a_person_who_is_denied_late_sees_an_error_without_the_reason(
    services: Stack, guard_account: str, sites: Callable[[str], Site], open_page: OpenPage
) -> None:
    run_resident_guard(services, guard_account)
    users = members(services, "Bob")
    lobby = open_lobby(services, guard_account, users, first_moderates=False)
    bob = open_page(users[0])
    joins(bob, sites(USUAL_MODE).room_url(lobby.room_id))
    waits(lobby, bob)
    bob.page.wait_for_timeout(PUBLIC_SILENCE * 1000 + SHORT)
    lobby.react(asks_the_room(lobby, bob), DENY)
    bob.sees("Something went wrong")
    bob.picture("lobby-denied-late")
    assert bob.page.get_by_text("Technical details").count() == 0
    assert services.participants(lobby.room_id) == []


def test_a_person_whom_nobody_admits_is_told_so(
    services: Stack, guard_account: str, sites: Callable[[str], Site], open_page: OpenPage
) -> None:
    run_resident_guard(services, guard_account, guard_lobby_wait=10)
    users = members(services, "Bob")
    lobby = open_lobby(services, guard_account, users, first_moderates=False)
    bob = open_page(users[0])
    joins(bob, sites(USUAL_MODE).room_url(lobby.room_id))
    bob.is_refused("Nobody admitted you in time.")
    bob.picture("lobby-unanswered")


def test_a_moderators_command_admits_everybody(
    services: Stack, guard_account: str, sites: Callable[[str], Site], open_page: OpenPage
) -> None:
    run_resident_guard(services, guard_account)
    users = members(services, "Bob", "Carol")
    lobby = open_lobby(services, guard_account, users, first_moderates=False)
    people = [open_page(user) for user in users]
    for person in people:
        joins(person, sites(USUAL_MODE).room_url(lobby.room_id))
    waits(lobby, *people)
    lobby.say(f"!call admit {users[0]}")
    in_the_call(lobby, people[0])
    waits(lobby, people[1])
    lobby.say("!call admit all")
    in_the_call(lobby, *people)
    people[1].picture("lobby-admitted-by-command")


@pytest.mark.parametrize("how", [SIGTERM, SIGKILL], ids=["restarted", "killed"])
def test_a_person_waits_on_while_the_guard_is_restarted(
    services: Stack, guard_account: str, sites: Callable[[str], Site], open_page: OpenPage, how: Signals
) -> None:
    run_resident_guard(services, guard_account)
    users = members(services, "Bob")
    lobby = open_lobby(services, guard_account, users, first_moderates=False)
    bob = open_page(users[0])
    joins(bob, sites(USUAL_MODE).room_url(lobby.room_id))
    waits(lobby, bob)
    notice = asks_the_room(lobby, bob)
    asked = len(bob.requests)
    assert services.guard is not None
    services.guard.restart(how)
    bob.until(lambda: len(bob.requests) > asked, "Element Call asks again")
    waits(lobby, bob)
    assert lobby.notice(bob.user) == notice, "nobody is asked twice"
    bob.picture("lobby-guard-restarted")
    lobby.react(notice, ADMIT)
    in_the_call(lobby, bob)


@contextmanager
def running_proxy(stack: Stack, snippet: str, folder: Path) -> Iterator[str]:
    """A real reverse proxy with a configuration of ``deploy/proxy`` and TLS. :return: the guard's URL behind it."""
    program = program_for(snippet)
    if program is None:
        pytest.skip(f"there is no {PROXIES[snippet].__name__}")
    folder.mkdir()
    certificate = stack.place / "tls.crt", stack.place / "tls.key"
    place = Place(folder, free_port(), stack.guard_url.removeprefix("http://"), certificate)
    process = begun(program, snippet, place)
    try:
        eventually(lambda: is_listening(place), 30.0, f"{program} has to listen")
        yield place.url
    finally:
        process.terminate()
        process.wait(20)


def test_people_wait_for_long_behind_reverse_proxies(
    services: Stack, guard_account: str, sites: Callable[[str], Site], open_page: OpenPage, tmp_path: Path
) -> None:
    run_resident_guard(services, guard_account)
    snippets = [name for name in ("nginx.conf", "Caddyfile", "traefik.yaml") if program_for(name)]
    if not snippets:
        pytest.skip("there is no reverse proxy")
    waiting = []
    with ExitStack() as running:
        for user, snippet in zip(members(services, *("Bob", "Carol", "Dave")[: len(snippets)]), snippets, strict=True):
            lobby = open_lobby(services, guard_account, [user], first_moderates=False)
            person = open_page(
                user, through=running.enter_context(running_proxy(services, snippet, tmp_path / snippet))
            )
            joins(person, sites(USUAL_MODE).room_url(lobby.room_id))
            waits(lobby, person)
            waiting.append((lobby, person, len(person.requests)))
        waiting[0][1].page.wait_for_timeout(LONG)
        for lobby, person, asked in waiting:
            waits(lobby, person)
            assert len(person.requests) == asked, "a request was cut off"
            lobby.react(asks_the_room(lobby, person), ADMIT)
            in_the_call(lobby, person)
            assert all(request.endswith(" 200") for request in person.asked())
            assert {request.method for request in person.requests} == {"OPTIONS", "POST"}
