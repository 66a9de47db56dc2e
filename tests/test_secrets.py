# SPDX-License-Identifier: Apache-2.0
"""Secrets appear nowhere: not in logs of any level, answers, metrics, reprs or messages about wrong settings.

A caller cannot make the guard contact any host but its configured dependencies.
"""

from __future__ import annotations

import hmac
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.logger import ILogObserver, globalLogPublisher

from lotusguard.config import ConfigurationError, Settings, read_settings, suspicions
from lotusguard.logs import observer_for
from lotusguard.rules.jwt import SfuKey
from lotusguard.rules.requests import OpenID
from lotusguard.sandbox.demo.sandbox import ADMIN_TOKEN, KEY, SECRET, SERVER_NAME, Sandbox
from lotusguard.sandbox.faults import Fault
from tests.calls import ALICE, BOB, room_of
from tests.conftest import StartSandbox
from tests.raw_http import exchange, recorder

BAD_OPENID, BAD_JWT = "an-openid-token-of-nobody", "eyJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJ4In0.bm9ib2R5cy1zaWduYXR1cmU"
OPERATORS_BAD_TOKEN = "a-wrong-token-of-an-operator"


@contextmanager
def logged(format_: str) -> Iterator[io.StringIO]:
    """Everything that is logged in the ``with`` block, at the lowest level."""
    stream = io.StringIO()
    observer: ILogObserver = observer_for(format_, "debug", stream)
    globalLogPublisher.addObserver(observer)
    try:
        yield stream
    finally:
        globalLogPublisher.removeObserver(observer)


