# SPDX-License-Identifier: Apache-2.0
"""``lotusguard check`` against the stand-ins: every wrong setting is reported, with its remedy."""

from __future__ import annotations

import errno
import io
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor

from lotusguard.check.asking import Asking
from lotusguard.check.everything import check
from lotusguard.check.exposure import ExposureCheck, is_held_by_systemd, listening_addresses
from lotusguard.check.report import Finding, Findings, Report
from lotusguard.clients.http import ConnectionPool
from lotusguard.config import read_settings
from lotusguard.sandbox.demo.sandbox import ADMIN_TOKEN, KEY, SECRET, Sandbox
from lotusguard.sandbox.faults import Fault
from lotusguard.sandbox.lk_jwt_service.service import FakeLkJwtService
from lotusguard.sandbox.synapse.homeserver import FakeSynapse
from lotusguard.terminal import Terminal
from tests.conftest import StartSandbox

OTHER_SECRET = "another-secret-of-the-same-length-1"


async def checked(
    sandbox: Sandbox, *, patience: Any = 20.0, longest: Any = 60.0, ahead: Any = 0.0, **settings: Any
) -> Report:
    """Check with the settings of the sandbox's guard and these changes. :param ahead: seconds our clock is ahead."""
    assert sandbox.guard.public.port is not None
    assert sandbox.guard.admin is not None
    assert sandbox.guard.admin.port is not None
    given = {name: getattr(sandbox.settings, name) for name in sandbox.settings.model_fields_set}
    given["guard_bind_port"] = sandbox.guard.public.port.getHost().port  # type: ignore[attr-defined]
    given["guard_admin_port"] = sandbox.guard.admin.port.getHost().port  # type: ignore[attr-defined]
    given |= settings
    return await check(
        read_settings(**given), reactor, patience=patience, longest=longest, now=lambda: time.time() + ahead
    )


def found(report: Report, about: str, asked: str) -> Finding:
    """The last finding about this."""
    return [finding for finding in report.findings if (finding.about, finding.asked) == (about, asked)][-1]


def wrong(report: Report) -> set[tuple[str, str]]:
    return {(finding.about, finding.asked) for finding in report.findings if finding.state == "wrong"}


def free_port() -> int:
    with socket.socket() as trying:
        trying.bind(("127.0.0.1", 0))
        port: int = trying.getsockname()[1]
        return port


def no_guard() -> dict[str, int]:
    """Ports on which no guard listens."""
    return {"guard_admin_port": free_port(), "guard_bind_port": free_port()}


def open_to_all(directory: Path) -> None:
    directory.chmod(0o755)


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    """A private state directory."""
    tmp_path.chmod(0o700)
    return tmp_path


@pytest_twisted.ensureDeferred
async def test_a_correct_configuration_is_fine_and_leaves_no_room_behind(
    start_sandbox: StartSandbox, state_dir: Path
) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_state_dir=state_dir)
    room_id = sandbox.homeserver.create_room("admin")
    report = await checked(sandbox)
    assert report.fine
    assert {finding.state for finding in report.findings} == {"fine"}
    assert found(report, "synapse", "reachable").reason.endswith("Synapse 1.163.2")
    assert found(report, "synapse", "access token").reason == "@admin:sandbox.local, a server admin"
    assert found(report, "webhooks", "arrive").reason.endswith("on the trial's room")
    assert len(sandbox.upstream.issued) == 1
    assert sandbox.upstream.issued[0].room.startswith("!lotusguard-check-")
    assert not sandbox.livekit.rooms
    assert list(sandbox.homeserver.rooms) == [room_id]


@pytest_twisted.ensureDeferred
async def test_no_secret_is_printed(sandbox: Sandbox) -> None:
    report = await checked(sandbox, livekit_secret=OTHER_SECRET)
    text = io.StringIO()
    report.tell(Terminal(text, {}))
    for secret in (SECRET, OTHER_SECRET, sandbox.admin_token, sandbox.upstream.issued[0].token):
        assert secret not in text.getvalue()
        assert secret not in str(report.as_json())


# -- Synapse -------------------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_missing_matrix_token_is_wrong(sandbox: Sandbox) -> None:
    report = await checked(sandbox, matrix_token="")
    finding = found(report, "synapse", "access token")
    assert finding.state == "wrong"
    assert "MATRIX_TOKEN is not set" in finding.reason
    assert found(report, "lk-jwt-service", "its tokens").state == "unknown"


