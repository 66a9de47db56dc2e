# SPDX-License-Identifier: Apache-2.0
"""Headers and bodies in both directions: forwarded unchanged, or dropped as hop-by-hop; and header injection."""

from __future__ import annotations

import gzip
import json

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred, gatherResults

from lotusguard.rules.jwt import read_unverified
from lotusguard.sandbox.demo.sandbox import Sandbox
from lotusguard.sandbox.faults import Fault
from tests.calls import crashes, logged, named
from tests.conftest import StartSandbox, until
from tests.raw_http import Response, connect, exchange, recorder

CLOSE = b"Connection: close"
TOKEN_BODY = b'{"room":"!r:sandbox.local","openid_token":{"access_token":"t","matrix_server_name":"s"}}'
HOP_BY_HOP = (
    b"Keep-Alive: timeout=5",
    b"Proxy-Authenticate: Basic",
    b"Proxy-Authorization: Basic eDp5",
    b"Proxy-Connection: keep-alive",
    b"TE: trailers",
    b"Trailer: X-Late",
    b"Upgrade: websocket",
)


def request(*headers: bytes, method: bytes = b"GET", target: bytes = b"/other", body: bytes | None = None) -> bytes:
    framing = [] if body is None else [b"Content-Length: %d" % len(body)]
    lines = [b"%s %s HTTP/1.1" % (method, target), b"Host: x", *framing, *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + (body or b"")


def header(sent: bytes, name: bytes) -> list[bytes]:
    """The values of a header as bytes on the wire."""
    lines = sent.partition(b"\r\n\r\n")[0].split(b"\r\n")[1:]
    pairs = [line.split(b":", 1) for line in lines]
    return [value.strip() for key, value in pairs if key.lower() == name]


async def one(url: str, payload: bytes) -> Response:
    (answer,) = await exchange(url, payload)
    return answer


# -- from callers to upstream ------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_hop_by_hop_headers_are_not_forwarded(start_sandbox: StartSandbox) -> None:
    async with recorder() as upstream:
        sandbox = await start_sandbox(guard_upstream=upstream.url, guard_reconcile_interval=3600)
        for target, method, body in ((b"/other", b"GET", None), (b"/sfu/get", b"POST", TOKEN_BODY)):
            sent = request(
                b"Connection: close, X-Secret-Hop ,x-other-hop",
                b"Connection: X-Third-Hop",
                b"X-Secret-Hop: 1", b"X-Other-Hop: 1", b"X-Third-Hop: 1", b"X-End-To-End: 1", *HOP_BY_HOP,
                method=method, target=target, body=body,
            )  # fmt: skip
            await one(sandbox.url, sent)
            seen = upstream.requests[-1]
            for gone in (
                b"x-secret-hop",
                b"x-other-hop",
                b"x-third-hop",
                *(h.split(b":")[0].lower() for h in HOP_BY_HOP),
            ):
                assert header(seen, gone) == [], gone
            assert header(seen, b"x-end-to-end") == [b"1"]
            assert set(header(seen, b"connection")) <= {b"keep-alive"}


@pytest_twisted.ensureDeferred
async def test_connection_header_cannot_remove_what_the_guard_sets(start_sandbox: StartSandbox) -> None:
    """``Connection: content-length`` must not leave the forwarded request without a length."""
    async with recorder() as upstream:
        sandbox = await start_sandbox(guard_upstream=upstream.url, guard_reconcile_interval=3600)
        named = b"Connection: close, content-length, host, x-forwarded-for, x-request-id, transfer-encoding"
        await one(sandbox.url, request(named, method=b"POST", target=b"/sfu/get", body=TOKEN_BODY))
        (seen,) = upstream.requests
        assert header(seen, b"content-length") == [b"%d" % len(seen.partition(b"\r\n\r\n")[2])]
        assert len(header(seen, b"host")) == 1
        assert header(seen, b"x-forwarded-for") == [b"127.0.0.1"]
        assert len(header(seen, b"x-request-id")) == 1
        assert upstream.unverifiable == b""


@pytest_twisted.ensureDeferred
async def test_peer_is_appended_to_x_forwarded_for(start_sandbox: StartSandbox) -> None:
    async with recorder() as upstream:
        sandbox = await start_sandbox(guard_upstream=upstream.url, guard_reconcile_interval=3600)
        for given, wanted in (
            ((), b"127.0.0.1"),
            ((b"X-Forwarded-For: 192.0.2.1",), b"192.0.2.1, 127.0.0.1"),
            (
                (b"X-Forwarded-For: 192.0.2.1, 2001:db8::1", b"X-Forwarded-For: y"),
                b"192.0.2.1, 2001:db8::1, y, 127.0.0.1",
            ),
        ):
            await one(sandbox.url, request(CLOSE, *given))
            assert header(upstream.requests[-1], b"x-forwarded-for") == [wanted]


@pytest_twisted.ensureDeferred
async def test_plain_request_id_is_kept_and_any_other_replaced(start_sandbox: StartSandbox) -> None:
    async with recorder() as upstream:
        sandbox = await start_sandbox(guard_upstream=upstream.url, guard_reconcile_interval=3600)
        ids = set()
        for given in ((b"X-Request-ID: a/b-1",), (), (b"X-Request-ID: <script>",), (b"X-Request-ID: " + b"a" * 200,),
                      (b"X-Request-ID: a", b"X-Request-ID: b"), (b"X-Request-ID: {secret}",)):  # fmt: skip
            await one(sandbox.url, request(CLOSE, *given))
            (got,) = header(upstream.requests[-1], b"x-request-id")
            ids.add(got)
        assert b"a/b-1" in ids
        assert len(ids) == 6
        assert all(len(got) == 32 and got.isalnum() for got in ids - {b"a/b-1"})


@pytest.mark.parametrize(
    "target",
    [b"/other", b"/other?", b"/other?a=%2F;b&&c=%00", b"/other?a?b=\xc3\xa4"[:11], b"/%7Euser/%2f?x=/../", b"/;a"],
)
@pytest_twisted.ensureDeferred
async def test_target_is_forwarded_byte_for_byte(start_sandbox: StartSandbox, target: bytes) -> None:
    async with recorder() as upstream:
        sandbox = await start_sandbox(guard_upstream=upstream.url, guard_reconcile_interval=3600)
        await one(sandbox.url, request(CLOSE, target=target))
        assert upstream.requests[0].startswith(b"GET " + target + b" HTTP/1.1\r\n")


@pytest_twisted.ensureDeferred
async def test_any_method_is_forwarded_with_its_body_unchanged(start_sandbox: StartSandbox) -> None:
    bodies = (None, b"", b"x" * 100_000, bytes(range(256)))
    async with recorder() as upstream:
        sandbox = await start_sandbox(guard_upstream=upstream.url, guard_reconcile_interval=3600)
        for method in (b"GET", b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"REPORT", b"POST"):
            for body in bodies if method != b"HEAD" else bodies[:1]:
                await one(sandbox.url, request(CLOSE, method=method, body=body))
                seen = upstream.requests[-1]
                assert seen.startswith(method + b" /other HTTP/1.1\r\n")
                assert seen.partition(b"\r\n\r\n")[2] == (body or b"")
                wanted = [b"%d" % len(body)] if body else [[], [b"0"]][body is not None or method in (b"POST", b"PUT")]
                assert header(seen, b"content-length") == wanted, (method, body)
        form = b'--x\r\nContent-Disposition: form-data; name="a'
        await one(
            sandbox.url, request(CLOSE, b"Content-Type: multipart/form-data; boundary=x", method=b"POST", body=form)
        )
        assert upstream.requests[-1].endswith(b"\r\n\r\n" + form)


@pytest_twisted.ensureDeferred
async def test_chunked_body_is_forwarded_with_a_length(start_sandbox: StartSandbox) -> None:
    async with recorder() as upstream:
        sandbox = await start_sandbox(guard_upstream=upstream.url, guard_reconcile_interval=3600)
        chunked = b"5\r\nhello\r\n1\r\n \r\n5\r\nworld\r\n0\r\n\r\n"
        await one(sandbox.url, request(CLOSE, b"Transfer-Encoding: chunked", method=b"PUT") + chunked)
        (seen,) = upstream.requests
        assert header(seen, b"content-length") == [b"11"]
        assert seen.endswith(b"\r\n\r\nhello world")


@pytest_twisted.ensureDeferred
async def test_other_methods_on_token_routes_are_answered_by_upstream(sandbox: Sandbox) -> None:
    for method, code in (("OPTIONS", 200), ("GET", 405), ("HEAD", 405), ("PUT", 405)):
        answer = await sandbox.request(method, sandbox.url + "/sfu/get", b"not json" if method == "PUT" else None)
        assert (method, answer.code, answer.body) == (method, code, b"")
        assert answer.headers.getRawHeaders("access-control-allow-origin") == ["*"]
        assert sandbox.upstream.seen[-1].method == method


# -- from upstream to callers ------------------------------------------------------------------------------


async def answered(start_sandbox: StartSandbox, raw: bytes, payload: bytes) -> list[Response]:
    """What a caller receives when upstream answers with these bytes."""
    async with recorder(raw) as upstream:
        sandbox = await start_sandbox(guard_upstream=upstream.url, guard_reconcile_interval=3600)
        return await exchange(sandbox.url, payload)


POST_TOKEN = request(CLOSE, method=b"POST", target=b"/sfu/get", body=TOKEN_BODY)
BOTH = pytest.mark.parametrize("payload", [request(CLOSE), POST_TOKEN], ids=["relay", "token route"])


@BOTH
@pytest_twisted.ensureDeferred
async def test_upstreams_end_to_end_headers_reach_the_caller(start_sandbox: StartSandbox, payload: bytes) -> None:
    raw = (
        b"HTTP/1.1 418 I am a teapot\r\nContent-Length: 3\r\nX-A: 1\r\nX-A: 2\r\nServer: up\r\nDate: then\r\n"
        b"Set-Cookie: a=1; Path=/\r\nSet-Cookie: b=2\r\nContent-Type: x/y\r\n"
        b"Connection: keep-alive\r\nKeep-Alive: 1\r\nProxy-Authenticate: x\r\nUpgrade: h2c\r\n\r\nabc"
    )
    (answer,) = await answered(start_sandbox, raw, payload)
    assert (answer.code, answer.body) == (418, b"abc")
    for name, values in (
        ("x-a", ["1", "2"]),
        ("server", ["up"]),
        ("date", ["then"]),
        ("set-cookie", ["a=1; Path=/", "b=2"]),
        ("content-type", ["x/y"]),
        ("content-length", ["3"]),
        ("connection", ["close"]),
        *((gone, []) for gone in ("keep-alive", "proxy-authenticate", "upgrade", "transfer-encoding")),
    ):
        assert (name, answer.all(name)) == (name, values)


MALFORMED = {
    "bare CR": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-A: b\rSet-Cookie: evil=1\r\n\r\nok",
    "folded": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-A: b\r\n Set-Cookie: evil=1\r\n\r\nok",
    "bare LF": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-A: b\nSet-Cookie: evil=1\r\n\r\nok",
    "CR in the phrase": b"HTTP/1.1 200 O\rSet-Cookie: evil=1\r\nContent-Length: 2\r\n\r\nok",
    "NUL": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-A: b\x00c\r\n\r\nok",
    "space in a name": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX A: b\r\n\r\nok",
    "no colon": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-A\r\n\r\nok",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok",
    "length and coding": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\nok",
    "no status": b"HTTP/1.1 abc OK\r\nContent-Length: 2\r\n\r\nok",
    "no HTTP": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
    "long header": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-A: " + b"a" * 70_000 + b"\r\n\r\nok",
}
"""Answers that somebody may read in another way than we do, or that nobody can read."""
BAD_CHUNK = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nok\r\n0\r\n\r\n"


@BOTH
@pytest.mark.parametrize("raw", MALFORMED.values(), ids=MALFORMED)
@pytest_twisted.ensureDeferred
async def test_unparsable_answer_becomes_502(start_sandbox: StartSandbox, raw: bytes, payload: bytes) -> None:
    (answer,) = await injected(start_sandbox, raw, payload)
    assert (answer.code, answer.json()["errcode"]) == (502, "M_UNKNOWN")
    assert answer.all("access-control-allow-origin") == []
    assert answer.all("set-cookie") == []


@BOTH
@pytest_twisted.ensureDeferred
async def test_broken_body_becomes_502(start_sandbox: StartSandbox, payload: bytes) -> None:
    (answer,) = await injected(start_sandbox, BAD_CHUNK, payload)
    assert answer.code == 502


async def injected(start_sandbox: StartSandbox, raw: bytes, payload: bytes) -> list[Response]:
    """Answers to a caller whose connection may be dropped in the middle of a malformed answer."""
    async with recorder(raw) as upstream:
        sandbox = await start_sandbox(
            guard_upstream=upstream.url, guard_reconcile_interval=3600, guard_upstream_timeout=2
        )
        caller = await connect(sandbox.url)
        caller.send(payload)
        await caller.closed
        assert b"\nSet-Cookie" not in caller.received
        assert b"\rSet-Cookie" not in caller.received
        return caller.responses()


@pytest.mark.parametrize("value", [b"a%0d%0aSet-Cookie:%20evil=1", b"%E5%98%8A%E5%98%8DSet-Cookie:evil"])
@pytest_twisted.ensureDeferred
async def test_line_breaks_in_reflected_values_stay_encoded(sandbox: Sandbox, value: bytes) -> None:
    """Upstream reflects paths in its redirects; the guard reflects request IDs."""
    payload = request(CLOSE, b"X-Request-ID: a%0d%0ab", target=b"//x/" + value)
    (answer,) = await exchange(sandbox.url, payload)
    assert answer.code == 307
    assert answer.all("set-cookie") == []
    assert "Set-Cookie" in answer.all("location")[0]


@pytest_twisted.ensureDeferred
async def test_cookies_of_one_caller_never_reach_another(start_sandbox: StartSandbox) -> None:
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nSet-Cookie: session=alices\r\n\r\nok"
    async with recorder(raw) as upstream:
        sandbox = await start_sandbox(guard_upstream=upstream.url, guard_reconcile_interval=3600)
        for target, method, body in ((b"/other", b"GET", None), (b"/sfu/get", b"POST", TOKEN_BODY)):
            for connection in upstream.connections:
                connection.requests.clear()
            cookies = [(b"Cookie: who=%d" % n,) if n % 2 else () for n in range(6)]
            payloads = [request(CLOSE, *cookie, method=method, target=target, body=body) for cookie in cookies]
            for again in range(2):  # the second time on connections that have carried others' answers
                await gatherResults([Deferred.fromCoroutine(exchange(sandbox.url, payload)) for payload in payloads])
                seen = [header(sent, b"cookie") for sent in upstream.requests]
                wanted = sorted([[b"who=1"], [b"who=3"], [b"who=5"], [], [], []] * (again + 1))
                assert sorted(seen) == wanted


@BOTH
@pytest_twisted.ensureDeferred
async def test_redirect_is_relayed_and_not_followed(start_sandbox: StartSandbox, payload: bytes) -> None:
    async with recorder() as elsewhere:
        location = f"{elsewhere.url}/x?a=1".encode()
        raw = b"HTTP/1.1 307 Temporary Redirect\r\nLocation: " + location + b"\r\nContent-Length: 0\r\n\r\n"
        (answer,) = await answered(start_sandbox, raw, payload)
        assert (answer.code, answer.all("location")) == (307, [location.decode()])
        assert elsewhere.connections == []


@pytest_twisted.ensureDeferred
async def test_redirect_of_a_dependency_is_not_followed_with_our_credentials(sandbox: Sandbox) -> None:
    async with recorder() as elsewhere:
        sandbox.homeserver.fault = Fault.redirect(f"{elsewhere.url}/steal")
        sandbox.livekit.fault = Fault.redirect(f"{elsewhere.url}/steal", code=307)
        room_id = sandbox.homeserver.create_room(joined=["alice"])
        assert (
            await sandbox.ask_token("@alice:sandbox.local", room_id)
        ).code == 401  # upstream does not follow them either
        assert (await sandbox.operator("GET", "/readyz")).code == 503
        assert elsewhere.connections == []


@pytest_twisted.ensureDeferred
async def test_compressed_answer_is_relayed_unchanged(start_sandbox: StartSandbox) -> None:
    packed = gzip.compress(b"hello " * 1000, mtime=0)
    raw = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed) + packed
    async with recorder(raw) as upstream:
        sandbox = await start_sandbox(guard_upstream=upstream.url, guard_reconcile_interval=3600)
        answer = await one(sandbox.url, request(CLOSE, b"Accept-Encoding: gzip, br"))
        assert (answer.body, answer.all("content-encoding")) == (packed, ["gzip"])
        assert header(upstream.requests[0], b"accept-encoding") == [b"gzip, br"]
        await one(
            sandbox.url, request(CLOSE, b"Accept-Encoding: gzip", method=b"POST", target=b"/sfu/get", body=TOKEN_BODY)
        )
        assert header(upstream.requests[1], b"accept-encoding") == [
            b"identity"
        ]  # otherwise upstream could send a token that the guard cannot read


