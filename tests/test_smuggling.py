# SPDX-License-Identifier: Apache-2.0
"""Request smuggling over raw sockets: upstream sees one well-formed request of each attack, or nothing.

A second request follows each attack on the same connection. A parser that computes another length for the attack
would see that request differently, so it must arrive unchanged or not at all.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import pytest_twisted
from attrs import frozen

from lotusguard.sandbox.demo.sandbox import Sandbox
from tests.conftest import StartSandbox
from tests.raw_http import exchange, recorder

AFTER = b"/healthz?after"
BODY = json.dumps(
    {
        "room": "!room:sandbox.local",
        "device_id": "PHONE",
        "openid_token": {"access_token": "nobodys", "matrix_server_name": "sandbox.local"},
    }
).encode()
LENGTH = b"Content-Length: %d" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked"


def post(
    *headers: bytes, target: bytes = b"/sfu/get", body: bytes = BODY, version: bytes = b"1.1", host: bytes = b"Host: x"
) -> bytes:
    """A token request with exactly these headers; a ``Content-Length`` only where one is named."""
    lines = [b"POST %s HTTP/%s" % (target, version), *([host] if host else []), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def chunks(size: bytes = b"%x" % len(BODY), end: bytes = b"0\r\n\r\n") -> bytes:
    return size + b"\r\n" + BODY + b"\r\n" + end


@frozen
class Attack:
    """``code`` is the status of the answer. ``seen`` is the target that upstream saw, if any; ``goes_on`` is
    whether the connection stays open for the next request."""

    payload: bytes
    code: int
    seen: bytes | None = None
    goes_on: bool = False


def refused(payload: bytes) -> Attack:
    """Answered 400, connection closed, nothing forwarded."""
    return Attack(payload, 400)


def read(payload: bytes, target: bytes = b"/sfu/get", code: int = 401) -> Attack:
    """Understood in the only possible way; 401 is upstream's answer to the OpenID token."""
    return Attack(payload, code, target, True)


