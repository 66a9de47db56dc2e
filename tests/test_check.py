# SPDX-License-Identifier: Apache-2.0
"""``lotusguard check`` over the stand-ins: every wrong setting that a person can make is told, with its remedy."""

from __future__ import annotations

import io
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor

from lotusguard.check.everything import check
from lotusguard.check.report import Finding, Report
from lotusguard.config import read_settings
from lotusguard.sandbox.demo.sandbox import KEY, SECRET, Sandbox
from lotusguard.sandbox.faults import Fault
from lotusguard.sandbox.synapse.homeserver import FakeSynapse
from lotusguard.terminal import Terminal
from tests.conftest import StartSandbox

OTHER_SECRET = "another-secret-of-the-same-length-1"


async def checked(sandbox: Sandbox, *, longest: Any = 15.0, ahead: Any = 0.0, **settings: Any) -> Report:
    """Check with the settings of the sandbox's guard, and these over them. :param ahead: seconds our clock is."""
    assert sandbox.guard.public.port is not None
    assert sandbox.guard.admin is not None
    assert sandbox.guard.admin.port is not None
    given = {name: getattr(sandbox.settings, name) for name in sandbox.settings.model_fields_set}
    given["guard_bind_port"] = sandbox.guard.public.port.getHost().port  # type: ignore[attr-defined]
    given["guard_admin_port"] = sandbox.guard.admin.port.getHost().port  # type: ignore[attr-defined]
    given |= settings
    return await check(read_settings(**given), reactor, patience=0.7, longest=longest, now=lambda: time.time() + ahead)


def found(report: Report, about: str, asked: str) -> Finding:
    """What was found out about this, told last."""
    return [finding for finding in report.findings if (finding.about, finding.asked) == (about, asked)][-1]


def wrong(report: Report) -> set[tuple[str, str]]:
    return {(finding.about, finding.asked) for finding in report.findings if finding.state == "wrong"}


def free_port() -> int:
    with socket.socket() as trying:
        trying.bind(("127.0.0.1", 0))
        port: int = trying.getsockname()[1]
        return port


def is_empty(directory: Path) -> bool:
    return not list(directory.iterdir())


def open_to_all(directory: Path) -> None:
    directory.chmod(0o755)


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    """A state directory as it should be."""
    tmp_path.chmod(0o700)
    return tmp_path


@pytest_twisted.ensureDeferred
async def test_a_configuration_that_enforces_is_fine_and_leaves_no_room_behind(
    sandbox: Sandbox, state_dir: Path
) -> None:
    room_id = sandbox.homeserver.create_room("admin")
    report = await checked(sandbox, guard_state_dir=state_dir)
    assert report.fine
    assert {finding.state for finding in report.findings} == {"fine"}
    assert found(report, "synapse", "reachable").reason.endswith("Synapse 1.163.2")
    assert found(report, "synapse", "access token").reason == "@admin:sandbox.local, a server admin"
    assert found(report, "webhooks", "arrive").reason.endswith("on the trial's room")
    assert len(sandbox.upstream.issued) == 1
    assert sandbox.upstream.issued[0].room.startswith("!lotusguard-check-")
    assert not sandbox.livekit.rooms
    assert list(sandbox.homeserver.rooms) == [room_id]
    assert is_empty(state_dir)


@pytest_twisted.ensureDeferred
async def test_no_secret_is_told(sandbox: Sandbox) -> None:
    report = await checked(sandbox, livekit_secret=OTHER_SECRET)
    text = io.StringIO()
    report.tell(Terminal(text, {}))
    for secret in (SECRET, OTHER_SECRET, sandbox.admin_token, sandbox.upstream.issued[0].token):
        assert secret not in text.getvalue()
        assert secret not in str(report.as_json())


# -- Synapse -------------------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_no_matrix_token(sandbox: Sandbox) -> None:
    report = await checked(sandbox, matrix_token="")
    finding = found(report, "synapse", "access token")
    assert finding.state == "wrong"
    assert "MATRIX_TOKEN is not set" in finding.reason
    assert found(report, "lk-jwt-service", "its tokens").state == "unknown"


@pytest_twisted.ensureDeferred
async def test_a_matrix_token_that_is_not_valid(sandbox: Sandbox) -> None:
    finding = found(await checked(sandbox, matrix_token="syt_old"), "synapse", "access token")
    assert finding.state == "wrong"
    assert "401 M_UNKNOWN_TOKEN" in finding.reason
    assert "log in as a server admin" in finding.remedy