@pytest_twisted.ensureDeferred
async def test_answers_without_a_body_have_none(start_sandbox: StartSandbox) -> None:
    for raw, method in (
        (b"HTTP/1.1 204 No Content\r\n\r\n", b"GET"),
        (b"HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n", b"GET"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n", b"HEAD"),
    ):
        (answer,) = await answered(start_sandbox, raw, request(CLOSE, method=method))
        assert (answer.code, answer.body) == (int(raw[9:12]), b"")
        assert answer.all("transfer-encoding") == []


@pytest_twisted.ensureDeferred
async def test_caller_can_tell_that_an_answer_was_truncated(start_sandbox: StartSandbox) -> None:
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf"
    async with recorder(raw) as upstream:
        sandbox = await start_sandbox(guard_upstream=upstream.url, guard_reconcile_interval=3600)
        caller = await connect(sandbox.url)
        caller.send(request())
        await until(lambda: caller.received.endswith(b"half"))
        upstream.connections[0].transport.abortConnection()  # type: ignore[union-attr]
        await caller.closed
        assert b"Content-Length: 100\r\n" in caller.received


@pytest.mark.parametrize("first", ["caller", "upstream"])
@pytest_twisted.ensureDeferred
async def test_truncated_answer_is_not_logged_as_an_error(start_sandbox: StartSandbox, first: str) -> None:
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf"
    async with recorder(raw) as upstream:
        sandbox = await start_sandbox(guard_upstream=upstream.url, guard_reconcile_interval=3600)
        with logged() as events:
            caller = await connect(sandbox.url)
            caller.send(request())
            await until(lambda: caller.received.endswith(b"half"))
            both = [caller.drop, upstream.connections[0].transport.abortConnection]  # type: ignore[union-attr]
            for hang_up in both if first == "caller" else reversed(both):
                hang_up()
            await caller.closed
            await sandbox.operator("GET", "/healthz")  # by then the guard has noticed both
    assert crashes(events) == []


@pytest_twisted.ensureDeferred
async def test_answer_for_a_caller_who_disconnected_reaches_nobody_else(start_sandbox: StartSandbox) -> None:
    """A caller disconnects; the next one, on a new connection, gets the answer to their own request."""
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_tokens="policy")
    sandbox.upstream.faults["sfu_get"] = Fault.delay(0.05, times=1)
    leaving = await connect(sandbox.url)
    leaving.send(request(method=b"POST", target=b"/sfu/get", body=TOKEN_BODY))
    leaving.drop()
    room_id = sandbox.homeserver.create_room(joined=["alice"])
    sandbox.homeserver.add_user("alice")
    answer = await sandbox.ask_token("@alice:sandbox.local", room_id)
    assert answer.code == 200
    issued, given = (
        read_unverified(token) for token in (sandbox.upstream.issued[-1].token, json.loads(answer.body)["jwt"])
    )
    assert issued is not None
    assert given is not None
    assert (given["sub"], given["video"]["room"]) == (issued["sub"], issued["video"]["room"])
    assert given["sub"].startswith("@alice:")