@pytest_twisted.ensureDeferred
async def test_invalid_matrix_token_is_wrong(sandbox: Sandbox) -> None:
    finding = found(await checked(sandbox, matrix_token="syt_old"), "synapse", "access token")
    assert finding.state == "wrong"
    assert "401 M_UNKNOWN_TOKEN" in finding.reason
    assert "log in as a server admin" in finding.remedy


@pytest_twisted.ensureDeferred
async def test_an_account_of_its_own_without_admin_rights_is_only_a_warning(sandbox: Sandbox) -> None:
    finding = found(
        await checked(sandbox, matrix_token=sandbox.homeserver.add_user("alice")), "synapse", "access token"
    )
    assert finding.state == "warning"
    assert "only the rooms to which it was invited are enforced" in finding.reason


@pytest.mark.parametrize("settings", [{}, {"guard_invites": "off"}])
@pytest_twisted.ensureDeferred
async def test_a_matrix_token_of_a_user_who_is_not_an_admin_and_accepts_no_invitations(
    sandbox: Sandbox, settings: dict[str, str]
) -> None:
    if not settings:  # somebody else uses the account too
        sandbox.homeserver.add_user("alice", device_id="PHONE")
    report = await checked(sandbox, matrix_token=sandbox.homeserver.add_user("alice"), **settings)
    finding = found(report, "synapse", "access token")
    assert finding.state == "wrong"
    assert "@alice:sandbox.local's, who is not a server admin" in finding.reason
    assert "PUT /_synapse/admin/v1/users/@alice:sandbox.local/admin" in finding.remedy


@pytest_twisted.ensureDeferred
async def test_server_name_that_differs_from_synapses_is_wrong(sandbox: Sandbox) -> None:
    finding = found(await checked(sandbox, guard_server_name="example.org"), "synapse", "server name")
    assert finding.state == "wrong"
    assert "'example.org'" in finding.reason
    assert "GUARD_SERVER_NAME=sandbox.local" in finding.remedy


@pytest_twisted.ensureDeferred
async def test_synapse_api_that_leads_to_livekit_is_wrong(sandbox: Sandbox) -> None:
    finding = found(await checked(sandbox, synapse_api=sandbox.livekit.url), "synapse", "reachable")
    assert finding.state == "wrong"
    assert "not as a Matrix homeserver" in finding.reason
    assert "SYNAPSE_API" in finding.remedy