@pytest_twisted.ensureDeferred
async def test_a_matrix_token_of_somebody_who_is_no_admin(sandbox: Sandbox) -> None:
    report = await checked(sandbox, matrix_token=sandbox.homeserver.add_user("alice"))
    finding = found(report, "synapse", "access token")
    assert finding.state == "wrong"
    assert "@alice:sandbox.local's, who is no server admin" in finding.reason
    assert "PUT /_synapse/admin/v1/users/@alice:sandbox.local/admin" in finding.remedy


@pytest_twisted.ensureDeferred
async def test_another_server_name_than_synapses(sandbox: Sandbox) -> None:
    finding = found(await checked(sandbox, guard_server_name="example.org"), "synapse", "server name")
    assert finding.state == "wrong"
    assert "'example.org'" in finding.reason
    assert "GUARD_SERVER_NAME=sandbox.local" in finding.remedy


@pytest_twisted.ensureDeferred
async def test_synapses_address_is_livekits(sandbox: Sandbox) -> None:
    finding = found(await checked(sandbox, synapse_api=sandbox.livekit.url), "synapse", "reachable")
    assert finding.state == "wrong"
    assert "not as a Matrix homeserver" in finding.reason
    assert "SYNAPSE_API" in finding.remedy


@pytest_twisted.ensureDeferred
async def test_synapses_address_is_a_proxy_without_the_admin_api(sandbox: Sandbox) -> None:
    sandbox.homeserver.faults["server_version"] = Fault.status(404, b"<html>no such page</html>")
    finding = found(await checked(sandbox), "synapse", "reachable")
    assert finding.state == "wrong"
    assert "its admin API is not there (404)" in finding.reason
    assert "main process" in finding.remedy


@pytest_twisted.ensureDeferred
async def test_synapse_without_openid_on_that_listener(sandbox: Sandbox) -> None:
    sandbox.homeserver.faults["userinfo"] = Fault.status(404, b'{"errcode":"M_UNRECOGNIZED"}')
    finding = found(await checked(sandbox), "synapse", "OpenID")
    assert finding.state == "warning"
    assert "404 M_UNRECOGNIZED" in finding.reason
    assert "`openid` resource" in finding.remedy


@pytest_twisted.ensureDeferred
async def test_an_old_synapse_that_answers_the_whole_state(sandbox: Sandbox) -> None:
    sandbox.homeserver.create_room("admin")
    sandbox.homeserver.ignores_type = True
    report = await checked(sandbox)
    assert found(report, "synapse", "state by type").state == "warning"
    assert report.fine


@pytest_twisted.ensureDeferred
async def test_what_a_neighbour_says_does_not_reach_the_terminal_as_it_is(sandbox: Sandbox) -> None:
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
async def test_a_key_that_livekit_does_not_take(sandbox: Sandbox, settings: dict[str, Any], said: str) -> None:
    finding = found(await checked(sandbox, **settings), "livekit", "key")
    assert finding.state == "wrong"
    assert said in finding.reason
    assert "livekit.yaml" in finding.remedy


@pytest_twisted.ensureDeferred
async def test_a_short_secret(sandbox: Sandbox) -> None:
    sandbox.livekit.keys[KEY] = "devsecret"
    finding = found(await checked(sandbox, livekit_secret="devsecret"), "livekit", "secret")
    assert finding.state == "warning"
    assert finding.reason.startswith("9 characters")
    assert "openssl rand" in finding.remedy


@pytest_twisted.ensureDeferred
async def test_livekits_address_is_synapses(sandbox: Sandbox) -> None:
    finding = found(await checked(sandbox, livekit_api=sandbox.homeserver.url), "livekit", "reachable")
    assert finding.state == "wrong"
    assert "not as LiveKit (404" in finding.reason


# -- lk-jwt-service ------------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("name", ["guard_bind_port", "guard_admin_port"])
async def test_the_guard_before_itself_is_told_without_asking_it(sandbox: Sandbox, name: str) -> None:
    port = free_port()
    settings: dict[str, Any] = {name: port, "guard_upstream": f"http://localhost:{port}"}
    report = await checked(sandbox, **settings)
    finding = found(report, "lk-jwt-service", "reachable")
    assert finding.state == "wrong"
    assert f"is the guard itself: {port} is {name.upper()}" in finding.reason
    assert "LIVEKIT_JWT_BIND" in finding.remedy


@pytest_twisted.ensureDeferred
async def test_upstream_is_another_guards_operators_listener(sandbox: Sandbox) -> None:
    report = await checked(sandbox, guard_upstream=sandbox.admin_url, guard_admin_port=None)
    assert "operators' listener" in found(report, "lk-jwt-service", "reachable").reason


