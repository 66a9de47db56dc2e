# SPDX-License-Identifier: Apache-2.0
"""SIGHUP reads secrets and the YAML file again; a wrong one changes nothing; calls and seats are kept."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet import reactor

from lotusguard.config import Settings, read_settings
from lotusguard.reload import APPLY
from lotusguard.rules.jwt import SfuKey
from lotusguard.rules.state import LOBBY
from lotusguard.rules.state import VOICE_LIMIT as LIMIT
from lotusguard.sandbox.demo.sandbox import KEY, SECRET, Sandbox
from tests.calls import ALICE, BOB, logged, named, room_of
from tests.conftest import StartSandbox, until
from tests.guardprocess import GuardProcess, ProcessSandbox
from tests.residence.helpers import GUARD, invited_room, readiness, resident_sandbox


def changed(sandbox: Sandbox, **settings: object) -> Settings:
    """The guard's settings with these changes."""
    given = {name: getattr(sandbox.settings, name) for name in sandbox.settings.model_fields_set}
    return read_settings(**(given | settings))


async def operator_code(sandbox: Sandbox, token: str) -> int:
    answer = await sandbox.request("GET", f"{sandbox.admin_url}/rooms", None, {"Authorization": f"Bearer {token}"})
    return answer.code


@pytest_twisted.ensureDeferred
async def test_secrets_are_replaced_and_seats_are_kept(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    await sandbox.enter(ALICE, room_id)
    old, new = sandbox.admin_token, sandbox.homeserver.add_user("second-admin", admin=True)
    sandbox.guard.reload(changed(sandbox, guard_admin_token="new-operators", matrix_token=new))
    assert await operator_code(sandbox, "new-operators") == 200
    assert await operator_code(sandbox, "sandbox-operators") == 403
    assert (await sandbox.ask_token(BOB, room_id)).code == 403, "Alice's seat is kept"
    before = len(sandbox.homeserver.seen)
    await sandbox.request("GET", f"{sandbox.admin_url}/readyz")
    used = {asked.header("Authorization") for asked in list(sandbox.homeserver.seen)[before:]}
    assert f"Bearer {new}" in used
    assert f"Bearer {old}" not in used


@pytest_twisted.ensureDeferred
async def test_new_matrix_token_reaches_the_guards_account(start_sandbox: StartSandbox) -> None:
    sandbox = await resident_sandbox(start_sandbox)
    room_id = await invited_room(sandbox, 3)
    logins = sandbox.homeserver.logins
    old = next(token for token, login in logins.items() if login.user_id == GUARD)
    new = sandbox.homeserver.add_user("guard")
    sandbox.guard.reload(changed(sandbox, matrix_token=new))
    del logins[old]
    await sandbox.homeserver.drop_connections()

    def limit() -> object:
        pushed = sandbox.guard.residence.state_of(room_id)
        return pushed is not None and pushed.live and pushed.events[LIMIT].mapping.get("max_users")

    sandbox.homeserver.set_state(room_id, LIMIT, {"max_users": 7})
    await until(lambda: limit() == 7)
    assert (await readiness(sandbox))[1]["rooms"]["sync"] == "alive"


@pytest_twisted.ensureDeferred
async def test_dry_run_can_be_switched_at_run_time(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    await sandbox.enter(ALICE, room_id)
    sandbox.guard.reload(changed(sandbox, guard_dry_run=True))
    assert (await sandbox.ask_token(BOB, room_id)).code == 200
    report = json.loads((await sandbox.request("GET", f"{sandbox.admin_url}/readyz")).body)
    assert report["dry_run"] is True
    sandbox.guard.reload(changed(sandbox))
    other = room_of(sandbox, 1)
    await sandbox.enter(ALICE, other)
    assert (await sandbox.ask_token(BOB, other)).code == 403


@pytest_twisted.ensureDeferred
async def test_shorter_time_to_believe_counts_for_memberships_too(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_policy_ttl=3600)
    room_id = room_of(sandbox)
    assert (await sandbox.ask_token(BOB, room_id)).code == 200
    sandbox.homeserver.kick(room_id, BOB, sender=ALICE)
    assert (await sandbox.ask_token(BOB, room_id)).code == 200
    sandbox.guard.reload(changed(sandbox, guard_policy_ttl=0.001))
    assert (await sandbox.ask_token(BOB, room_id)).code == 403


@pytest_twisted.ensureDeferred
async def test_settings_that_need_a_restart_are_named_and_not_applied(sandbox: Sandbox) -> None:
    with logged() as events:
        sandbox.guard.reload(changed(sandbox, guard_seat_ttl=7, guard_token_ttl=60, livekit_secret=""))
    assert named(events, "reloaded") == ["settings were read again; changed: GUARD_TOKEN_TTL"]
    (line,) = named(events, "reload_incomplete")
    assert line.endswith("restart it: GUARD_SEAT_TTL, LIVEKIT_SECRET")


@pytest.mark.parametrize("name", ["guard_appservice_token", "guard_admin_token"])
@pytest_twisted.ensureDeferred
async def test_listener_is_not_opened_by_a_token_that_is_gone(start_sandbox: StartSandbox, name: str) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_appservice_port=0, guard_appservice_token="hs")
    with logged() as events:
        sandbox.guard.reload(changed(sandbox, **{name: ""}))
    (line,) = named(events, "reload_incomplete")
    assert line.endswith(f"restart it: {name.upper()}")
    proxied = await sandbox.request("POST", sandbox.appservice_url + "/_matrix/client/v1/rtc/livekit/get_token", b"{}")
    assert proxied.code == 401
    assert await operator_code(sandbox, "sandbox-operators") == 200


@pytest.mark.parametrize(("before", "after"), [("", "new-operators"), ("sandbox-operators", "")])
@pytest_twisted.ensureDeferred
async def test_operators_token_counts_everywhere_or_nowhere(
    start_sandbox: StartSandbox, before: str, after: str
) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_admin_token=before, guard_invites="off")
    room_id = room_of(sandbox)
    sandbox.homeserver.set_state(room_id, LOBBY, {"enabled": True})
    sandbox.guard.reload(changed(sandbox, guard_admin_token=after))
    openid = sandbox.homeserver.openid_token(BOB)
    body = json.dumps({"room": room_id, "device_id": "X", "openid_token": openid}).encode()
    asked = await sandbox.request("POST", f"{sandbox.url}/sfu/get?lobby=poll", body)
    assert (asked.code == 202) is bool(before), "the lobby is on if there was a token at the start"
    assert (await operator_code(sandbox, before or after) == 200) is bool(before)