@pytest.mark.parametrize("body", [b"<html>no such page</html>", b'{"errcode": "M_UNRECOGNIZED"}'])
@pytest.mark.parametrize(
    ("settings", "state", "said"),
    [
        ({}, "warning", "no admin API: rooms are enforced where @guard:sandbox.local is invited"),
        ({"guard_invites": "off"}, "wrong", "accepts no invitations"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_homeserver_without_an_admin_api_is_enough_where_invitations_are_accepted(
    sandbox: Sandbox, body: bytes, settings: dict[str, str], state: str, said: str
) -> None:
    for route in ("server_version", "rooms"):
        sandbox.homeserver.faults[route] = Fault.status(404, body)
    report = await checked(sandbox, matrix_token=sandbox.homeserver.add_user("guard"), **settings)
    assert found(report, "synapse", "reachable").state == "fine"
    finding = found(report, "synapse", "access token")
    assert finding.state == state
    assert said in finding.reason
    assert "main process" in finding.remedy


@pytest_twisted.ensureDeferred
async def test_synapse_listener_without_openid_is_a_warning(sandbox: Sandbox) -> None:
    sandbox.homeserver.faults["userinfo"] = Fault.status(404, b'{"errcode":"M_UNRECOGNIZED"}')
    finding = found(await checked(sandbox), "synapse", "OpenID")
    assert finding.state == "warning"
    assert "404 M_UNRECOGNIZED" in finding.reason
    assert "`openid` resource" in finding.remedy


@pytest_twisted.ensureDeferred
async def test_old_synapse_that_returns_the_whole_state_is_a_warning(sandbox: Sandbox) -> None:
    sandbox.homeserver.create_room("admin")
    sandbox.homeserver.ignores_type = True
    report = await checked(sandbox)
    assert found(report, "synapse", "state by type").state == "warning"
    assert report.fine


@pytest_twisted.ensureDeferred
async def test_control_characters_from_a_service_do_not_reach_the_terminal(sandbox: Sandbox) -> None:
    sandbox.homeserver.faults["server_version"] = Fault.status(
        200, b'{"server_version": "1.0\\u001b[2J\\n  all is well"}'
    )
    reason = found(await checked(sandbox), "synapse", "reachable").reason
    assert reason.endswith("Synapse 1.0?[2J?  all is well")


# -- LiveKit -------------------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"livekit_key": ""}, "LIVEKIT_KEY not set"),
        ({"livekit_secret": ""}, "LIVEKIT_SECRET not set"),
        ({"livekit_key": "", "livekit_secret": ""}, "LIVEKIT_KEY and LIVEKIT_SECRET not set"),
        ({"livekit_key": "otherkey"}, "LiveKit does not know the API key 'otherkey'"),
        ({"livekit_secret": OTHER_SECRET}, "LIVEKIT_SECRET is not its secret"),
    ],
)
async def test_credentials_that_livekit_rejects_are_wrong(
    sandbox: Sandbox, settings: dict[str, Any], said: str
) -> None:
    finding = found(await checked(sandbox, **settings), "livekit", "key")
    assert finding.state == "wrong"
    assert said in finding.reason
    assert "livekit.yaml" in finding.remedy


@pytest_twisted.ensureDeferred
async def test_short_secret_is_a_warning(sandbox: Sandbox) -> None:
    sandbox.livekit.keys[KEY] = "devsecret"
    finding = found(await checked(sandbox, livekit_secret="devsecret"), "livekit", "secret")
    assert finding.state == "warning"
    assert finding.reason.startswith("9 characters")
    assert "openssl rand" in finding.remedy


@pytest_twisted.ensureDeferred
async def test_livekit_api_that_leads_to_synapse_is_wrong(sandbox: Sandbox) -> None:
    finding = found(await checked(sandbox, livekit_api=sandbox.homeserver.url), "livekit", "reachable")
    assert finding.state == "wrong"
    assert "not as LiveKit (404" in finding.reason


# -- lk-jwt-service ------------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("name", ["guard_bind_port", "guard_admin_port"])
async def test_upstream_that_is_the_guards_own_port_is_wrong(sandbox: Sandbox, name: str) -> None:
    port = free_port()
    settings: dict[str, Any] = {name: port, "guard_upstream": f"http://localhost:{port}"}
    report = await checked(sandbox, **settings)
    finding = found(report, "lk-jwt-service", "reachable")
    assert finding.state == "wrong"
    assert f"is the guard itself: {port} is {name.upper()}" in finding.reason
    assert "LIVEKIT_JWT_BIND" in finding.remedy


@pytest_twisted.ensureDeferred
async def test_upstream_that_is_an_operators_listener_is_named(sandbox: Sandbox) -> None:
    report = await checked(sandbox, guard_upstream=sandbox.admin_url, guard_admin_port=None)
    assert "operators' listener" in found(report, "lk-jwt-service", "reachable").reason


@pytest_twisted.ensureDeferred
async def test_upstream_that_is_synapse_is_wrong(sandbox: Sandbox) -> None:
    finding = found(await checked(sandbox, guard_upstream=sandbox.homeserver.url), "lk-jwt-service", "reachable")
    assert finding.state == "wrong"
    assert "not as lk-jwt-service (404 to /healthz)" in finding.reason


@pytest_twisted.ensureDeferred
async def test_upstream_without_token_routes_is_wrong(sandbox: Sandbox) -> None:
    sandbox.upstream.faults |= {"sfu_get": Fault.status(404), "get_token": Fault.status(404)}
    finding = found(await checked(sandbox), "lk-jwt-service", "is lk-jwt-service")
    assert finding.state == "wrong"
    assert "404 to /sfu/get, 404 to /get_token" in finding.reason


@pytest_twisted.ensureDeferred
async def test_old_lk_jwt_service_is_recognised_by_its_routes_and_names(sandbox: Sandbox) -> None:
    sandbox.upstream.naming = "0.3.0"
    sandbox.upstream.faults["get_token"] = Fault.status(404)
    report = await checked(sandbox)
    assert "speaks /sfu/get only" in found(report, "lk-jwt-service", "is lk-jwt-service").reason
    assert "before 0.4.0" in found(report, "lk-jwt-service", "release").reason
    assert report.fine


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("key", "theirkey", "it signs them with the API key 'theirkey', ours is 'sandboxkey'"),
        ("secret", OTHER_SECRET, "but not with our LIVEKIT_SECRET"),
    ],
)
async def test_tokens_signed_with_another_key_are_wrong(sandbox: Sandbox, name: str, value: str, said: str) -> None:
    setattr(sandbox.upstream, name, value)
    # LiveKit accepts both keys, so that upstream can create the room
    sandbox.livekit.keys["theirkey"] = SECRET
    if name == "secret":
        sandbox.upstream.full_access = ["another.homeserver"]
    finding = found(await checked(sandbox), "lk-jwt-service", "its tokens")
    assert finding.state == "wrong"
    assert said in finding.reason