@pytest_twisted.ensureDeferred
async def test_upstream_is_synapse(sandbox: Sandbox) -> None:
    finding = found(await checked(sandbox, guard_upstream=sandbox.homeserver.url), "lk-jwt-service", "reachable")
    assert finding.state == "wrong"
    assert "not as lk-jwt-service (404 to /healthz)" in finding.reason


@pytest_twisted.ensureDeferred
async def test_upstream_is_something_else_that_is_healthy(sandbox: Sandbox) -> None:
    sandbox.upstream.faults |= {"sfu_get": Fault.status(404), "get_token": Fault.status(404)}
    finding = found(await checked(sandbox), "lk-jwt-service", "is lk-jwt-service")
    assert finding.state == "wrong"
    assert "404 to /sfu/get, 404 to /get_token" in finding.reason


@pytest_twisted.ensureDeferred
async def test_an_old_release_is_known_by_its_routes_and_names(sandbox: Sandbox) -> None:
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
async def test_upstream_signs_with_another_key(sandbox: Sandbox, name: str, value: str, said: str) -> None:
    setattr(sandbox.upstream, name, value)
    # LiveKit knows both, so that upstream can make the room
    sandbox.livekit.keys["theirkey"] = SECRET
    if name == "secret":
        sandbox.upstream.full_access = ["another.homeserver"]
    finding = found(await checked(sandbox), "lk-jwt-service", "its tokens")
    assert finding.state == "wrong"
    assert said in finding.reason


@pytest_twisted.ensureDeferred
async def test_upstream_cannot_make_rooms_at_livekit(sandbox: Sandbox) -> None:
    sandbox.upstream.secret = OTHER_SECRET
    finding = found(await checked(sandbox), "lk-jwt-service", "its tokens")
    assert finding.state == "wrong"
    assert "500 M_UNKNOWN" in finding.reason
    assert "LIVEKIT_URL" in finding.remedy


@pytest_twisted.ensureDeferred
async def test_upstream_cannot_reach_the_homeserver(sandbox: Sandbox) -> None:
    sandbox.upstream.homeservers.clear()
    finding = found(await checked(sandbox), "lk-jwt-service", "its tokens")
    assert finding.state == "wrong"
    assert "cannot verify an OpenID token that Synapse has just given to @admin:sandbox.local" in finding.reason
    assert "sandbox.local's federation API" in finding.remedy


@pytest_twisted.ensureDeferred
async def test_upstream_uses_another_livekit(sandbox: Sandbox, start_sandbox: StartSandbox) -> None:
    other = await start_sandbox(guard_reconcile_interval=3600)
    report = await checked(sandbox, livekit_api=other.livekit.url)
    finding = found(report, "lk-jwt-service", "the trial's room")
    assert finding.state == "warning"
    assert "another LiveKit" in finding.reason
    assert "LIVEKIT_URL" in finding.remedy


# -- addresses, whosever -------------------------------------------------------------------------------------

ADDRESSES = pytest.mark.parametrize(
    ("name", "about"),
    [("synapse_api", "synapse"), ("livekit_api", "livekit"), ("guard_upstream", "lk-jwt-service")],
)


@pytest_twisted.ensureDeferred
@ADDRESSES
async def test_an_address_where_nothing_listens(sandbox: Sandbox, name: str, about: str) -> None:
    port = free_port()
    report = await checked(sandbox, **{name: f"http://127.0.0.1:{port}"})
    finding = found(report, about, "reachable")
    assert (finding.state, finding.reason) == ("wrong", f"nothing listens on 127.0.0.1:{port}")
    assert name.upper() in finding.remedy
    assert {what for what, _ in wrong(report)} == {about}, "the others were looked at all the same"


@pytest_twisted.ensureDeferred
@ADDRESSES
async def test_a_host_name_that_nobody_knows(sandbox: Sandbox, name: str, about: str) -> None:
    report = await checked(sandbox, **{name: "http://no-such-host.invalid:80"})
    finding = found(report, about, "reachable")
    assert finding.state == "wrong"
    assert "'no-such-host.invalid' is not known" in finding.reason or "no answer" in finding.reason
    assert name.upper() in finding.remedy


@pytest_twisted.ensureDeferred
@ADDRESSES
async def test_https_where_http_is_spoken(sandbox: Sandbox, name: str, about: str) -> None:
    address = str(getattr(sandbox.settings, name)).replace("http:", "https:")
    finding = found(await checked(sandbox, **{name: address}), about, "reachable")
    assert finding.state == "wrong"
    assert "may not speak TLS" in finding.remedy