# -- loops -------------------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_forwarded_requests_name_the_guard_in_via(start_sandbox: StartSandbox) -> None:
    async with recorder() as upstream:
        sandbox = await start_sandbox(guard_upstream=upstream.url, guard_reconcile_interval=3600)
        for target, method, body in ((b"/other", b"GET", None), (b"/sfu/get", b"POST", TOKEN_BODY)):
            for given, wanted in (
                ((), b"1.1 lotusguard"),
                ((b"Via: 1.0 fred, 1.1 p.example (lotusguard)",),
                 b"1.0 fred, 1.1 p.example (lotusguard), 1.1 lotusguard"),
            ):  # fmt: skip
                await one(sandbox.url, request(CLOSE, *given, method=method, target=target, body=body))
                assert header(upstream.requests[-1], b"via") == [wanted]


@pytest_twisted.ensureDeferred
async def test_request_forwarded_by_a_guard_is_refused_at_once(sandbox: Sandbox) -> None:
    via = b"Via: 1.1 proxy, 1.1 lotusguard"
    with logged() as events:
        for target, method, body in (
            (b"/other", b"GET", None), (b"/sfu/get", b"POST", TOKEN_BODY), (b"/sfu_webhook", b"POST", b"{}"),
            (b"/sfu/get", b"OPTIONS", None),
        ):  # fmt: skip
            answer = await one(sandbox.url, request(CLOSE, via, method=method, target=target, body=body))
            assert (answer.code, answer.json()["errcode"]) == (502, "M_UNKNOWN")
            assert answer.all("access-control-allow-origin") == []
            assert answer.all("via") == ["1.1 lotusguard"]
    assert list(sandbox.upstream.seen) == []
    (line,) = named(events, "loop")
    assert "GUARD_UPSTREAM" in line


@pytest_twisted.ensureDeferred
async def test_forwarding_loop_is_answered_once_and_the_guard_is_not_ready(
    start_sandbox: StartSandbox,
) -> None:
    first = await start_sandbox(guard_reconcile_interval=3600)
    second = await start_sandbox(guard_reconcile_interval=3600, guard_upstream=first.url)
    answer = await second.request("POST", second.url + "/sfu/get", TOKEN_BODY)
    assert answer.code == 502
    assert list(first.upstream.seen) == []
    report = json.loads((await second.operator("GET", "/readyz")).body)
    assert report["dependencies"]["upstream"]["error"] == "loop"
    assert json.loads((await first.operator("GET", "/readyz")).body)["dependencies"]["upstream"]["error"] is None