@pytest_twisted.ensureDeferred
async def test_upstream_that_cannot_create_rooms_is_wrong(sandbox: Sandbox) -> None:
    sandbox.upstream.secret = OTHER_SECRET
    finding = found(await checked(sandbox), "lk-jwt-service", "its tokens")
    assert finding.state == "wrong"
    assert "500 M_UNKNOWN" in finding.reason
    assert "LIVEKIT_URL" in finding.remedy


@pytest_twisted.ensureDeferred
async def test_upstream_that_cannot_verify_openid_tokens_is_wrong(sandbox: Sandbox) -> None:
    sandbox.upstream.homeservers.clear()
    finding = found(await checked(sandbox), "lk-jwt-service", "its tokens")
    assert finding.state == "wrong"
    assert "cannot verify an OpenID token that Synapse has just given to @admin:sandbox.local" in finding.reason
    assert "sandbox.local's federation API" in finding.remedy


@pytest_twisted.ensureDeferred
async def test_upstream_that_uses_another_livekit_is_a_warning(sandbox: Sandbox, start_sandbox: StartSandbox) -> None:
    other = await start_sandbox(guard_reconcile_interval=3600)
    report = await checked(sandbox, livekit_api=other.livekit.url)
    finding = found(report, "lk-jwt-service", "the trial's room")
    assert finding.state == "warning"
    assert "another LiveKit" in finding.reason
    assert "LIVEKIT_URL" in finding.remedy


# -- addresses of any service -------------------------------------------------------------------------------------

ADDRESSES = pytest.mark.parametrize(
    ("name", "about"),
    [("synapse_api", "synapse"), ("livekit_api", "livekit"), ("guard_upstream", "lk-jwt-service")],
)


@pytest_twisted.ensureDeferred
@ADDRESSES
async def test_address_where_nothing_listens_is_wrong(sandbox: Sandbox, name: str, about: str) -> None:
    port = free_port()
    report = await checked(sandbox, **{name: f"http://127.0.0.1:{port}"})
    finding = found(report, about, "reachable")
    assert (finding.state, finding.reason) == ("wrong", f"nothing listens on 127.0.0.1:{port}")
    assert name.upper() in finding.remedy
    assert {what for what, _ in wrong(report)} == {about}, "the other services were checked as well"


@pytest_twisted.ensureDeferred
@ADDRESSES
async def test_unknown_host_name_is_wrong(sandbox: Sandbox, name: str, about: str) -> None:
    report = await checked(sandbox, **{name: "http://no-such-host.invalid:80"})
    finding = found(report, about, "reachable")
    assert finding.state == "wrong"
    assert "'no-such-host.invalid' is not known" in finding.reason or "no answer" in finding.reason
    assert name.upper() in finding.remedy


@pytest_twisted.ensureDeferred
@ADDRESSES
async def test_https_address_of_an_http_service_is_wrong(sandbox: Sandbox, name: str, about: str) -> None:
    address = str(getattr(sandbox.settings, name)).replace("http:", "https:")
    finding = found(await checked(sandbox, patience=0.7, **{name: address}), about, "reachable")
    assert finding.state == "wrong"
    assert "may not speak TLS" in finding.remedy


@pytest_twisted.ensureDeferred
async def test_services_that_never_answer_do_not_delay_the_report(sandbox: Sandbox) -> None:
    for standin in (sandbox.homeserver, sandbox.livekit, sandbox.upstream):
        standin.fault = Fault.hang()
    began = reactor.seconds()
    report = await checked(sandbox, patience=0.7, guard_admin_port=None)
    assert reactor.seconds() - began < 15
    for about in ("synapse", "livekit", "lk-jwt-service"):
        assert found(report, about, "reachable").reason == "no answer within 0.7 s"


