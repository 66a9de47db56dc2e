# SPDX-License-Identifier: Apache-2.0
"""Fuzzing of whole requests through sockets: never a 500, never a hang, never a token past the policy of its room.

``FUZZ_EXAMPLES`` is their number (`make fuzz` runs 10,000, different ones each time). A token is judged by what the
stand-in for upstream understood, not by what the guard believes was asked for.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_twisted
from attrs import Factory, define
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.internet.threads import blockingCallFromThread, deferToThread
from twisted.logger import globalLogPublisher

from lotusguard.rules.identity import room_alias
from lotusguard.rules.jwt import read_unverified
from lotusguard.rules.requests import TOKEN_ROUTES
from lotusguard.sandbox.demo.sandbox import SERVER_NAME, Sandbox
from tests.raw_http import Response, exchange, reactor

# The reactor's thread may draw a random number while an example is generated; hypothesis warns about that.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "300"))
FUZZED = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
ALICE, BOB, HOLDER = (f"@{name}:{SERVER_NAME}" for name in ("alice", "bob", "holder"))
OPEN, FULL, NO_CAMERA, UNKNOWN = (f"!{name}:{SERVER_NAME}" for name in ("open", "full", "nocamera", "unknown"))
OPENID = {user: f"openid-of-{user[1:].partition(':')[0]}" for user in (ALICE, BOB, HOLDER)}
SENTINEL = b"GET /healthz?sentinel HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
ANSWERED_WITHIN = 30.0

# -- bodies: nearly valid token requests as text, so that keys may occur twice -------------------------------------

rooms = st.sampled_from((FULL, OPEN, NO_CAMERA, UNKNOWN))  # the first one is drawn most often
users = st.sampled_from((ALICE, BOB, HOLDER))
odd_text = st.sampled_from(("", "\ud800", "\0", "ſ", "K", "a" * 300, FULL + " ", "\\", '"', "\u2028<&>"))
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8), odd_text, rooms, users
)
values: st.SearchStrategy[Any] = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = (
    "room", "room_id", "slot_id", "openid_token", "member", "device_id", "member_id", "user_id", "access_token",
    "matrix_server_name", "claimed_user_id", "claimed_device_id", "id", "delay_id", "delay_timeout", "url",
)  # fmt: skip


@st.composite
def spelt(draw: st.DrawFn, key: str) -> str:
    """A key as JSON text in another spelling, which some parsers treat as the same."""
    spellings = (
        key.upper(), key.capitalize(), key[:-1] + key[-1:].upper(), key.replace("s", "ſ").replace("k", "\u212a"),
        draw(st.sampled_from(KEYS)),
    )  # fmt: skip
    escaped = '"' + "".join(f"\\u{ord(letter):04x}" for letter in key) + '"'
    return draw(st.sampled_from((*map(json.dumps, spellings), escaped)))


@st.composite
def objects(draw: st.DrawFn, proper: list[tuple[str, Any]]) -> str:
    """An object with these keys, a fourth of the time with one or two oddities."""
    pairs = [(json.dumps(key), draw(value) if isinstance(value, st.SearchStrategy) else value) for key, value in proper]
    for _ in range(draw(st.sampled_from((0,) * 8 + (1, 1, 2)))):
        at = draw(st.integers(0, len(pairs) - 1))
        key, value = pairs[at]
        other = draw(proper[at][1]) if at < len(proper) and isinstance(proper[at][1], st.SearchStrategy) else value
        odd = json.dumps(draw(values))
        respelt = draw(spelt(json.loads(key)))
        changed = draw(
            st.sampled_from((
                [(key, odd)], [(respelt, value)], [(key, value), (key, other)], [(key, value), (respelt, other)],
                [(respelt, other), (key, value)], [], [(key, value), (odd if odd.startswith('"') else '"x"', odd)],
            ))
        )  # fmt: skip
        pairs[at : at + 1] = changed
        if not pairs:
            break
    space = draw(st.sampled_from(("", "", " ", "\n")))
    return "{" + space + f",{space}".join(f"{key}:{space}{value}" for key, value in pairs) + space + "}"


as_json = json.dumps
room_texts = rooms.map(as_json)


@st.composite
def openids(draw: st.DrawFn, user: str) -> str:
    token = draw(st.sampled_from((OPENID[user],) * 8 + (OPENID[BOB], "nobodys")))
    server = draw(st.sampled_from((SERVER_NAME,) * 10 + ("evil.example", "127.0.0.1:1")))
    pairs = {"access_token": token, "token_type": "Bearer", "matrix_server_name": server}
    return draw(objects([*((key, as_json(value)) for key, value in pairs.items()), ("expires_in", "3600")]))


@st.composite
def token_requests(draw: st.DrawFn) -> tuple[str, bytes]:
    """A token route and a body for it, of either shape or both."""
    user = draw(users)
    slot = st.sampled_from(("m.call#ROOM", "m.call#ROOM", "other", "")).map(as_json)
    member = objects([("id", '"m"'), ("claimed_user_id", as_json(user)), ("claimed_device_id", '"D"')])
    openid = openids(user)
    legacy: list[tuple[str, Any]] = [("room", room_texts), ("openid_token", openid), ("device_id", '"D"')]
    new: list[tuple[str, Any]] = [
        ("room_id", room_texts), ("slot_id", slot), ("openid_token", openid), ("member", member),
    ]  # fmt: skip
    app_service = [("room_id", room_texts), ("slot_id", slot), ("member_id", '"m"'), ("user_id", as_json(user))]
    either = [("/sfu/get", legacy), ("/get_token", new)]
    others = [(path, app_service) for path in TOKEN_ROUTES]
    path, shape = draw(st.sampled_from([*either * 5, ("/sfu/get", new), ("/sfu/get", legacy + new[:1]), *others]))
    text = draw(objects(shape))
    text += draw(st.sampled_from(("", "", "", "", "", "", " ", "\n{}", "x", "\0")))
    body = text.encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 12)) == 0 and body:
        at = draw(st.integers(0, len(body) - 1))
        body = body[:at] + bytes([draw(st.integers(0, 255))]) + body[at + 1 :]
    return path, body


no_bodies = st.tuples(st.just(""), st.binary(max_size=200))
routed = st.one_of(token_requests(), token_requests(), token_requests(), token_requests(), no_bodies)

# -- requests around the bodies ----------------------------------------------------------------------------------------

PROXIED = (
    "/_matrix/client/v1/rtc/livekit/get_token",
    "/_matrix/federation/unstable/io.element.msc4195/rtc/livekit/get_token",
    "/_matrix/client/v1//rtc/%6civekit/get_token",
)
paths = st.one_of(
    st.sampled_from(tuple(TOKEN_ROUTES)),
    st.sampled_from((
        "/sfu/%67et", "//sfu/get", "/sfu/get/", "/x/../sfu/get", "/sfu%2fget", "/get_token?room=x", "/sfu/get?",
        "/SFU/GET", "/healthz", "/sfu_webhook", "/delegate_delayed_leave", "/", "*", "/%", "/%00", "/sfu/get#x",
        "http://evil.example/sfu/get", "http://x:y@[::1]:z/", "/..", "/%2e%2e/get_token", "/relay", "/sfu/get;a=b",
        *PROXIED,
    )),
    st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=20).map(lambda text: "/" + text),
    st.text(max_size=10),
)  # fmt: skip
methods = st.sampled_from(
    ("POST",) * 40
    + ("GET", "PUT", "HEAD", "OPTIONS", "DELETE", "CONNECT", "TRACE", "post", "P@ST", "", "X" * 50, "PATCH")
)
plain_values = st.sampled_from(
    ("x", "application/json", "keep-alive", "gzip", "a=1; b=2", "192.0.2.1", ALICE, "close, x")
)
odd_values = st.one_of(
    st.sampled_from((
        "close, x", "keep-alive", "chunked", "gzip", "100-continue", "h2c", "text/html", "application/json", "a b",
        "multipart/form-data; boundary=x", "multipart/form-data", "evil.example", "\xe4", "bytes=0-1", ALICE,
        "Bearer hs", "x" * 500, "b\r\n folded", "b\nX-Injected: 1", "b\rX-Injected: 1", "a\nb", "a\0b", "-1", "\t",
    )),
    st.text(st.characters(max_codepoint=255), max_size=20),
)  # fmt: skip
known_names = st.sampled_from((
        "Host", "Connection", "TE", "Trailer", "Upgrade", "Expect", "Content-Type", "Accept-Encoding", "Range",
        "Cookie", "X-Forwarded-For", "X-Request-ID", "X-Forwarded-Host", "Authorization", "X-Matrix-User-Identifier",
        "X-Matrix-Origin", "Origin", "Content-Encoding", "Keep-Alive", "Proxy-Authorization", "If-None-Match",
        "Forwarded", "X-HTTP-Method-Override",
))  # fmt: skip
header_names = st.one_of(*[known_names] * 12, st.text(st.characters(max_codepoint=255), max_size=10))
header_values = st.one_of(*[plain_values] * 6, odd_values)


@st.composite
def framed(draw: st.DrawFn, body: bytes) -> tuple[list[str], bytes]:
    """Headers that frame a body, and the framed body; sometimes wrong."""
    how = draw(st.integers(0, 19))
    length = f"Content-Length: {len(body)}"
    size = draw(st.integers(1, max(1, len(body))))
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    if how < 12:
        return [length], body
    if how < 15:
        return ["Transfer-Encoding: chunked"], chunked
    wrong = draw(st.sampled_from((-5, 1, 30, 500)))
    return draw(
        st.sampled_from((
            ([length, "Transfer-Encoding: chunked"], chunked),
            ([f"Content-Length: {max(0, len(body) + wrong)}"], body),
            (["Transfer-Encoding: chunked"], chunked.replace(b"\r\n", b"\n")),
            ([length, length], body),
            ([], body),
            (["Content-Length: \u0661"], body),
            (["Transfer-Encoding: chunked, chunked"], chunked),
        ))
    )  # fmt: skip


@st.composite
def whole_requests(draw: st.DrawFn) -> bytes:
    """A request, byte for byte."""
    path, plain = draw(routed)
    framing, body = draw(framed(plain))
    if not path or draw(st.integers(0, 3)) == 0:
        path = draw(paths)
    headers = [f"{name}: {value}" for name, value in draw(st.lists(st.tuples(header_names, header_values), max_size=4))]
    version = draw(st.sampled_from(("HTTP/1.1",) * 9 + ("HTTP/1.0", "HTTP/2", "")))
    host = draw(st.sampled_from(([],) + (["Host: x"],) * 9))
    lines = [f"{draw(methods)} {path} {version}", *host, *draw(st.permutations([*framing, *headers]))]
    end = draw(st.sampled_from(("\r\n",) * 19 + ("\n",)))
    head: bytes = end.join([*lines, "", ""]).encode("utf-8", "surrogatepass")
    return head + body


requests = st.one_of(
    *[whole_requests()] * 7,
    st.lists(whole_requests(), min_size=2, max_size=3).map(b"".join),
    st.binary(max_size=300).map(lambda noise: noise + b"\r\n\r\n\r\n\r\n"),
)

# -- invariants -------------------------------------------------------------------------------------------------------


@define
class Fuzzed:
    """A sandbox to be fuzzed, and what was observed."""

    sandbox: Sandbox
    failures: list[str] = Factory(list)
    tokens: int = 0
    refusals: int = 0
    answers: int = 0

    async def try_out(self, payload: bytes) -> None:
        seen = len(self.sandbox.upstream.seen)
        # The sentinels end every example: a body shorter than its Content-Length swallows some of them.
        for answer in await exchange(self.sandbox.url, payload + SENTINEL * 20, ANSWERED_WITHIN):
            self.answers += 1
            assert answer.code not in (500, 502, 503, 504), answer
            assert not answer.all("x-injected")
            self._judge(answer)
        for asked in list(self.sandbox.upstream.seen)[seen:]:
            names = [name.lower() for name, _ in asked.headers]
            assert names.count("host") == 1
            assert names.count("content-length") <= 1
            assert "transfer-encoding" not in names
            assert "x-injected" not in names
            assert not any(name.startswith("x-matrix") for name in names)
            assert asked.path not in PROXIED
        assert not self.failures, self.failures

    def _judge(self, answer: Response) -> None:
        """Whether the answers agree with the policy of the room for which upstream issued a token."""
        content = json.loads(answer.body) if answer.body.startswith(b"{") else {}
        self.refusals += answer.code == 403
        if "jwt" not in content:
            return
        self.tokens += 1
        claims = read_unverified(content["jwt"])
        assert claims is not None
        alias, identity = claims["video"]["room"], claims["sub"]
        issued = next(i for i in reversed(self.sandbox.upstream.issued) if (i.alias, i.identity) == (alias, identity))
        sources = claims["video"].get("canPublishSources")
        if issued.room == FULL:
            assert issued.user == HOLDER, f"{issued.user} was let into the full room"
        if issued.room == NO_CAMERA:
            assert sources == ["microphone", "screen_share", "screen_share_audio"]
        else:
            assert sources is None
        assert issued.room != UNKNOWN, f"{issued.user} was given a token for a room they are not in"
        assert claims["exp"] <= reactor.seconds() + 121


async def set_up() -> Fuzzed:
    sandbox = Sandbox(reactor, guard_reconcile_interval=3600, guard_seat_ttl=3600, guard_policy_ttl=3600)
    await sandbox.start()
    sandbox.upstream.hs_token = None
    for user, token in OPENID.items():
        sandbox.homeserver.add_user(user[1:].partition(":")[0])
        sandbox.homeserver.openid[token] = (user, reactor.seconds() + 86400)
    for room_id, kind, content in (
        (OPEN, "m.room.topic", {}),
        (FULL, "io.lotus.voice_limit", {"max_users": 1}),
        (NO_CAMERA, "io.lotus.room_quality", {"allow_camera": False}),
    ):
        sandbox.homeserver.create_room(room_id=room_id, joined=OPENID)
        sandbox.homeserver.set_state(room_id, kind, content)
    await sandbox.enter(HOLDER, FULL)
    assert sandbox.livekit.rooms[room_alias(FULL)].participants
    return Fuzzed(sandbox)


@pytest_twisted.async_yield_fixture
async def fuzzed() -> AsyncIterator[Fuzzed]:
    made = await set_up()

    def watch(event: dict[str, Any]) -> None:
        if "log_failure" in event:
            made.failures.append(event["log_failure"].getTraceback())

    globalLogPublisher.addObserver(watch)  # type: ignore[arg-type]
    yield made
    globalLogPublisher.removeObserver(watch)  # type: ignore[arg-type]
    await made.sandbox.stop()


def tried(fuzzed: Fuzzed, payload: bytes) -> None:
    """Try one example, from the thread that hypothesis runs in."""
    call: Any = blockingCallFromThread
    call(reactor, lambda: Deferred.fromCoroutine(fuzzed.try_out(payload)))


@pytest_twisted.ensureDeferred
async def test_no_request_causes_an_error_hangs_or_bypasses_its_rooms_policy(fuzzed: Fuzzed) -> None:
    @FUZZED
    @given(requests)
    def fuzz(payload: bytes) -> None:
        tried(fuzzed, payload)

    await deferToThread(fuzz)
    # Otherwise the examples prove nothing: there must have been tokens, and refusals.
    assert fuzzed.answers > EXAMPLES / 2
    assert fuzzed.tokens > EXAMPLES / 200
    assert fuzzed.refusals or EXAMPLES < 1000


@pytest_twisted.ensureDeferred
async def test_no_body_bypasses_the_policy_of_the_room_that_upstream_reads(fuzzed: Fuzzed) -> None:
    """The same with well-formed requests, so that every example reaches the parser."""

    @FUZZED
    @given(token_requests())
    def fuzz(asked: tuple[str, bytes]) -> None:
        path, body = asked
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        tried(fuzzed, head.encode() + body)

    await deferToThread(fuzz)
    assert fuzzed.tokens > EXAMPLES / 20
    assert fuzzed.refusals or EXAMPLES < 1000
    assert (await fuzzed.sandbox.ask_token(BOB, FULL)).code == 403
