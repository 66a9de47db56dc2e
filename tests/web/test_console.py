# SPDX-License-Identifier: Apache-2.0
"""The console: signing in, pages, updates, actions, and that nobody else can use them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import urlencode

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from lotusguard.clients.http import Answer
from lotusguard.sandbox.demo.sandbox import ADMIN_TOKEN, Sandbox
from lotusguard.sandbox.faults import Fault
from lotusguard.web.console.sessions import ATTEMPT_WINDOW, ATTEMPTS, SESSION_LIFETIME, Sessions, TooManyAttempts
from lotusguard.web.console.updates import KEEP_ALIVE, UPDATE_EVERY, pause_after
from tests.calls import ALICE, BOB, CAROL, crashes, logged, room_of
from tests.conftest import StartSandbox, until
from tests.raw_http import connect

HOSTILE = "<script>alert(1)</script>"


async def get(sandbox: Sandbox, path: str, cookie: str = "") -> Answer:
    return await sandbox.request("GET", sandbox.admin_url + path, None, {"Cookie": cookie} if cookie else {})


async def post(
    sandbox: Sandbox, path: str, form: Mapping[str, str], cookie: str = "", more: Mapping[str, str] | None = None
) -> Answer:
    headers = {"Content-Type": "application/x-www-form-urlencoded", **({"Cookie": cookie} if cookie else {})}
    body = urlencode(form).encode()
    return await sandbox.request("POST", sandbox.admin_url + path, body, headers | dict(more or {}))


async def sign_in(sandbox: Sandbox, token: str = ADMIN_TOKEN) -> str:
    """Sign in. :return: the cookie to send."""
    answer = await post(sandbox, "/console/sign-in", {"token": token})
    assert answer.code == 303
    (cookie,) = answer.headers.getRawHeaders("set-cookie") or []
    return cookie.partition(";")[0]


def text(answer: Answer) -> str:
    return answer.body.decode()


async def csrf_of(sandbox: Sandbox, cookie: str, **fields: str) -> str:
    page = text(await get(sandbox, f"/console/confirm?{urlencode(fields)}", cookie))
    found = re.search(r'name="csrf" value="([^"]+)"', page)
    assert found, page
    return found[1]


# -- signing in --------------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_without_a_session_only_the_sign_in_form_is_shown(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 2)
    await sandbox.enter(ALICE, room_id)
    page = await get(sandbox, "/")
    assert page.code == 200
    assert "GUARD_ADMIN_TOKEN" in text(page)
    assert ALICE not in text(page)
    for path in ("/console/room?id=x", "/console/confirm?action=remove", "/console/events"):
        assert (await get(sandbox, path)).code == 303, path
    assert (await get(sandbox, "/", "lotusguard_session=made-up")).body == page.body


@pytest_twisted.ensureDeferred
async def test_the_console_is_off_without_an_operators_token(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_admin_token="")
    assert (await get(sandbox, "/")).code == 403
    assert (await post(sandbox, "/console/sign-in", {"token": ""})).code == 403


@pytest_twisted.ensureDeferred
async def test_the_cookie_is_for_this_site_alone(sandbox: Sandbox) -> None:
    answer = await post(sandbox, "/console/sign-in", {"token": ADMIN_TOKEN}, more={"X-Forwarded-Proto": "https"})
    (cookie,) = answer.headers.getRawHeaders("set-cookie") or []
    attributes = {part.strip().lower() for part in cookie.split(";")[1:]}
    assert attributes >= {"httponly", "samesite=strict", "secure", "path=/"}
    assert ADMIN_TOKEN not in cookie


@pytest_twisted.ensureDeferred
async def test_a_wrong_token_is_refused_and_soon_so_is_every_other(sandbox: Sandbox) -> None:
    codes = [(await post(sandbox, "/console/sign-in", {"token": "wrong"})).code for _ in range(ATTEMPTS)]
    assert codes == [403] * ATTEMPTS
    assert (await post(sandbox, "/console/sign-in", {"token": ADMIN_TOKEN})).code == 429


def test_attempts_are_forgotten_and_sessions_end() -> None:
    clock = Clock()
    sessions = Sessions("token", clock)
    for _ in range(ATTEMPTS):
        assert sessions.sign_in("wrong", "198.51.100.7") is None
    with pytest.raises(TooManyAttempts):
        sessions.sign_in("token", "198.51.100.7")
    assert sessions.sign_in("token", "198.51.100.8") is not None
    clock.advance(ATTEMPT_WINDOW + 1)
    session = sessions.sign_in("token", "198.51.100.7")
    assert session is not None
    assert sessions.find(session.id) is session
    clock.advance(SESSION_LIFETIME + 1)
    assert sessions.find(session.id) is None


@pytest_twisted.ensureDeferred
async def test_signing_out_ends_the_session(sandbox: Sandbox) -> None:
    cookie = await sign_in(sandbox)
    assert "Status" in text(await get(sandbox, "/", cookie))
    await get(sandbox, "/console/sign-out", cookie)
    assert "Status" not in text(await get(sandbox, "/", cookie))


# -- pages -------------------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_the_overview_shows_calls_seats_and_decisions(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    await sandbox.enter(ALICE, room_id)
    assert (await sandbox.ask_token(BOB, room_id)).code == 403
    page = text(await get(sandbox, "/", await sign_in(sandbox)))
    for shown in ("Everything is enforced.", room_id, "1 of 1", ALICE, BOB, "refused", "full", "<svg"):
        assert shown in page, shown


@pytest_twisted.ensureDeferred
async def test_the_overview_names_what_is_not_enforced(sandbox: Sandbox) -> None:
    await sandbox.homeserver.stop_listening()
    page = text(await get(sandbox, "/", await sign_in(sandbox)))
    assert "Not enforced: limit" in page
    assert "synapse" in page


@pytest_twisted.ensureDeferred
async def test_a_call_shows_who_is_in_it_with_which_rights(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 2, allow_camera=False)
    await sandbox.enter(ALICE, room_id)
    await until(lambda: sandbox.guard.enforcement.watched)
    page = text(await get(sandbox, f"/console/room?{urlencode({'id': room_id})}", await sign_in(sandbox)))
    assert ALICE in page
    assert "microphone, screen share, screen share audio" in page


@pytest_twisted.ensureDeferred
async def test_hostile_names_are_text(sandbox: Sandbox) -> None:
    cookie = await sign_in(sandbox)
    query = urlencode({"room_id": HOSTILE, "user": HOSTILE, "action": "remove"})
    await sandbox.ask_token(CAROL, f"!{HOSTILE}:x")
    for path in ("/", f"/console/confirm?{query}", f"/console/room?{urlencode({'id': HOSTILE})}"):
        page = text(await get(sandbox, path, cookie))
        assert HOSTILE not in page, path
    assert "&lt;script&gt;" in text(await get(sandbox, "/", cookie))


@pytest_twisted.ensureDeferred
async def test_a_room_name_that_is_no_text_is_shown_as_far_as_it_is(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 2)
    await sandbox.enter(ALICE, room_id)
    sandbox.homeserver.set_state(room_id, "m.room.name", {"name": "half \ud800 a pair"})
    cookie = await sign_in(sandbox)
    shown: list[Answer] = []

    async def look() -> None:
        while not shown or "half" not in text(shown[-1]):
            shown.append(await get(sandbox, "/", cookie))
            assert shown[-1].code == 200

    await Deferred.fromCoroutine(look()).addTimeout(30, reactor)
    assert "half \ufffd a pair" in text(shown[-1])


@pytest_twisted.ensureDeferred
async def test_pages_forbid_framing_caching_and_foreign_content(sandbox: Sandbox) -> None:
    answer = await get(sandbox, "/", await sign_in(sandbox))
    (policy,) = answer.headers.getRawHeaders("content-security-policy") or []
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers.getRawHeaders("cache-control") == ["no-store"]
    assert answer.headers.getRawHeaders("x-frame-options") == ["DENY"]
    assert "style=" not in text(answer)
    for name, kind in (("style.css", "text/css"), ("console.js", "text/javascript")):
        static = await get(sandbox, f"/console/{name}")
        assert static.code == 200
        assert (static.headers.getRawHeaders("content-type") or [""])[0].startswith(kind)
    assert (await get(sandbox, "/console/../sessions.py")).code == 404


# -- updates -----------------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_the_stream_sends_the_overview_when_it_changes(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 2)
    cookie = await sign_in(sandbox)
    wire = await connect(sandbox.admin_url)
    try:
        wire.send(f"GET /console/events HTTP/1.1\r\nHost: x\r\nCookie: {cookie}\r\n\r\n".encode())
        await until(lambda: b"There are no calls." in wire.received)
        assert b"text/event-stream" in wire.received
        await sandbox.enter(ALICE, room_id)
        await until(lambda: ALICE.encode() in wire.received)
        assert room_id.encode() in wire.received
    finally:
        wire.drop()


def test_the_stream_continues_soon_after_a_service_was_slow() -> None:
    assert pause_after(0.0) == UPDATE_EVERY
    assert UPDATE_EVERY < pause_after(0.1) < KEEP_ALIVE
    assert pause_after(10.0) == KEEP_ALIVE


# -- actions -----------------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_an_action_needs_the_sessions_own_form(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 2)
    cookie, other = await sign_in(sandbox), await sign_in(sandbox)
    fields = {"room_id": room_id, "user": "", "action": "refresh"}
    stolen = await csrf_of(sandbox, other, **fields)
    asked = sandbox.homeserver.asked["room_state"]
    await sandbox.enter(ALICE, room_id)
    for csrf in ("", "made-up", stolen):
        assert (await post(sandbox, "/console/act", fields | {"csrf": csrf}, cookie)).code == 403
    assert (await post(sandbox, "/console/act", fields | {"csrf": stolen})).code == 303  # to the sign-in form
    asked = sandbox.homeserver.asked["room_state"]
    await sandbox.guard.enforcement.worker.idle()
    mine = await csrf_of(sandbox, cookie, **fields)
    assert (await post(sandbox, "/console/act", fields | {"csrf": mine}, cookie)).code == 303
    await sandbox.guard.enforcement.worker.idle()
    assert sandbox.homeserver.asked["room_state"] > asked


@pytest_twisted.ensureDeferred
async def test_an_unknown_action_is_refused(sandbox: Sandbox) -> None:
    cookie = await sign_in(sandbox)
    assert (await get(sandbox, "/console/confirm?action=explode", cookie)).code == 404


@pytest_twisted.ensureDeferred
async def test_an_action_that_livekit_does_not_do_is_answered_with_a_page_that_says_so(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 2)
    await sandbox.enter(ALICE, room_id)
    cookie = await sign_in(sandbox)
    fields = {"room_id": room_id, "user": ALICE, "action": "mute"}
    csrf = await csrf_of(sandbox, cookie, **fields)
    sandbox.livekit.fault = Fault.status(503)
    with logged() as events:
        answer = await post(sandbox, "/console/act", fields | {"csrf": csrf}, cookie)
    assert answer.code == 502
    assert "livekit: status_503" in text(answer)
    assert "<html" in text(answer)
    assert answer.headers.getRawHeaders("content-security-policy")
    assert not crashes(events)