@pytest_twisted.ensureDeferred
async def test_neighbours_that_never_answer_are_not_waited_for_long(sandbox: Sandbox) -> None:
    for standin in (sandbox.homeserver, sandbox.livekit, sandbox.upstream):
        standin.fault = Fault.hang()
    began = reactor.seconds()
    report = await checked(sandbox, guard_admin_port=None)
    assert reactor.seconds() - began < 3
    for about in ("synapse", "livekit", "lk-jwt-service"):
        assert found(report, about, "reachable").reason == "no answer within 0.7 s"


@pytest_twisted.ensureDeferred
async def test_the_whole_check_ends_in_time(sandbox: Sandbox) -> None:
    for standin in (sandbox.homeserver, sandbox.livekit, sandbox.upstream):
        standin.fault = Fault.delay(0.3)
    began = reactor.seconds()
    report = await checked(sandbox, longest=0.8, guard_admin_port=None)
    assert reactor.seconds() - began < 2
    finding = found(report, "settings", "time")
    assert finding.state == "wrong"
    assert "not done after 0.8 s" in finding.reason


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize(
    "fault",
    [Fault.invalid_response(), Fault.wrong_types(), Fault.close(), Fault.truncated(), Fault.too_large()],
    ids=lambda f: f.kind,
)
async def test_answers_that_nobody_expects_are_found_wrong(sandbox: Sandbox, fault: Fault) -> None:
    for standin in (sandbox.homeserver, sandbox.livekit, sandbox.upstream):
        standin.fault = fault
    report = await checked(sandbox, guard_admin_port=None)
    surprised = {about for about, _ in wrong(report)}
    if fault.kind == "wrong_types":  # to protobuf a field of another type is only one it does not know
        assert "synapse" in surprised
    else:
        assert surprised >= {"synapse", "livekit", "lk-jwt-service"}
    assert all(finding.remedy for finding in report.findings if finding.state == "wrong")


# -- webhooks, clocks, the running guard ---------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_webhooks_that_do_not_arrive(sandbox: Sandbox) -> None:
    sandbox.livekit.webhooks.urls.clear()
    report = await checked(sandbox)
    finding = found(report, "webhooks", "arrive")
    assert finding.state == "warning"
    assert "although LiveKit has just had something to tell" in finding.reason
    assert "/sfu_webhook" in finding.remedy


@pytest_twisted.ensureDeferred
async def test_webhooks_that_another_secret_signed(sandbox: Sandbox) -> None:
    sandbox.livekit.webhooks.secret = OTHER_SECRET
    assert found(await checked(sandbox), "webhooks", "arrive").state == "warning"


@pytest_twisted.ensureDeferred
async def test_without_a_running_guard_it_is_said_how_to_see_webhooks(sandbox: Sandbox) -> None:
    report = await checked(sandbox, guard_bind_port=free_port(), guard_admin_port=free_port())
    finding = found(report, "webhooks", "arrive")
    assert finding.state == "unknown"
    assert "/readyz" in finding.remedy
    assert report.fine


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize(("ahead", "state"), [(-30.0, "warning"), (30.0, "warning"), (-90.0, "wrong"), (90.0, "wrong")])
async def test_clocks_that_differ(sandbox: Sandbox, ahead: float, state: str) -> None:
    report = await checked(sandbox, ahead=ahead)
    for setting in ("SYNAPSE_API", "LIVEKIT_API", "GUARD_UPSTREAM"):
        finding = found(report, "clocks", setting)
        assert finding.state == state
        assert ("behind ours" if ahead > 0 else "ahead of ours") in finding.reason
        assert "NTP" in finding.remedy


@pytest_twisted.ensureDeferred
async def test_a_clock_so_far_ahead_that_livekit_takes_no_token(sandbox: Sandbox) -> None:
    finding = found(await checked(sandbox, ahead=600.0), "livekit", "key")
    assert finding.state == "wrong"
    assert "its clock and ours differ" in finding.reason


@pytest_twisted.ensureDeferred
async def test_a_running_guard_says_what_it_does_not_enforce(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_dry_run=True, guard_reconcile_interval=3600)
    report = await checked(sandbox)
    assert found(report, "settings", "GUARD_DRY_RUN").state == "warning"
    finding = found(report, "guard", "enforcing")
    assert finding.state == "wrong"
    assert "GUARD_DRY_RUN is on" in finding.reason


# -- at home -------------------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_lk_jwt_service_still_holds_the_guards_port(sandbox: Sandbox) -> None:
    report = await checked(sandbox, guard_bind_port=sandbox.upstream.port, guard_upstream="http://127.0.0.1:1")
    finding = found(report, "ports", "GUARD_BIND_PORT")
    assert finding.state == "wrong"
    assert "is taken by lk-jwt-service, which belongs behind the guard" in finding.reason