@pytest_twisted.ensureDeferred
async def test_check_stops_at_its_time_limit(sandbox: Sandbox) -> None:
    for standin in (sandbox.homeserver, sandbox.livekit, sandbox.upstream):
        standin.fault = Fault.hang()
    began = reactor.seconds()
    report = await checked(sandbox, longest=0.8, guard_admin_port=None)
    assert reactor.seconds() - began < 15
    finding = found(report, "settings", "time")
    assert finding.state == "wrong"
    assert "not done after 0.8 s" in finding.reason


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize(
    "fault",
    [Fault.invalid_response(), Fault.wrong_types(), Fault.close(), Fault.truncated(), Fault.too_large()],
    ids=lambda f: f.kind,
)
async def test_unexpected_answers_are_reported_as_wrong(sandbox: Sandbox, fault: Fault) -> None:
    for standin in (sandbox.homeserver, sandbox.livekit, sandbox.upstream):
        standin.fault = fault
    report = await checked(sandbox, guard_admin_port=None)
    surprised = {about for about, _ in wrong(report)}
    if fault.kind == "wrong_types":  # protobuf ignores fields of another type as unknown ones
        assert "synapse" in surprised
    else:
        assert surprised >= {"synapse", "livekit", "lk-jwt-service"}
    assert all(finding.remedy for finding in report.findings if finding.state == "wrong")


# -- exposure --


def listening(address: str) -> str:
    """A line of /proc/net/tcp. :param address: as the kernel writes it."""
    return f"   0: {address} 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 1 1 0\n"


@pytest.mark.parametrize(
    ("name", "address", "told"),
    [
        ("tcp", "0100007F:1F87", "127.0.0.1"),
        ("tcp", "00000000:1F87", "0.0.0.0"),
        ("tcp", "0A02000A:1F87", "10.0.2.10"),
        ("tcp6", "00000000000000000000000000000000:1F87", "::"),
        ("tcp6", "00000000000000000000000001000000:1F87", "::1"),
        ("tcp6", "0000000000000000FFFF00000100007F:1F87", "127.0.0.1"),
    ],
)
def test_listening_addresses_are_read_as_the_kernel_writes_them(
    tmp_path: Path, name: str, address: str, told: str
) -> None:
    other = "   1: 00000000:1F88 00000000:0000 0A 0\n   2: 00000000:1F87 0100007F:9999 01 0\n"
    (tmp_path / name).write_text("  sl  local_address rem_address   st\n" + listening(address) + other)
    assert listening_addresses(0x1F87, tmp_path) == [told]


def test_listening_addresses_are_unknown_without_proc_net(tmp_path: Path) -> None:
    assert listening_addresses(8071, tmp_path) is None


def test_a_listening_socket_of_this_machine_is_found() -> None:
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        assert listening_addresses(listener.getsockname()[1]) == ["0.0.0.0"]