async def every_failure(sandbox: Sandbox) -> list[str]:
    """Joins, refusals, forgeries, failures of every dependency. :return: all answers that contain no token."""
    answers = []
    room_id = room_of(sandbox, 1, allow_camera=False)

    async def say(method: str, url: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> None:
        answer = await sandbox.request(method, url, body, headers)
        if b'"jwt"' not in answer.body:
            answers.append(f"{answer.headers!r} {answer.body!r}")

    alice = await sandbox.enter(ALICE, room_id)
    for new in (False, True):
        answers.append(repr(await sandbox.ask_token(BOB, room_id, new=new)))
    openid = {"access_token": BAD_OPENID, "token_type": "Bearer", "matrix_server_name": SERVER_NAME, "expires_in": 9}
    bad: dict[str, Any] = {"room": room_id, "device_id": "D", "openid_token": openid}
    for body in (
        bad, bad | {"room": 7}, bad | {"openid_token": [openid]}, bad | {"openid_token": openid | {"ACCESS_TOKEN": "x"}}
    ):  # fmt: skip
        await say("POST", f"{sandbox.url}/sfu/get?access_token={BAD_OPENID}", json.dumps(body).encode())
    for forged in (BAD_JWT, sandbox.livekit.webhooks.authorization(b"{}"), ""):
        await say("POST", sandbox.url + "/sfu_webhook", b'{"event":"room_started","id":"x"}', {"Authorization": forged})
    for fault in (Fault.status(500), Fault.invalid_response(), Fault.truncated(), Fault.close(), Fault.wrong_types()):
        sandbox.livekit.fault = sandbox.homeserver.fault = fault
        await sandbox.ask_token(BOB, room_id)
        for _ in range(5):
            await say("GET", sandbox.admin_url + "/readyz")
        sandbox.livekit.fault = sandbox.homeserver.fault = None
        sandbox.upstream.fault = fault
        await say("POST", sandbox.url + "/sfu/get", json.dumps(bad).encode())
        sandbox.upstream.fault = None
    sandbox.upstream.secret, sandbox.upstream.full_access = "another-secret-than-the-guards-own", []
    await sandbox.ask_token(ALICE, room_id)
    sandbox.upstream.secret, sandbox.upstream.full_access = SECRET, ["*"]
    for path in ("/rooms", "/metrics", "/readyz", "/healthz", "/nothing"):
        answers.append((await sandbox.operator("GET", path)).body.decode())
        await say("GET", sandbox.admin_url + path, None, {"Authorization": f"Bearer {OPERATORS_BAD_TOKEN}"})
    for crooked in (b"GET /x?access_token=" + BAD_OPENID.encode() + b"\0 HTTP/1.1\r\n\r\n", b"G\r\n\r\n"):
        await exchange(sandbox.url, crooked)
    sandbox.livekit.disconnect(alice.room.name, alice.identity)
    await sandbox.livekit.drained()
    return answers


def secrets_of(sandbox: Sandbox) -> dict[str, str]:
    """Secrets that must not appear anywhere, by name. The API key is not secret: it is the ``iss`` of every token."""
    found = {
        "the LiveKit secret": SECRET,
        "the admin's access token": sandbox.admin_token,
        "the operators' token": ADMIN_TOKEN,
        "a bad OpenID token": BAD_OPENID,
        "a bad JWT": BAD_JWT,
        "a wrong token of an operator": OPERATORS_BAD_TOKEN,
    }
    found |= {f"OpenID token {n}": token for n, token in enumerate(sandbox.homeserver.openid)}
    found |= {f"issued JWT {n}": issued.token for n, issued in enumerate(sandbox.upstream.issued)}
    found |= {f"the signature of JWT {n}": i.token.split(".")[2] for n, i in enumerate(sandbox.upstream.issued)}
    for standin in (sandbox.livekit, sandbox.homeserver):
        for n, asked in enumerate(standin.seen):
            found[f"what we showed {standin.url} {n}"] = (asked.header("Authorization") or "").removeprefix("Bearer ")
    found |= {f"turn_password {name}": r.settings.turn_password for name, r in sandbox.livekit.rooms.items()}
    return {name: secret for name, secret in found.items() if secret}


def nothing_of(secrets: dict[str, str], text: str) -> None:
    assert [name for name, secret in secrets.items() if secret in text] == []


@pytest.mark.parametrize("format_", ["text", "json"])
@pytest_twisted.ensureDeferred
async def test_logs_and_answers_contain_no_secret_when_everything_fails(
    start_sandbox: StartSandbox, format_: str
) -> None:
    with logged(format_) as log:
        sandbox = await start_sandbox(guard_log_level="debug", guard_reconcile_interval=0.2)
        answers = await every_failure(sandbox)
        await sandbox.guard.stopService()
        secrets = secrets_of(sandbox)
    text = log.getvalue()
    for event in ("refused", "ignored a webhook", "not enforced", "unreadable", "did not sign", "is not called"):
        assert event in text, f"the scenario caused no {event!r}"
    assert len(secrets) > 20
    nothing_of(secrets, text)
    for answer in answers:
        nothing_of(secrets, answer)
    if format_ == "json":
        for line in text.splitlines():
            json.loads(line)


@pytest_twisted.ensureDeferred
async def test_no_repr_contains_a_secret(sandbox: Sandbox) -> None:
    await every_failure(sandbox)
    secrets = secrets_of(sandbox)
    guard = sandbox.guard
    seen: set[int] = set()
    leaking: dict[str, str] = {}

    def look(thing: object, depth: int) -> None:
        if id(thing) in seen or depth > 6:
            return
        seen.add(id(thing))
        if type(thing).__module__.startswith("lotusguard.") and "sandbox" not in type(thing).__module__:
            shown = repr(thing)
            leaking.update({type(thing).__name__: name for name, secret in secrets.items() if secret in shown})
        for inner in vars(thing).values() if hasattr(thing, "__dict__") else ():
            look(inner, depth + 1)

    look(guard, 0)
    assert leaking == {}
    assert len(seen) > 100
    nothing_of(secrets, repr(sandbox.settings) + str(sandbox.settings))
    assert SECRET not in repr(SfuKey(KEY, SECRET))
    assert "hidden" not in repr(OpenID("hidden", "x"))


@pytest.mark.parametrize(
    "name", ["livekit_secret", "matrix_token", "guard_admin_token", "livekit_key_file", "guard_config"]
)
def test_message_about_a_wrong_setting_contains_no_secret(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_text("key: sesame: open" if name == "livekit_key_file" else "livekit_secret: [sesame\n")
    given: dict[str, object] = {name: path if name.endswith("_file") else ["sesame"]}
    if name == "guard_config":
        monkeypatch.setenv("GUARD_CONFIG", str(path))
        given = {}
    with pytest.raises(ConfigurationError) as wrong:
        read_settings(**given)
    assert "sesame" not in str(wrong.value)
    assert name.upper() in str(wrong.value)
    assert wrong.value.__cause__ is None
    assert wrong.value.__suppress_context__


def test_misplaced_secret_in_the_file_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "guard.yaml"
    monkeypatch.setenv("GUARD_CONFIG", str(path))
    for text in (
        "livekit_secret:\n  sesame: 1\n",
        "matrix_tokens: sesame\n",
        "matrix_token: 12\nlivekit_secret: [sesame]\n",
    ):
        path.write_text(text)
        with pytest.raises(ConfigurationError) as wrong:
            read_settings()
        assert "sesame" not in str(wrong.value)


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, False), (0o644, True), (0o602, True)])
def test_secret_files_open_to_others_are_warned_about(tmp_path: Path, mode: int, warned: bool) -> None:
    for name in (
        "livekit_secret_from_file",
        "matrix_token_from_file",
        "guard_admin_token_from_file",
        "livekit_key_file",
    ):
        path = tmp_path / name
        path.write_text("key: secret" if name == "livekit_key_file" else "secret")
        path.chmod(mode)
        said = [text for text in suspicions(read_settings(**{name: path})) if name.upper() in text]
        assert bool(said) is warned, name