@pytest_twisted.ensureDeferred
async def test_ports_that_other_programs_hold(sandbox: Sandbox) -> None:
    report = await checked(sandbox, guard_bind_port=sandbox.homeserver.port, guard_admin_port=sandbox.livekit.port)
    for name in ("GUARD_BIND_PORT", "GUARD_ADMIN_PORT"):
        finding = found(report, "ports", name)
        assert finding.state == "wrong"
        assert "is taken by another program" in finding.reason
        assert "ss -ltnp" in finding.remedy


@pytest_twisted.ensureDeferred
async def test_the_same_port_twice(sandbox: Sandbox) -> None:
    port = free_port()
    finding = found(await checked(sandbox, guard_bind_port=port, guard_admin_port=port), "ports", "GUARD_ADMIN_PORT")
    assert (finding.state, finding.reason) == ("wrong", f"is {port}, as is GUARD_BIND_PORT")


@pytest_twisted.ensureDeferred
async def test_an_address_that_is_not_of_this_machine(sandbox: Sandbox) -> None:
    finding = found(await checked(sandbox, guard_bind_host="192.0.2.1"), "ports", "GUARD_BIND_PORT")
    assert finding.state == "wrong"
    assert "EADDRNOTAVAIL" in finding.reason


@pytest_twisted.ensureDeferred
async def test_nothing_survives_a_restart_without_a_state_directory(sandbox: Sandbox) -> None:
    finding = found(await checked(sandbox), "state directory", "kept")
    assert finding.state == "warning"
    assert "GUARD_STATE_DIR" in finding.remedy


@pytest_twisted.ensureDeferred
async def test_a_state_directory_that_is_a_file(sandbox: Sandbox, tmp_path: Path) -> None:
    file = tmp_path / "state"
    file.write_text("")
    for path in (file, file / "below"):
        finding = found(await checked(sandbox, guard_state_dir=path), "state directory", "writable")
        assert (finding.state, finding.reason) == ("wrong", f"{file} is no directory")


@pytest_twisted.ensureDeferred
async def test_a_state_directory_that_cannot_be_written_to(sandbox: Sandbox) -> None:
    finding = found(await checked(sandbox, guard_state_dir=Path("/proc/lotusguard")), "state directory", "writable")
    assert finding.state == "wrong"
    assert "cannot be written to" in finding.reason
    assert "chown" in finding.remedy


@pytest_twisted.ensureDeferred
async def test_a_state_directory_that_is_not_there_yet_is_not_made(sandbox: Sandbox, tmp_path: Path) -> None:
    directory = tmp_path / "var" / "lotusguard"
    finding = found(await checked(sandbox, guard_state_dir=directory), "state directory", "writable")
    assert finding.state == "fine"
    assert "made at the first start" in finding.reason
    assert not (tmp_path / "var").exists()


@pytest_twisted.ensureDeferred
async def test_a_state_directory_that_everybody_can_read(sandbox: Sandbox, tmp_path: Path) -> None:
    open_to_all(tmp_path)
    finding = found(await checked(sandbox, guard_state_dir=tmp_path), "state directory", "private")
    assert finding.state == "warning"
    assert f"chmod 700 {tmp_path}" in finding.remedy


@pytest_twisted.ensureDeferred
async def test_a_full_file_system(sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, state in ((10 * 1024, "wrong"), (10 * 1024 * 1024, "warning")):
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        monkeypatch.setattr("lotusguard.check.host.shutil.disk_usage", lambda _, usage=usage: usage)
        assert found(await checked(sandbox, guard_state_dir=tmp_path), "state directory", "space").state == state


@pytest_twisted.ensureDeferred
async def test_settings_that_are_probably_not_meant(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUARD_UPSTREEM", "http://127.0.0.1:8071")
    finding = found(await checked(sandbox), "settings", "suspicious")
    assert finding.state == "warning"
    assert "GUARD_UPSTREEM is no setting; did you mean GUARD_UPSTREAM?" in finding.reason


@pytest_twisted.ensureDeferred
async def test_no_operators_token(sandbox: Sandbox) -> None:
    assert found(await checked(sandbox, guard_admin_token=""), "settings", "GUARD_ADMIN_TOKEN").state == "warning"


@pytest_twisted.ensureDeferred
async def test_a_homeserver_without_rooms_leaves_the_filter_open(sandbox: Sandbox) -> None:
    assert isinstance(sandbox.homeserver, FakeSynapse)
    assert found(await checked(sandbox), "synapse", "state by type").state == "unknown"


def test_the_table_has_a_mark_a_reason_and_a_remedy_for_each() -> None:
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