@pytest_twisted.ensureDeferred
async def test_app_service_token_that_is_new_counts_at_once(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_appservice_port=0)
    sandbox.guard.reload(changed(sandbox, guard_appservice_token="hs"))
    proxied = await sandbox.request("POST", sandbox.appservice_url + "/_matrix/client/v1/rtc/livekit/get_token", b"{}")
    assert proxied.code == 401


@pytest_twisted.ensureDeferred
async def test_a_new_livekit_secret_signs_what_is_issued(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, livekit_secret="an-older-secret-of-our-own-00000")
    room_id = room_of(sandbox, allow_camera=False)
    answer = json.loads((await sandbox.ask_token(ALICE, room_id)).body)
    sandbox.guard.reload(changed(sandbox, livekit_secret=SECRET))
    rebuilt = json.loads((await sandbox.ask_token(ALICE, room_id)).body)
    assert "canPublishSources" not in SfuKey(KEY, SECRET).read(answer["jwt"])["video"]
    assert "camera" not in SfuKey(KEY, SECRET).read(rebuilt["jwt"])["video"]["canPublishSources"]


def test_the_documentation_lists_what_can_be_changed() -> None:
    page = (Path(__file__).parent.parent / "docs" / "configuration.md").read_text(encoding="utf-8")
    section = page.partition("## Changing settings while the guard runs")[2].partition("\n## ")[0]
    assert section
    assert {name for name in APPLY if f"`{name.upper()}`" not in section} == set()


# -- as a process --------------------------------------------------------------------------------------------


@pytest_twisted.async_yield_fixture
async def process(tmp_path: Path) -> AsyncIterator[ProcessSandbox]:
    """A guard whose operators' token and YAML file can be replaced."""
    (tmp_path / "token").write_text("first")
    (tmp_path / "lotusguard.yaml").write_text("guard_token_ttl: 100\n")
    sandbox = ProcessSandbox(
        reactor, guard_state_dir=tmp_path / "state", guard_admin_token_from_file=tmp_path / "token",
        guard_config=tmp_path / "lotusguard.yaml", guard_reconcile_interval=3600,
    )  # fmt: skip
    await sandbox.start()
    yield sandbox
    await sandbox.stop()


@pytest_twisted.ensureDeferred
async def test_sighup_reads_files_again_all_or_nothing(process: ProcessSandbox, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("")
    process.process.signal("HUP")
    await until(lambda: "nothing was reloaded: GUARD_ADMIN_TOKEN_FROM_FILE" in process.process.output)
    (tmp_path / "token").write_text("second")
    (tmp_path / "lotusguard.yaml").write_text("guard_token_ttl: never\n")
    process.process.signal("HUP")
    await until(lambda: "nothing was reloaded: GUARD_TOKEN_TTL" in process.process.output)
    assert await operator_code(process, "first") == 200
    (tmp_path / "lotusguard.yaml").write_text("")
    process.process.signal("HUP")
    await until(lambda: "nothing was reloaded: GUARD_CONFIG" in process.process.output)
    (tmp_path / "lotusguard.yaml").write_text("guard_token_ttl: 50\n")
    process.process.signal("HUP")
    await until(lambda: "changed: GUARD_ADMIN_TOKEN, GUARD_TOKEN_TTL" in process.process.output)
    assert await operator_code(process, "second") == 200
    assert not process.process.ended.called


@pytest_twisted.ensureDeferred
async def test_port_in_use_ends_the_process_even_with_a_state_directory(
    process: ProcessSandbox, tmp_path: Path
) -> None:
    first: GuardProcess = process.process
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken, port = other.getsockname()[1], process.port
        process.port = taken
        with pytest.raises(AssertionError):
            await process.start_guard(guard_state_dir=tmp_path / "other")
        assert await process.process.ended == 1
    assert "GUARD_BIND_PORT: cannot listen on" in process.process.output
    process.process, process.port = first, port


@pytest_twisted.ensureDeferred
async def test_a_wrong_setting_ends_the_process_with_a_status_of_its_own(process: ProcessSandbox) -> None:
    first = process.process
    with pytest.raises(AssertionError):
        await process.start_guard(guard_overflow="sometimes")
    assert await process.process.ended == os.EX_CONFIG
    assert "GUARD_OVERFLOW" in process.process.output
    process.process = first
