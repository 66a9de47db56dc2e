# SPDX-License-Identifier: Apache-2.0
"""What ``lotusguard check`` finds with the real services."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.real.services import CHECKOUT
from tests.real.stack import Stack

OTHER_SECRET = "another-secret-of-the-same-length-1"


def checked(stack: Stack, **settings: str) -> tuple[int, dict[tuple[str, str], dict[str, Any]]]:
    """Exit status and findings of a check with the settings of the running guard, some of them replaced."""
    assert stack.guard is not None
    environment = os.environ | stack.guard.environment | settings
    asked = subprocess.run(
        [sys.executable, "-m", "lotusguard.cli", "check", "--json"],
        env=environment, cwd=CHECKOUT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert asked.stderr == ""
    return asked.returncode, {(one["about"], one["asked"]): one for one in json.loads(asked.stdout)["findings"]}


def test_a_correct_configuration_has_no_findings_and_leaves_no_room(stack: Stack) -> None:
    stack.room(2)
    before = stack.sfu_call("ListRooms", {}).content["rooms"]
    status, findings = checked(stack)
    assert {name: one for name, one in findings.items() if one["state"] != "fine"} == {}
    assert status == 0
    assert findings["lk-jwt-service", "its tokens"]["reason"].endswith("is signed with our key and secret")
    assert findings["lk-jwt-service", "the trial's room"]["reason"] == "was created at LIVEKIT_API and deleted again"
    assert findings["webhooks", "arrive"]["reason"].endswith("on the trial's room")
    assert findings["synapse", "state by type"]["reason"] == "only the requested type is sent"
    assert stack.sfu_call("ListRooms", {}).content["rooms"] == before


@pytest.mark.parametrize(
    ("settings", "finding", "said"),
    [
        ({"LIVEKIT_SECRET": OTHER_SECRET}, ("livekit", "key"), "LIVEKIT_SECRET is not its secret"),
        ({"LIVEKIT_SECRET": OTHER_SECRET}, ("lk-jwt-service", "its tokens"), "but not with our LIVEKIT_SECRET"),
        ({"LIVEKIT_KEY": "otherkey"}, ("livekit", "key"), "LiveKit does not know the API key 'otherkey'"),
        ({"LIVEKIT_KEY": "otherkey"}, ("lk-jwt-service", "its tokens"), "key 'realkey', ours is 'otherkey'"),
        ({"MATRIX_TOKEN": "syt_old"}, ("synapse", "access token"), "401 M_UNKNOWN_TOKEN"),
        ({"GUARD_SERVER_NAME": "example.org"}, ("synapse", "server name"), "'example.org'"),
    ],
)
def test_wrong_credentials_are_found(
    stack: Stack, settings: dict[str, str], finding: tuple[str, str], said: str
) -> None:
    status, findings = checked(stack, **settings)
    assert status == 1
    assert findings[finding]["state"] == "wrong"
    assert said in findings[finding]["reason"]


def test_a_user_who_is_not_a_server_admin_is_warned_about(stack: Stack) -> None:
    status, findings = checked(stack, MATRIX_TOKEN=stack.tokens[stack.moderator])
    assert status == 0
    told = findings["synapse", "access token"]
    assert told["state"] == "warning"
    assert "only the rooms to which it was invited are enforced" in told["reason"]


@pytest.mark.parametrize(
    ("setting", "other", "about"),
    [
        ("SYNAPSE_API", "sfu_url", "synapse"),
        ("SYNAPSE_API", "upstream_url", "synapse"),
        ("LIVEKIT_API", "homeserver_url", "livekit"),
        ("LIVEKIT_API", "upstream_url", "livekit"),
        ("GUARD_UPSTREAM", "homeserver_url", "lk-jwt-service"),
        ("GUARD_UPSTREAM", "sfu_url", "lk-jwt-service"),
        ("GUARD_UPSTREAM", "guard_url", "lk-jwt-service"),
        ("GUARD_UPSTREAM", "operators_url", "lk-jwt-service"),
    ],
)
def test_an_address_of_another_service_is_found(stack: Stack, setting: str, other: str, about: str) -> None:
    status, findings = checked(stack, **{setting: getattr(stack, other)})
    assert status == 1
    wrong = {name for name, one in findings.items() if one["state"] == "wrong"}
    assert {about for about, _ in wrong} == {about}
    assert setting in "".join(findings[name]["remedy"] for name in wrong)
