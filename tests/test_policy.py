# SPDX-License-Identifier: Apache-2.0
"""What admins write into room state, read as it is meant and no further."""

from __future__ import annotations

from typing import Any

import pytest

from lotusguard.rules.policy import NO_POLICY, Policy, forbidden_sources, max_users
from lotusguard.rules.sources import CAMERA, SCREEN_SHARE, SCREEN_SHARE_AUDIO


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
    assert max_users(content) == (limit, malformed)


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
    assert forbidden_sources(content) == (frozenset(forbidden), malformed)


def test_a_policy_that_limits_nothing_is_none() -> None:
    assert not NO_POLICY
    assert Policy(1)
    assert Policy(forbidden=frozenset({CAMERA}))
