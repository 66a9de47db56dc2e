# SPDX-License-Identifier: Apache-2.0
"""The policy that a room's moderators write into room state: limit and forbidden sources."""

from __future__ import annotations

from typing import Any

import pytest

from lotusguard.rules.permissions import Action, CallPermissions, Lobby
from lotusguard.rules.policy import (
    NO_POLICY,
    Policy,
    read_policy,
    with_default_limit,
)
from lotusguard.rules.sources import CAMERA, SCREEN_SHARE, SCREEN_SHARE_AUDIO
from lotusguard.rules.state import ROOM_QUALITY, VOICE_LIMIT, StateEvent


@pytest.mark.parametrize(
    ("content", "limit", "malformed"),
    [
        ({"max_users": 5}, 5, False),
        ({"max_users": 1}, 1, False),
        ({"max_users": 5.0}, 5, False),
        ({"max_users": 0}, None, False),
        ({"max_users": -3}, None, False),
        ({"max_users": 0.5}, None, False),
        ({}, None, False),
        ({"max_users": None}, None, False),
        ({"max_users": "5"}, None, True),
        ({"max_users": True}, None, True),
        ({"max_users": 10**400}, 10**400, False),
        ({"max_users": float("nan")}, None, True),
        ({"max_users": [5]}, None, True),
        ({"max_users": float("inf")}, None, True),
        ([], None, True),
        (None, None, True),
    ],
)
def test_a_limit_is_a_number_above_zero(content: Any, limit: int | None, malformed: bool) -> None:
    policy, unusable = read_policy({VOICE_LIMIT: StateEvent(VOICE_LIMIT, content)})
    assert (policy.max_users, bool(unusable)) == (limit, malformed)


@pytest.mark.parametrize(
    ("content", "forbidden", "malformed"),
    [
        ({"allow_screenshare": False}, {SCREEN_SHARE, SCREEN_SHARE_AUDIO}, False),
        ({"allow_camera": False}, {CAMERA}, False),
        ({"allow_camera": False, "allow_screenshare": False}, {CAMERA, SCREEN_SHARE, SCREEN_SHARE_AUDIO}, False),
        ({"allow_camera": True, "allow_screenshare": True, "max_bitrate": 5}, set(), False),
        ({"allow_camera": None, "allow_screenshare": 0}, set(), True),
        ({"allow_screenshare": "false"}, set(), True),
        ({}, set(), False),
        ("no", set(), True),
    ],
)
def test_only_json_false_forbids(content: Any, forbidden: set[Any], malformed: bool) -> None:
    policy, unusable = read_policy({ROOM_QUALITY: StateEvent(ROOM_QUALITY, content)})
    assert (policy.forbidden, bool(unusable)) == (frozenset(forbidden), malformed)


def test_policy_is_true_if_it_enforces_something() -> None:
    assert not NO_POLICY
    assert Policy(1)
    assert Policy(forbidden=frozenset({CAMERA}))
    assert Policy(lobby=Lobby())
    assert Policy(permissions=CallPermissions(users={"@a:b": {Action.JOIN: False}}))
    assert not Policy(permissions=CallPermissions())


def test_limit_and_forbidden_sources_are_read_from_their_events() -> None:
    contents = {VOICE_LIMIT: {"max_users": 3}, ROOM_QUALITY: {"allow_camera": False}}
    policy, malformed = read_policy({kind: StateEvent(kind, content) for kind, content in contents.items()})
    assert (policy.max_users, policy.forbidden) == (3, frozenset({CAMERA}))
    assert not malformed
    assert read_policy({}) == (NO_POLICY, frozenset())


@pytest.mark.parametrize(
    ("content", "limit"),
    [
        (None, 10), ({}, 10), ({"max_users": None}, 10), ({"max_users": "5"}, 10), ({"max_users": True}, 10), ([], 10),
        ({"max_users": 5}, 5), ({"max_users": 50}, 50), ({"max_users": 0}, None), ({"max_users": -1}, None),
    ],
)  # fmt: skip
def test_default_limit_applies_where_the_room_sets_none(content: Any, limit: int | None) -> None:
    events = {} if content is None else {VOICE_LIMIT: StateEvent(VOICE_LIMIT, content)}
    policy, _ = read_policy(events)
    assert with_default_limit(policy, 10).max_users == limit
    assert with_default_limit(policy, None) == policy


def test_default_limit_leaves_the_rest_of_the_policy() -> None:
    policy = with_default_limit(Policy(forbidden=frozenset({CAMERA})), 10)
    assert (policy.max_users, policy.forbidden) == (10, frozenset({CAMERA}))