@pytest_twisted.ensureDeferred
async def test_lk_jwt_service_on_every_address_is_a_warning(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lotusguard.check.exposure.listening_addresses", lambda port: ["0.0.0.0"])
    report = await checked(sandbox)
    finding = found(report, "exposure", "lk-jwt-service")
    assert finding.state == "warning"
    assert "listens on 0.0.0.0 (every address): anybody who can connect" in finding.reason
    assert f"LIVEKIT_JWT_BIND=127.0.0.1:{sandbox.upstream.port}" in finding.remedy
    assert ("exposure", "homeserver routes") not in {(one.about, one.asked) for one in report.findings}


@pytest_twisted.ensureDeferred
async def test_homeserver_routes_on_every_address_are_a_warning(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    homeservers = {sandbox.homeserver.server_name: sandbox.homeserver.url}
    upstream = FakeLkJwtService(
        reactor,
        key=KEY,
        secret=SECRET,
        sfu_url=sandbox.livekit.url,
        homeservers=homeservers,
        hs_token="the-homeservers",
    )
    await upstream.start()
    try:
        report = await checked(sandbox, guard_upstream=upstream.url)
        assert found(report, "exposure", "lk-jwt-service").reason == "listens on loopback only"
        monkeypatch.setattr("lotusguard.check.exposure.listening_addresses", lambda port: ["::"])
        report = await checked(sandbox, guard_upstream=upstream.url)
    finally:
        await upstream.stop()
    finding = found(report, "exposure", "homeserver routes")
    assert finding.state == "warning"
    assert "GUARD_APPSERVICE_PORT" in finding.remedy


@pytest_twisted.ensureDeferred
async def test_room_service_on_livekits_public_address_is_a_warning(sandbox: Sandbox) -> None:
    sandbox.upstream.sfu_url = sandbox.livekit.url.replace("127.0.0.1", "localhost")
    finding = found(await checked(sandbox), "exposure", "LiveKit")
    assert finding.state == "warning"
    assert "/twirp" in finding.reason
    sandbox.livekit.faults["ListRooms"] = Fault.status(404)
    assert found(await checked(sandbox), "exposure", "LiveKit").state == "fine"


# -- webhooks, clocks, the running guard ---------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_missing_webhooks_are_a_warning(sandbox: Sandbox) -> None:
    sandbox.livekit.webhooks.urls.clear()
    report = await checked(sandbox)
    finding = found(report, "webhooks", "arrive")
    assert finding.state == "warning"
    assert "although LiveKit has just had something to report" in finding.reason
    assert "/sfu_webhook" in finding.remedy


@pytest_twisted.ensureDeferred
async def test_webhooks_signed_with_another_secret_are_a_warning(sandbox: Sandbox) -> None:
    sandbox.livekit.webhooks.secret = OTHER_SECRET
    assert found(await checked(sandbox), "webhooks", "arrive").state == "warning"


@pytest_twisted.ensureDeferred
async def test_webhooks_are_unknown_without_a_running_guard(sandbox: Sandbox) -> None:
    report = await checked(sandbox, guard_bind_port=free_port(), guard_admin_port=free_port())
    finding = found(report, "webhooks", "arrive")
    assert finding.state == "unknown"
    assert "/readyz" in finding.remedy
    assert report.fine


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize(("ahead", "state"), [(-30.0, "warning"), (30.0, "warning"), (-90.0, "wrong"), (90.0, "wrong")])
async def test_clock_skew_is_a_warning_and_above_a_minute_wrong(sandbox: Sandbox, ahead: float, state: str) -> None:
    report = await checked(sandbox, ahead=ahead)
    for setting in ("SYNAPSE_API", "LIVEKIT_API", "GUARD_UPSTREAM"):
        finding = found(report, "clocks", setting)
        assert finding.state == state
        assert ("behind ours" if ahead > 0 else "ahead of ours") in finding.reason
        assert "NTP" in finding.remedy


@pytest_twisted.ensureDeferred
async def test_clock_skew_that_makes_livekit_reject_tokens_is_named(sandbox: Sandbox) -> None:
    finding = found(await checked(sandbox, ahead=600.0), "livekit", "key")
    assert finding.state == "wrong"
    assert "its clock and ours differ" in finding.reason


@pytest_twisted.ensureDeferred
async def test_a_running_guard_reports_what_it_does_not_enforce(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_dry_run=True, guard_reconcile_interval=3600)
    report = await checked(sandbox)
    assert found(report, "settings", "GUARD_DRY_RUN").state == "warning"
    finding = found(report, "guard", "enforcing")
    assert finding.state == "wrong"
    assert "GUARD_DRY_RUN is on" in finding.reason


# -- this machine -------------------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_guards_port_held_by_lk_jwt_service_is_wrong(sandbox: Sandbox) -> None:
    report = await checked(sandbox, guard_bind_port=sandbox.upstream.port, guard_upstream="http://127.0.0.1:1")
    finding = found(report, "ports", "GUARD_BIND_PORT")
    assert finding.state == "wrong"
    assert "is taken by lk-jwt-service, which belongs behind the guard" in finding.reason


@pytest_twisted.ensureDeferred
async def test_ports_held_by_other_programs_are_wrong(sandbox: Sandbox) -> None:
    report = await checked(sandbox, guard_bind_port=sandbox.homeserver.port, guard_admin_port=sandbox.livekit.port)
    for name in ("GUARD_BIND_PORT", "GUARD_ADMIN_PORT"):
        finding = found(report, "ports", name)
        assert finding.state == "wrong"
        assert "is taken by another program" in finding.reason
        assert "ss -ltnp" in finding.remedy


@pytest_twisted.ensureDeferred
async def test_two_listeners_on_one_port_are_wrong(sandbox: Sandbox) -> None:
    port = free_port()
    finding = found(await checked(sandbox, guard_bind_port=port, guard_admin_port=port), "ports", "GUARD_ADMIN_PORT")
    assert (finding.state, finding.reason) == ("wrong", f"is {port}, as is GUARD_BIND_PORT")


@pytest_twisted.ensureDeferred
async def test_bind_address_of_another_machine_is_wrong(sandbox: Sandbox) -> None:
    finding = found(await checked(sandbox, guard_bind_host="192.0.2.1"), "ports", "GUARD_BIND_PORT")
    assert finding.state == "wrong"
    assert "EADDRNOTAVAIL" in finding.reason


@pytest_twisted.ensureDeferred
async def test_missing_state_directory_is_a_warning(sandbox: Sandbox) -> None:
    finding = found(await checked(sandbox), "state directory", "kept")
    assert finding.state == "warning"
    assert "GUARD_STATE_DIR" in finding.remedy


@pytest_twisted.ensureDeferred
async def test_state_directory_that_is_a_file_is_wrong(sandbox: Sandbox, tmp_path: Path) -> None:
    file = tmp_path / "state"
    file.write_text("")
    for path in (file, file / "below"):
        finding = found(await checked(sandbox, guard_state_dir=path, **no_guard()), "state directory", "writable")
        assert (finding.state, finding.reason) == ("wrong", f"{file} is not a directory")


@pytest_twisted.ensureDeferred
async def test_unwritable_state_directory_is_wrong(sandbox: Sandbox) -> None:
    finding = found(
        await checked(sandbox, guard_state_dir=Path("/proc/lotusguard"), **no_guard()), "state directory", "writable"
    )
    assert finding.state == "wrong"
    assert "cannot be written to" in finding.reason
    assert "chown" in finding.remedy


@pytest_twisted.ensureDeferred
async def test_check_does_not_create_the_state_directory(sandbox: Sandbox, tmp_path: Path) -> None:
    directory = tmp_path / "var" / "lotusguard"
    finding = found(await checked(sandbox, guard_state_dir=directory, **no_guard()), "state directory", "writable")
    assert finding.state == "fine"
    assert "created at the first start" in finding.reason
    assert not (tmp_path / "var").exists()


@pytest_twisted.ensureDeferred
async def test_world_readable_state_directory_is_a_warning(sandbox: Sandbox, tmp_path: Path) -> None:
    open_to_all(tmp_path)
    finding = found(await checked(sandbox, guard_state_dir=tmp_path, **no_guard()), "state directory", "private")
    assert finding.state == "warning"
    assert f"chmod 700 {tmp_path}" in finding.remedy


@pytest_twisted.ensureDeferred
async def test_low_disk_space_is_a_warning_and_a_full_disk_wrong(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for free, state in ((10 * 1024, "wrong"), (10 * 1024 * 1024, "warning")):
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        monkeypatch.setattr("lotusguard.check.host.shutil.disk_usage", lambda _, usage=usage: usage)
        assert (
            found(await checked(sandbox, guard_state_dir=tmp_path, **no_guard()), "state directory", "space").state
            == state
        )


@pytest_twisted.ensureDeferred
async def test_misspelt_setting_is_a_warning(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUARD_UPSTREEM", "http://127.0.0.1:8071")
    finding = found(await checked(sandbox), "settings", "suspicious")
    assert finding.state == "warning"
    assert "GUARD_UPSTREEM is not a setting; did you mean GUARD_UPSTREAM?" in finding.reason


@pytest.mark.parametrize("of_guard", [ADMIN_TOKEN, ""])
@pytest_twisted.ensureDeferred
async def test_an_admin_token_that_is_not_the_running_guards_is_named_in_one_line(
    start_sandbox: StartSandbox, of_guard: str
) -> None:
    sandbox = await start_sandbox(guard_admin_token=of_guard)
    report = await checked(sandbox, guard_admin_token="another-token")
    finding = found(report, "guard", "GUARD_ADMIN_TOKEN")
    assert finding.state == "warning"
    assert finding.reason == "is not the running guard's: its operators' listener answers 403"
    assert "another-token" not in f"{finding.reason}{finding.remedy}"


@pytest_twisted.ensureDeferred
async def test_the_admin_token_of_the_running_guard_is_fine(sandbox: Sandbox) -> None:
    assert found(await checked(sandbox), "guard", "GUARD_ADMIN_TOKEN").state == "fine"


@pytest_twisted.ensureDeferred
async def test_missing_admin_token_is_a_warning(sandbox: Sandbox) -> None:
    assert found(await checked(sandbox, guard_admin_token=""), "settings", "GUARD_ADMIN_TOKEN").state == "warning"


@pytest_twisted.ensureDeferred
async def test_state_by_type_is_unknown_without_any_room(sandbox: Sandbox) -> None:
    assert isinstance(sandbox.homeserver, FakeSynapse)
    assert found(await checked(sandbox), "synapse", "state by type").state == "unknown"


def test_report_shows_mark_reason_and_remedy_of_each_finding() -> None:
    report = Report(order=["one", "two"])
    report.findings += [
        Finding("two", "asked second", "wrong", "it is so", "do that"),
        Finding("one", "asked", "fine", "all is well"),
        Finding("one", "asked", "warning", "not so well", "think"),
    ]
    text = io.StringIO()
    report.tell(Terminal(text, {}))
    assert text.getvalue().splitlines()[2:] == [
        "one",
        "  ✓ asked         all is well",
        "  ! asked         not so well",
        "                  → think",
        "",
        "two",
        "  ✗ asked second  it is so",
        "                  → do that",
        "",
        "✗ 1 wrong, 1 to look at (!).",
    ]
    assert not report.fine


# -- the running guard and its public address --------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_the_running_guard_is_asked_about_its_state_directory(
    start_sandbox: StartSandbox, tmp_path: Path
) -> None:
    sandbox = await start_sandbox(guard_state_dir=tmp_path)
    report = await checked(sandbox, guard_state_dir=Path("/proc/not-what-the-guard-has"))
    assert found(report, "state directory", "writable").reason == "the running guard writes to it"


@pytest_twisted.ensureDeferred
async def test_a_running_guard_without_a_state_directory_is_reported(sandbox: Sandbox, tmp_path: Path) -> None:
    finding = found(await checked(sandbox, guard_state_dir=tmp_path), "state directory", "kept")
    assert finding.state == "warning"
    assert "in memory" in finding.reason


@pytest_twisted.ensureDeferred
async def test_lk_jwt_service_on_the_guards_port_is_not_taken_for_a_guard(sandbox: Sandbox) -> None:
    port = int(sandbox.upstream.url.rpartition(":")[2])
    finding = found(await checked(sandbox, guard_bind_port=port), "ports", "GUARD_BIND_PORT")
    assert finding.state == "wrong"
    assert "is taken by lk-jwt-service" in finding.reason


@pytest_twisted.ensureDeferred
async def test_public_address_that_bypasses_the_guard_is_wrong(sandbox: Sandbox) -> None:
    report, pool = Report(), ConnectionPool(reactor)
    asking = Asking(reactor, pool, 5.0, time.time)
    exposure = ExposureCheck(asking, Findings(report, "exposure"))
    for url, state in ((sandbox.url, "fine"), (sandbox.upstream.url, "wrong"), (sandbox.homeserver.url, "unknown")):
        await exposure.check_public_address(url)
        assert found(report, "exposure", "clients' way").state == state
    await exposure.check_public_address(f"http://127.0.0.1:{free_port()}")
    assert found(report, "exposure", "clients' way").state == "unknown"
    await pool.close()


def test_a_port_that_systemd_holds_is_recognised(tmp_path: Path) -> None:
    net, descriptors = tmp_path / "net", tmp_path / "1" / "fd"
    net.mkdir()
    descriptors.mkdir(parents=True)
    line = "   0: 0100007F:1F86 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0"
    (net / "tcp").write_text("header\n" + line + "\n")
    (tmp_path / "1" / "comm").write_text("systemd\n")
    assert not is_held_by_systemd(8070, tmp_path)
    (descriptors / "40").symlink_to("socket:[4711]")
    assert is_held_by_systemd(8070, tmp_path)
    assert not is_held_by_systemd(8071, tmp_path)
    (tmp_path / "1" / "comm").write_text("twistd\n")
    assert not is_held_by_systemd(8070, tmp_path), "in a container the guard itself is process 1"


@pytest_twisted.ensureDeferred
async def test_full_disk_is_not_reported_as_missing_permission(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(dir: Path) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lotusguard.check.host.tempfile.TemporaryFile", full)
    finding = found(await checked(sandbox, guard_state_dir=tmp_path, **no_guard()), "state directory", "writable")
    assert "No space left on device" in finding.reason
    assert "make room" in finding.remedy
    assert "chown" not in finding.remedy


@pytest_twisted.ensureDeferred
async def test_403_of_a_proxy_is_not_attributed_to_synapse(sandbox: Sandbox) -> None:
    sandbox.homeserver.faults["server_version"] = Fault.status(403, b"<html>Forbidden</html>")
    finding = found(await checked(sandbox), "synapse", "reachable")
    assert finding.state == "wrong"
    assert "a proxy that blocks this path" in finding.reason