@pytest.mark.parametrize("loose", [True, False])
def test_configuration_file_open_to_others_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loose: bool
) -> None:
    path = tmp_path / "guard.yaml"
    path.write_text("matrix_token: secret\n")
    path.chmod(0o644 if loose else 0o640)
    monkeypatch.setenv("GUARD_CONFIG", str(path))
    assert any("GUARD_CONFIG" in text for text in suspicions(read_settings())) is loose


# -- the operators' listener ---------------------------------------------------------------------------------


def test_the_operators_listener_is_on_loopback_by_default() -> None:
    assert Settings().guard_admin_host == "127.0.0.1"


@pytest.mark.parametrize("configured", [ADMIN_TOKEN, ""], ids=["a token", "no token"])
@pytest_twisted.ensureDeferred
async def test_private_routes_require_the_operators_token(start_sandbox: StartSandbox, configured: str) -> None:
    sandbox = await start_sandbox(guard_admin_token=configured, guard_reconcile_interval=3600)
    room_id = room_of(sandbox, 3)
    await sandbox.enter(ALICE, room_id)
    wrong = (
        None, "", "Bearer ", "Bearer", f"Bearer {ADMIN_TOKEN}x", f"Bearer {ADMIN_TOKEN[:-1]}", f"Bearer{ADMIN_TOKEN}",
        ADMIN_TOKEN, f"Basic {ADMIN_TOKEN}", "Bearer \xe4", *([] if configured else [f"Bearer {ADMIN_TOKEN}"]),
    )  # fmt: skip
    for authorization in wrong:
        headers = {} if authorization is None else {"Authorization": authorization}
        for method, path in (("GET", "/rooms"), ("POST", "/policy-changed"), ("GET", "/rooms?x"), ("GET", "/%72ooms")):
            answer = await sandbox.request(
                method, sandbox.admin_url + path, b"{}" if method == "POST" else None, headers
            )
            assert (authorization, path, answer.code) == (authorization, path, 403)
            assert json.loads(answer.body)["errcode"] == "M_FORBIDDEN"
        for path in ("/healthz", "/readyz", "/metrics"):
            answer = await sandbox.request("GET", sandbox.admin_url + path, None, headers)
            assert answer.code == 200
            for private in (ALICE, room_id, "alice"):
                assert private.encode() not in answer.body
    if configured:
        for scheme in ("Bearer", "bearer", "BEARER "):  # RFC 9110 §11.1 and §11.4
            headers = {"Authorization": f"{scheme} {ADMIN_TOKEN}"}
            assert (await sandbox.request("GET", sandbox.admin_url + "/rooms", None, headers)).code == 200


