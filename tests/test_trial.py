# SPDX-License-Identifier: Apache-2.0
"""``lotusguard trial``: a join through the running guard shows whether it decides and rebuilds tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor

from lotusguard.check.trial import TrialFailed, try_join
from lotusguard.config import Settings, read_settings
from lotusguard.environment import read_environment_file
from lotusguard.sandbox.demo.sandbox import Sandbox
from lotusguard.sandbox.faults import Fault
from tests.conftest import StartSandbox
from tests.synapse import Guarded


def settings_of(sandbox: Sandbox, **given: Any) -> Settings:
    known = {name: getattr(sandbox.settings, name) for name in sandbox.settings.model_fields_set}
    return read_settings(**(known | given))


async def tried(sandbox: Sandbox, **given: Any) -> str:
    room_id = sandbox.homeserver.create_room("admin")
    return await try_join(settings_of(sandbox, **given), reactor, sandbox.url, room_id)


@pytest_twisted.ensureDeferred
async def test_trial_passes_with_a_working_guard_and_leaves_no_sfu_room(sandbox: Sandbox) -> None:
    assert await tried(sandbox) == "a token was issued and rebuilt"
    assert not sandbox.livekit.rooms


@pytest_twisted.ensureDeferred
async def test_trial_fails_if_the_guard_does_not_rebuild_tokens(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_dry_run=True)
    with pytest.raises(TrialFailed, match="the guard did not rebuild it"):
        await tried(sandbox, guard_dry_run=False)
    assert "GUARD_DRY_RUN" in await tried(sandbox)


@pytest_twisted.ensureDeferred
async def test_trial_fails_with_the_text_of_a_refusal(sandbox: Sandbox) -> None:
    with pytest.raises(TrialFailed, match="You are not a member of this room"):
        await try_join(settings_of(sandbox), reactor, sandbox.url, "!elsewhere:sandbox.local")


@pytest_twisted.ensureDeferred
async def test_trial_fails_if_another_secret_signed_the_token(sandbox: Sandbox) -> None:
    with pytest.raises(TrialFailed, match="our LIVEKIT_SECRET did not sign the token"):
        await tried(sandbox, livekit_secret="another-secret-of-the-same-length-1")


@pytest_twisted.ensureDeferred
async def test_trial_fails_if_upstream_issues_no_token(sandbox: Sandbox) -> None:
    sandbox.upstream.fault = Fault.status(500, json.dumps({"errcode": "M_UNKNOWN", "error": "no"}).encode())
    with pytest.raises(TrialFailed, match="500 M_UNKNOWN"):
        await tried(sandbox)


@pytest_twisted.ensureDeferred
async def test_trial_fails_if_nothing_listens(sandbox: Sandbox) -> None:
    await sandbox.guard.public.close(0)
    with pytest.raises(TrialFailed, match="nothing listens on"):
        await tried(sandbox)


@pytest_twisted.ensureDeferred
async def test_trial_creates_its_room_once_and_uses_it_again(sandbox: Sandbox) -> None:
    for _ in range(2):
        assert await try_join(settings_of(sandbox), reactor, sandbox.url) == "a token was issued and rebuilt"
    assert len(sandbox.homeserver.rooms) == 1


@pytest_twisted.ensureDeferred
async def test_an_account_that_replaces_another_gets_a_trial_room_of_its_own(sandbox: Sandbox) -> None:
    await try_join(settings_of(sandbox), reactor, sandbox.url)
    given = settings_of(sandbox, matrix_token=sandbox.homeserver.add_user("second"))
    for _ in range(2):
        assert await try_join(given, reactor, sandbox.url) == "a token was issued and rebuilt"
    assert len(sandbox.homeserver.rooms) == 2


@pytest_twisted.ensureDeferred
async def test_the_real_synapse_lets_the_account_create_the_room_once(guarded: Guarded) -> None:
    sandbox = guarded.sandbox
    for _ in range(2):
        assert await try_join(settings_of(sandbox), reactor, sandbox.url) == "a token was issued and rebuilt"
    asked = [json.loads(asked.body) for asked in sandbox.upstream.seen if asked.path == "/sfu/get" and asked.body]
    assert len(asked) == 2
    assert len({body["room"] for body in asked}) == 1


def test_an_environment_file_is_read_as_systemd_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "env"
    path.write_text(
        "# a comment\n; another\n\nPLAIN=one two\n  INDENTED=x\nDOUBLE=\"a # b\"\nSINGLE='c d'\nEMPTY=\n"
        "LONG=first \\\nsecond\nNOT A VARIABLE\nHASH=a#b\nEQUALS=a=b\n"
    )
    assert read_environment_file(path) == {
        "PLAIN": "one two", "INDENTED": "x", "DOUBLE": "a # b", "SINGLE": "c d", "EMPTY": "", "LONG": "first second",
        "HASH": "a#b", "EQUALS": "a=b",
    }  # fmt: skip
