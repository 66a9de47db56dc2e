# SPDX-License-Identifier: Apache-2.0
"""Who may do what: ``io.lotus.call_permissions`` and ``io.lotus.lobby``, with power levels."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lotusguard.rules.permissions import (
    Action,
    CallPermissions,
    Lobby,
    permissions_as_json,
    read_lobby,
    read_permissions,
)
from lotusguard.rules.policy import Malformed, Policy, needs_levels, read_policy
from lotusguard.rules.power_levels import PowerLevels
from lotusguard.rules.sources import ALL_SOURCES, CAMERA, MICROPHONE, SCREEN_SHARE, SCREEN_SHARE_AUDIO, Source
from lotusguard.rules.state import (
    CALL_PERMISSIONS,
    CREATE,
    LOBBY,
    POWER_LEVELS,
    ROOM_QUALITY,
    VOICE_LIMIT,
    StateEvent,
)

ALICE, DJ, GUEST = "@alice:example.org", "@dj:example.org", "@guest:example.org"
EVERYTHING = frozenset(ALL_SOURCES)


def policy_of(
    permissions: Any = None, *, levels: dict[str, Any] | None = None, version: str = "11", **contents: Any
) -> Policy:
    by_type = {CREATE: {"room_version": version}, POWER_LEVELS: {"users": {ALICE: 100, DJ: 10}} | (levels or {})}
    by_type |= {CALL_PERMISSIONS: permissions} if permissions is not None else {}
    by_type |= {{"lobby": LOBBY, "quality": ROOM_QUALITY, "limit": VOICE_LIMIT}[k]: v for k, v in contents.items()}
    return read_policy({kind: StateEvent(kind, content, ALICE) for kind, content in by_type.items()})[0]


def test_missing_key_is_no_restriction() -> None:
    policy = policy_of({"camera": 50})
    assert policy.allowed_sources(GUEST) == EVERYTHING - {CAMERA}
    assert policy.may_join(GUEST)
    assert policy.may_start(GUEST)


@pytest.mark.parametrize("action", [Action.JOIN, Action.START, Action.BYPASS_LIMIT, Action.MODERATE])
def test_action_needs_its_level(action: Action) -> None:
    policy = policy_of({action.value: 10})
    assert [policy.allows(action, user) for user in (ALICE, DJ, GUEST)] == [True, True, False]


def test_screen_share_includes_its_audio() -> None:
    assert policy_of({"screen_share": 50}).allowed_sources(DJ) == {MICROPHONE, CAMERA}


def test_nobody_bypasses_the_limit_unless_the_event_says_so() -> None:
    assert not policy_of({"join": 0}).bypasses_limit(ALICE)
    assert not Policy(2).bypasses_limit(ALICE)
    assert policy_of({"bypass_limit": 100}).bypasses_limit(ALICE)


def test_bypassing_the_lobby_and_moderating_need_the_kick_level_unless_the_event_says_otherwise() -> None:
    for policy, expected in (
        (policy_of(lobby={"enabled": True}), [True, False]),
        (policy_of(lobby={"enabled": True}, levels={"kick": 10}), [True, True]),
        (policy_of({"moderate": 10, "bypass_lobby": 10}), [True, True]),
        (policy_of({"moderate": 101, "bypass_lobby": 101}), [False, False]),
    ):
        assert [policy.may_moderate(user) for user in (ALICE, DJ)] == expected
        assert [policy.bypasses_lobby(user) for user in (ALICE, DJ)] == expected


@pytest.mark.parametrize(
    ("permissions", "named"),
    [
        (CallPermissions(), False),
        (CallPermissions({Action.JOIN: 0}, {"@a:x": {Action.JOIN: False}}), False),
        (CallPermissions({Action.BYPASS_LIMIT: 0}), True),
        (CallPermissions({}, {"@a:x": {Action.JOIN: True}, "@b:x": {Action.BYPASS_LIMIT: False}}), True),
    ],
)
def test_a_level_or_an_exception_names_an_action(permissions: CallPermissions, named: bool) -> None:
    assert permissions.names(Action.BYPASS_LIMIT) is named
    assert Policy(permissions=permissions).has_bypass is named


def test_a_room_that_names_no_permissions_has_no_bypass_and_writes_none() -> None:
    assert not Policy().has_bypass
    assert permissions_as_json(None) == {}
    assert permissions_as_json(CallPermissions({Action.JOIN: 5})) == {"join": 5}
    exceptions = CallPermissions({}, {"@a:x": {Action.START: False}})
    assert permissions_as_json(exceptions) == {"users": {"@a:x": {"start": False}}}


def test_exceptions_win_over_levels_in_both_directions() -> None:
    policy = policy_of(
        {
            "microphone": 50,
            "users": {
                GUEST: {"microphone": True, "bypass_limit": True, "moderate": True},
                ALICE: {"join": False, "screen_share": False},
            },
        }
    )
    assert policy.allowed_sources(GUEST) == EVERYTHING
    assert policy.bypasses_limit(GUEST)
    assert policy.may_moderate(GUEST)
    assert not policy.may_join(ALICE)
    assert policy.allowed_sources(ALICE) == {MICROPHONE, CAMERA}
    assert policy.allowed_sources(DJ) == EVERYTHING - {MICROPHONE}


def test_room_quality_forbids_for_moderators_and_exceptions_too() -> None:
    policy = policy_of({"camera": 0, "users": {ALICE: {"camera": True}}}, quality={"allow_camera": False})
    assert CAMERA not in policy.allowed_sources(ALICE)


def test_creators_of_room_version_12_may_do_what_any_level_may() -> None:
    policy = policy_of({"join": 10**9, "camera": 10**9}, version="12")
    assert policy.may_join(ALICE)
    assert policy.allowed_sources(ALICE) == EVERYTHING
    assert not policy.may_join(DJ)


def test_unknown_levels_refuse_and_withhold_nothing_and_give_no_power() -> None:
    events = {CALL_PERMISSIONS: {action.value: 50 for action in Action}, LOBBY: {"enabled": True}}
    policy, _ = read_policy({kind: StateEvent(kind, content) for kind, content in events.items()})
    assert policy.levels is None
    assert policy.allowed_sources(GUEST) == EVERYTHING
    assert policy.may_join(GUEST)
    assert policy.may_start(GUEST)
    assert policy.bypasses_lobby(GUEST)
    assert not policy.bypasses_limit(GUEST)
    assert not policy.may_moderate(GUEST)


def test_exceptions_hold_while_levels_are_unknown() -> None:
    content = {"join": 50, "users": {GUEST: {"join": False, "bypass_limit": True}}}
    policy, _ = read_policy({CALL_PERMISSIONS: StateEvent(CALL_PERMISSIONS, content)})
    assert not policy.may_join(GUEST)
    assert policy.bypasses_limit(GUEST)


@pytest.mark.parametrize("value", [True, False, None, "50", 50.0, [50], {}, float("inf")])
def test_level_that_is_not_an_integer_is_ignored_alone(value: Any) -> None:
    permissions, malformed = read_permissions({"camera": value, "microphone": 25, "x-unknown": value})
    assert permissions == CallPermissions({Action.MICROPHONE: 25})
    assert malformed == {"camera"}


@pytest.mark.parametrize("value", [1, 0, None, "true", [], {}])
def test_exception_that_is_not_a_boolean_is_ignored_alone(value: Any) -> None:
    permissions, malformed = read_permissions({"users": {DJ: {"microphone": value, "join": False, "x": 5}}})
    assert permissions == CallPermissions(users={DJ: {Action.JOIN: False}})
    assert malformed == {f"users.{DJ}.microphone"}


@pytest.mark.parametrize(
    ("content", "names"),
    [([], {""}), (None, {""}), ("x", {""}), ({"users": []}, {"users"}), ({"users": {DJ: 5}}, {f"users.{DJ}"})],
)
def test_content_of_another_shape_permits_as_if_absent(content: Any, names: set[str]) -> None:
    assert read_permissions(content) == (CallPermissions(), frozenset(names))


def test_every_exception_counts_however_many_there_are() -> None:
    users = {f"@user{number}:example.org": {"join": False} for number in range(2_000)}
    permissions, malformed = read_permissions({"users": users})
    assert len(permissions.users) == 2_000
    assert not malformed


@pytest.mark.parametrize(
    ("content", "lobby", "malformed"),
    [
        ({"enabled": True}, Lobby(), set()),
        ({"enabled": True, "message": "Please wait."}, Lobby("Please wait."), set()),
        ({"enabled": True, "message": 5}, Lobby(), {"message"}),
        ({"enabled": False}, None, set()),
        ({"message": "x"}, None, set()),
        ({}, None, set()),
        ({"enabled": 1}, None, {"enabled"}),
        ({"enabled": "true"}, None, {"enabled"}),
        ([], None, {""}),
    ],
)
def test_only_json_true_switches_the_lobby_on(content: Any, lobby: Lobby | None, malformed: set[str]) -> None:
    assert read_lobby(content) == (lobby, frozenset(malformed))


def test_message_of_the_lobby_is_cut() -> None:
    lobby, malformed = read_lobby({"enabled": True, "message": "x" * 60_000})
    assert lobby == Lobby("x" * 500)
    assert not malformed


def test_malformed_keys_are_named_with_their_event() -> None:
    contents = {
        CALL_PERMISSIONS: {"join": "1"},
        LOBBY: 5,
        VOICE_LIMIT: {"max_users": "2"},
        ROOM_QUALITY: {"allow_camera": 0},
    }
    policy, malformed = read_policy({kind: StateEvent(kind, content) for kind, content in contents.items()})
    assert not policy
    assert malformed == {
        Malformed(CALL_PERMISSIONS, "join"),
        Malformed(LOBBY, ""),
        Malformed(VOICE_LIMIT, "max_users"),
        Malformed(ROOM_QUALITY, "allow_camera"),
    }


@pytest.mark.parametrize(
    ("kind", "content", "needed"),
    [
        (CALL_PERMISSIONS, {"camera": 50}, True),
        (CALL_PERMISSIONS, {"users": {DJ: {"join": False}}}, True),
        (CALL_PERMISSIONS, {}, False),
        (CALL_PERMISSIONS, {"camera": "50"}, False),
        (LOBBY, {"enabled": True}, True),
        (LOBBY, {"enabled": False}, False),
        (VOICE_LIMIT, {"max_users": 5}, False),
        (ROOM_QUALITY, {"allow_camera": False}, False),
    ],
)
def test_levels_are_needed_only_for_permissions_and_lobby(kind: str, content: Any, needed: bool) -> None:
    events = {kind: StateEvent(kind, content), CREATE: StateEvent(CREATE, {}, ALICE)}
    assert needs_levels(events) is needed
    policy, _ = read_policy(events)
    assert (policy.levels is not None) is needed


# -- properties ----------------------------------------------------------------------------------------

LEVELS = st.integers(-2, 102)
EXCEPTIONS = st.dictionaries(
    st.sampled_from([ALICE, DJ, GUEST]), st.dictionaries(st.sampled_from(Action), st.booleans()), max_size=3
)
PERMISSIONS = st.builds(CallPermissions, st.dictionaries(st.sampled_from(Action), LEVELS), EXCEPTIONS)
POLICIES = st.builds(Policy, forbidden=st.frozensets(st.sampled_from(Source)), permissions=PERMISSIONS)


def at_level(policy: Policy, level: int) -> Policy:
    return Policy(forbidden=policy.forbidden, permissions=policy.permissions, levels=PowerLevels({GUEST: level}))


@given(POLICIES, LEVELS, LEVELS)
def test_rights_grow_with_the_level(policy: Policy, one: int, other: int) -> None:
    lower, higher = at_level(policy, min(one, other)), at_level(policy, max(one, other))
    assert lower.allowed_sources(GUEST) <= higher.allowed_sources(GUEST)
    for action in Action:
        assert lower.allows(action, GUEST) <= higher.allows(action, GUEST)


@given(POLICIES, LEVELS)
def test_rights_are_never_wider_than_room_quality(policy: Policy, level: int) -> None:
    assert not at_level(policy, level).allowed_sources(GUEST) & policy.forbidden
    assert not policy.allowed_sources(GUEST) & policy.forbidden


CONTENT = st.fixed_dictionaries(
    {},
    optional={action.value: LEVELS | st.none() | st.booleans() | st.text(max_size=3) for action in Action}
    | {
        "users": st.dictionaries(
            st.sampled_from([ALICE, DJ, GUEST]),
            st.dictionaries(st.sampled_from([a.value for a in Action]), st.booleans() | st.integers()),
        )
    },
)


@given(CONTENT, st.randoms())
def test_order_of_keys_changes_nothing(content: dict[str, Any], random: Any) -> None:
    shuffled_keys = list(content)
    random.shuffle(shuffled_keys)
    assert read_permissions({key: content[key] for key in shuffled_keys}) == read_permissions(content)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
        lambda x: (
            st.lists(x)
            | st.dictionaries(
                st.sampled_from(
                    [*(a.value for a in Action), "users", "enabled", "message", "max_users", "allow_camera", ALICE]
                ),
                x,
            )
        ),
    )
)
def test_any_content_is_read_without_an_error(content: Any) -> None:
    kinds = (VOICE_LIMIT, ROOM_QUALITY, CALL_PERMISSIONS, LOBBY, POWER_LEVELS, CREATE)
    policy, _ = read_policy({kind: StateEvent(kind, content, ALICE) for kind in kinds})
    assert policy.allowed_sources(ALICE) <= EVERYTHING
    assert SCREEN_SHARE_AUDIO in policy.allowed_sources(ALICE) or SCREEN_SHARE not in policy.allowed_sources(ALICE)