@pytest_twisted.ensureDeferred
async def test_a_repeated_authorization_header_is_refused(sandbox: Sandbox) -> None:
    head = "GET /rooms HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    twice = f"Authorization: Bearer wrong\r\nAuthorization: Bearer {ADMIN_TOKEN}\r\n\r\n"
    (answer,) = await exchange(sandbox.admin_url, (head + twice).encode())
    assert answer.code == 403


@pytest_twisted.ensureDeferred
async def test_tokens_are_compared_in_constant_time(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[object] = []

    def watching(compare: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
        def watched(left: Any, right: Any) -> bool:
            compared.append((left, right))
            return compare(left, right)

        return watched

    monkeypatch.setattr(hmac, "compare_digest", watching(hmac.compare_digest))
    await sandbox.request("GET", sandbox.admin_url + "/rooms", None, {"Authorization": "Bearer wrong"})
    assert (b"wrong", ADMIN_TOKEN.encode()) in compared
    compared.clear()
    body = b'{"event":"room_started","id":"x"}'
    headers = {"Authorization": sandbox.livekit.webhooks.authorization(b"another body")}
    await sandbox.request("POST", sandbox.url + "/sfu_webhook", body, headers)
    assert len(compared) >= 2  # the signature's, and the body's hash


# -- hosts that the guard contacts ------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_caller_cannot_make_the_guard_contact_other_hosts(sandbox: Sandbox) -> None:
    async with recorder() as canary:
        where = canary.url.removeprefix("http://")
        full = room_of(sandbox, 1)
        await sandbox.enter(ALICE, full)
        openid = {"access_token": "x", "token_type": "Bearer", "matrix_server_name": where, "expires_in": 9}
        extra = {"delay_cs_api_url": canary.url, "delay_id": "d", "delay_timeout": 9}
        member = {"id": canary.url, "claimed_user_id": f"@a:{where}", "claimed_device_id": where}
        slot = {"slot_id": "m.call#ROOM"}
        bodies: list[tuple[str, dict[str, Any]]] = [
            ("/sfu/get", {"room": full, "device_id": "D", "openid_token": openid} | extra),
            ("/sfu/get", {"room": f"!x:{where}", "device_id": "D", "openid_token": openid}),
            ("/sfu/get", {"room": f"{canary.url}/x", "device_id": "D", "openid_token": openid}),
            ("/sfu/get", {"room": "../../../x?y#z", "device_id": "D", "openid_token": openid}),
            ("/get_token", {"room_id": full, "openid_token": openid, "member": member} | slot | extra),
            ("/delegate_delayed_leave", {"room_id": full, "openid_token": openid, "member": member} | slot | extra),
            ("/_matrix/client/unstable/io.element.msc4195/rtc/livekit/get_token",
             {"room_id": full, "url": canary.url, "server_name": where, "member_id": "m"} | slot),
        ]  # fmt: skip
        headers = {
            "X-Forwarded-Host": where, "X-Forwarded-Server": where, "X-Original-URL": canary.url, "Host": where,
            "Forwarded": f"host={where}", "Referer": canary.url, "Origin": canary.url, "Location": canary.url,
        }  # fmt: skip
        for path, body in bodies:
            await sandbox.request("POST", sandbox.url + path, json.dumps(body).encode(), headers)
        targets = [canary.url + "/x", f"//{where}/x", f"/\\{where}", f"/x@{where}", f"/.{where}", "*", f"{where}"]
        for target in targets:
            for method in ("GET", "POST", "CONNECT"):
                request = f"{method} {target} HTTP/1.1\r\nHost: {where}\r\nConnection: close\r\n\r\n"
                await exchange(sandbox.url, request.encode())
        note = json.dumps({"room_id": f"!x:{where}"}).encode()
        assert (await sandbox.operator("POST", "/policy-changed", note)).code == 202
        assert canary.connections == []
        # our homeserver was not asked about users of other servers either
        assert all(
            where not in asked.target.decode() for asked in sandbox.homeserver.seen if "openid" in str(asked.target)
        )
        assert sandbox.homeserver.asked["room_state"] > 0
