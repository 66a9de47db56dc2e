# SPDX-License-Identifier: Apache-2.0
"""Only members of the Matrix room are in its call, with the real services. The module inside Synapse reports changes.

Reconciling is off: what is removed here was reported, or was noticed on arrival.
"""

from __future__ import annotations

import pytest

from tests.real.stack import Stack
from tests.real.timings import ban_holder_of_tokens, remove_publisher, session_length

RECONNECTIONS = 10
PATIENCE = 20.0
"""Seconds that a removal may take on a busy machine. `benchmarks.real_stack` measures it on an idle one."""


@pytest.mark.parametrize("new", [False, True])
def test_only_a_member_gets_a_token(pushed_stack: Stack, new: bool) -> None:
    (alice,) = pushed_stack.users("alice")
    room_id = pushed_stack.room()
    refused = pushed_stack.ask_token(alice, room_id, new=new, member=False)
    assert refused.status == 403
    assert refused.content == {"errcode": "M_FORBIDDEN", "error": "You are not a member of this room."}
    assert pushed_stack.ask_token(alice, room_id, new=new).status == 200
    pushed_stack.leave(alice, room_id)
    assert pushed_stack.ask_token(alice, room_id, new=new).status == 403


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("how", ["invited", "knocking", "reading a world-readable room"])
def test_somebody_who_is_near_a_room_and_not_in_it_gets_no_token(pushed_stack: Stack, how: str, new: bool) -> None:
    (alice,) = pushed_stack.users("alice")
    room_id = pushed_stack.room()
    if how == "invited":
        pushed_stack.moderate("invite", alice, room_id)
    elif how == "knocking":
        pushed_stack.set_state(room_id, "m.room.join_rules", {"join_rule": "knock"})
        pushed_stack.matrix("POST", f"/_matrix/client/v3/knock/{room_id}", {}, user=alice)
    else:
        pushed_stack.set_state(room_id, "m.room.history_visibility", {"history_visibility": "world_readable"})
        path = f"/_matrix/client/v3/rooms/{room_id}/state/m.room.create"
        assert pushed_stack.matrix("GET", path, user=alice)["room_version"]
    assert pushed_stack.ask_token(alice, room_id, new=new, member=False).status == 403


def test_nobody_gets_a_token_for_a_room_that_the_homeserver_does_not_know(pushed_stack: Stack) -> None:
    (alice,) = pushed_stack.users("alice")
    assert pushed_stack.ask_token(alice, "!unknown:example.org", member=False).status == 403


@pytest.mark.parametrize("action", ["ban", "kick", "leave"])
def test_a_user_who_loses_membership_is_removed_while_publishing(pushed_stack: Stack, action: str) -> None:
    removal = remove_publisher(pushed_stack, action)
    assert removal.ended < PATIENCE
    assert removal.last_frame < PATIENCE


def test_a_banned_user_is_removed_at_every_reconnection(pushed_stack: Stack) -> None:
    banned = ban_holder_of_tokens(pushed_stack)
    for token in banned.tokens:
        lengths = [session_length(pushed_stack, banned.user, token) for _ in range(RECONNECTIONS)]
        connected = [length for length in lengths if length is not None]
        assert connected, "the token has to work still"
        assert max(connected) < PATIENCE
    assert pushed_stack.ask_token(banned.user, banned.room_id).status == 403


def test_a_user_can_join_again_as_soon_as_they_are_unbanned(pushed_stack: Stack) -> None:
    banned = ban_holder_of_tokens(pushed_stack)
    pushed_stack.moderate("unban", banned.user, banned.room_id)
    call = pushed_stack.enter(banned.user, banned.room_id, listen=True)
    other = pushed_stack.enter(pushed_stack.moderator, banned.room_id)
    other.publish("MICROPHONE")
    call.hears(other, "MICROPHONE")
    assert call.ended is None