FRAMING = {
    "one length": read(post(LENGTH)),
    "chunked": read(post(CHUNKED, body=chunks())),
    "chunked in capitals": read(post(b"TRANSFER-ENCODING: CHUNKED", body=chunks())),
    "a length and chunked": refused(post(LENGTH, CHUNKED, body=chunks())),
    "chunked and a length": refused(post(CHUNKED, b"Content-Length: 4", body=chunks())),
    "two lengths, equal": refused(post(LENGTH, LENGTH)),
    "two lengths, not equal": refused(post(LENGTH, b"Content-Length: 0")),
    "a list of lengths": refused(post(b"Content-Length: 5, 5")),
    "a length with a sign": refused(post(b"Content-Length: +5")),
    "a negative length": refused(post(b"Content-Length: -1")),
    "a hexadecimal length": refused(post(b"Content-Length: 0x10")),
    "a length with an underscore": refused(post(b"Content-Length: 1_0")),
    "a length in other digits": refused(post("Content-Length: \u0661".encode())),
    "no length's value": refused(post(b"Content-Length:")),
    "a length of 5,000 digits": refused(post(b"Content-Length: " + b"9" * 5000)),
    "a length with zeros before it": read(post(b"Content-Length: 000%d" % len(BODY))),
    "space before the colon": refused(post(b"Content-Length : %d" % len(BODY))),
    "identity, chunked": refused(post(b"Transfer-Encoding: identity, chunked", body=chunks())),
    "chunked, identity": refused(post(b"Transfer-Encoding: chunked, identity", body=chunks())),
    "chunked twice": refused(post(CHUNKED, CHUNKED, body=chunks())),
    "xchunked": refused(post(b"Transfer-Encoding: xchunked", body=chunks())),
    "a vertical tab before chunked": refused(post(b"Transfer-Encoding: \x0bchunked", body=chunks())),
    "gzip": refused(post(b"Transfer-Encoding: gzip", LENGTH)),
    "a transfer coding in two lines": read(post(b"Transfer-Encoding:\r\n chunked", body=chunks())),
    "a folded line that looks like a length": read(post(LENGTH, b"X-A: b\r\n Content-Length: 3")),
    "a folded line that looks like chunked": read(post(LENGTH, b"X-A: b\r\n\tTransfer-Encoding: chunked")),
    "a folded first line": refused(b"GET /healthz HTTP/1.1\r\n X: y\r\nHost: x\r\n\r\n"),
    "a body that comes with Expect": read(post(LENGTH, b"Expect: 100-continue")),
    "HTTP/1.0 with chunked": Attack(post(CHUNKED, body=chunks(), version=b"1.0"), 401, b"/sfu/get"),
    "two empty lines before": refused(b"\r\n\r\n" + post(LENGTH)),
    "an upgrade to HTTP/2": read(
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n", b"/healthz", 200
    ),
    "HTTP/2's preface": refused(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
}
CHUNKS = {
    name: refused(post(CHUNKED, body=body))
    for name, body in {
        "a sign": chunks(b"+%x" % len(BODY)),
        "0x": chunks(b"0x%x" % len(BODY)),
        "an underscore": chunks(b"6_8"),
        "no digit": chunks(b"zz"),
        "nothing": chunks(b""),
        "negative": chunks(b"-1"),
        "space before it": chunks(b" %x" % len(BODY)),
        "too short": chunks(b"3"),
        "bare LF after it": b"%x\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n",
        "bare LF everywhere": b"%x\n" % len(BODY) + BODY + b"\n0\n\n",
        "bare LF in an extension": chunks(b"%x;a\nb" % len(BODY)),
        "an too_large extension": chunks(b"%x;" % len(BODY) + b"a" * 5000),
    }.items()
} | {
    "an extension": read(post(CHUNKED, body=chunks(b"%x;a=b" % len(BODY)))),
    "a trailer that looks like a length": read(post(CHUNKED, body=chunks(end=b"0\r\nContent-Length: 50\r\n\r\n"))),
    "a trailer that looks like a header": read(post(CHUNKED, body=chunks(end=b"0\r\nX-Forwarded-For: y\r\n\r\n"))),
}
LINES = {
    name: refused(payload)
    for name, payload in {
        "bare LF after every line": post(LENGTH).replace(b"\r\n", b"\n"),
        "bare LF in a header": post(LENGTH, b"X-A: b\nTransfer-Encoding: chunked"),
        "bare CR in a header": post(LENGTH, b"X-A: b\rTransfer-Encoding: chunked"),
        "NUL in a value": post(LENGTH, b"X-A: b\0c"),
        "NUL in a name": post(LENGTH, b"X\0A: b"),
        "NUL in the target": post(LENGTH, target=b"/sfu/get\0"),
        "a space in a name": post(LENGTH, b"X A: b"),
        "no colon": post(LENGTH, b"XA"),
        "no name": post(LENGTH, b": b"),
        "two spaces in the request line": b"GET  /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
        "tabs in the request line": b"GET\t/healthz\tHTTP/1.1\r\nHost: x\r\n\r\n",
        "a method that is none": b"G@T /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
        "HTTP/0.9": b"GET /healthz\r\n",
        "HTTP/1.2": post(LENGTH, version=b"1.2"),
        "HTTP/2.0": post(LENGTH, version=b"2.0"),
        "a target of 20,000 bytes": post(LENGTH, target=b"/" + b"a" * 20_000),
        "a header of 20,000 bytes": post(LENGTH, b"X-A: " + b"a" * 20_000),
        "600 headers": post(LENGTH, *(b"X-%d: a" % n for n in range(600))),
    }.items()
}
NOT_A_PATH = {
    name: Attack(payload, 400, None, True)
    for name, payload in {
        "absolute form": post(LENGTH, target=b"http://evil.example/sfu/get"),
        "absolute form, our own": post(LENGTH, target=b"http://x/sfu/get"),
        "authority form": post(LENGTH, target=b"evil.example:443"),
        "CONNECT": b"CONNECT evil.example:443 HTTP/1.1\r\nHost: x\r\n\r\n",
        "asterisk form": b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
        "a fragment": post(LENGTH, target=b"/sfu/get#x"),
        "a byte outside ASCII": post(LENGTH, target=b"/sfu/get\xa0"),
        "two Hosts": post(LENGTH, b"Host: y"),
        "two Hosts, equal": post(LENGTH, b"Host: x"),
    }.items()
}
PATHS = {
    target.decode(): read(post(LENGTH, target=target), target, code)
    for target, code in {
        b"/sfu/%67et": 401,
        b"/%73%66%75/get": 401,
        b"/sfu/get?room=!other:sandbox.local": 401,
        b"/sfu/get?": 401,
        b"/sfu%2Fget": 404,
        b"/sfu%2fget": 404,
        b"/x/../sfu/get": 307,
        b"/./sfu/get": 307,
        b"/x/%2e%2e/sfu/get": 404,
        b"/x%2f..%2fsfu%2fget": 404,
        b"//sfu//get": 307,
        b"//evil.example/sfu/get": 307,
        b"/sfu/get/": 404,
        b"/sfu/%2567et": 404,
        b"/sfu\\get": 404,
        b"/sfu/get;x": 404,
        b"/SFU/GET": 404,
        b"/sfu/get%00": 404,
        b"/sfu/get%0d%0aX:%20y": 404,
        b"/sfu/%zzget": 400,
        b"/http://evil.example/": 307,
        b"/" + b"a" * 12_000: 404,
    }.items()
}
HOSTS = {
    "HTTP/1.0": Attack(post(LENGTH, version=b"1.0"), 401, b"/sfu/get"),
    "HTTP/1.0 without Host": Attack(post(LENGTH, version=b"1.0", host=b""), 401, b"/sfu/get"),
    "no Host": read(post(LENGTH, host=b"")),
    "an empty Host": read(post(LENGTH, host=b"Host:")),
    "a Host that is none": read(post(LENGTH, host=b"Host: a b/@c")),
    "a Host elsewhere": read(post(LENGTH, host=b"Host: evil.example:1")),
}
TABLES = {
    "framing": FRAMING,
    "chunk sizes": CHUNKS,
    "lines": LINES,
    "targets that are no path": NOT_A_PATH,
    "paths": PATHS,
    "hosts": HOSTS,
}


def followed(attack: Attack) -> bytes:
    return attack.payload + b"GET " + AFTER + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@pytest_twisted.ensureDeferred
async def test_upstream_sees_one_well_formed_request_or_none(sandbox: Sandbox, table: dict[str, Attack]) -> None:
    for name, attack in table.items():
        sandbox.upstream.seen.clear()
        answers = await exchange(sandbox.url, followed(attack))
        assert (name, [answer.code for answer in answers]) == (name, [attack.code] + [200] * attack.goes_on)
        seen = list(sandbox.upstream.seen)
        targets = [attack.seen] if attack.seen is not None else []
        targets += [AFTER] * attack.goes_on
        assert (name, [asked.target for asked in seen]) == (name, targets)
        for asked in seen:
            posted = asked.method == "POST"
            names = [key.lower() for key, _ in asked.headers]
            assert (name, names.count("host"), names.count("content-length")) == (name, 1, int(posted))
            assert "transfer-encoding" not in names
            assert (json.loads(asked.body) if posted else asked.body) == (json.loads(BODY) if posted else b"")


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@pytest_twisted.ensureDeferred
async def test_forwarded_requests_are_well_formed_on_the_wire(
    start_sandbox: StartSandbox, table: dict[str, Attack]
) -> None:
    """The same on the wire, for an upstream that parses differently from the stand-in."""
    async with recorder() as upstream:
        sandbox = await start_sandbox(guard_upstream=upstream.url, guard_reconcile_interval=3600)
        for name, attack in table.items():
            for connection in upstream.connections:
                connection.requests.clear()
            await exchange(sandbox.url, followed(attack))
            targets = [attack.seen] if attack.seen is not None else []
            targets += [AFTER] * attack.goes_on
            assert (name, len(upstream.requests)) == (name, len(targets))
            for request, target in zip(upstream.requests, targets, strict=True):
                well_formed(name, request, target)
            assert upstream.unverifiable == b""


def well_formed(name: str, request: bytes, target: bytes) -> None:
    head, _, body = request.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    assert first in (b"POST %s HTTP/1.1" % target, b"GET %s HTTP/1.1" % target), name
    assert all(re.fullmatch(rb"[!-9;-~]+: ?[\t\x20-\x7e\x80-\xff]*", line) for line in lines), (name, lines)
    names = [line.split(b":")[0].lower() for line in lines]
    posted = first.startswith(b"POST")
    assert (names.count(b"host"), names.count(b"content-length")) == (1, int(posted)), (name, lines)
    assert b"transfer-encoding" not in names
    assert (json.loads(body) if posted else body) == (json.loads(BODY) if posted else b""), name


@pytest_twisted.ensureDeferred
async def test_malformed_requests_log_no_tracebacks(sandbox: Sandbox) -> None:
    """A flood of bad requests must not flood the log."""
    from twisted.logger import globalLogPublisher

    failures: list[Any] = []

    def watch(event: dict[str, Any]) -> None:
        if "log_failure" in event:
            failures.append(event)

    globalLogPublisher.addObserver(watch)  # type: ignore[arg-type]
    try:
        for table in TABLES.values():
            for attack in table.values():
                await exchange(sandbox.url, followed(attack))
    finally:
        globalLogPublisher.removeObserver(watch)  # type: ignore[arg-type]
    assert failures == []
