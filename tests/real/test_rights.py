# SPDX-License-Identifier: Apache-2.0
"""Rights by power level in a running call, with the real services. The module inside Synapse reports changes."""

from __future__ import annotations

import pytest

from tests.real.signalling import signalling
from tests.real.stack import Stack, claims_in
from tests.real.timings import SPEAKERS, demote, promote, silent_audience

PATIENCE = 20.0
"""Seconds that a change may take on a busy machine. `benchmarks.real_stack` measures it on an idle one."""


@pytest.mark.parametrize("needed", [{}, {"camera": 100, "screen_share": 100}])
def test_a_promoted_listener_is_heard_and_a_demoted_speaker_is_not(pushed_stack: Stack, needed: dict[str, int]) -> None:
    call = silent_audience(pushed_stack, **needed)
    assert not call.speaker.may_publish("MICROPHONE")
    assert call.speaker.may_publish("CAMERA") is not bool(needed)
    assert promote(pushed_stack, call) < PATIENCE
    assert call.speaker.may_publish("CAMERA") is not bool(needed)
    call.speaker.publish("MICROPHONE")
    call.listener.hears(call.speaker, "MICROPHONE")
    assert demote(pushed_stack, call) < PATIENCE
    assert call.listener.tracks_of(call.speaker) == []
    call.speaker.cannot_publish("MICROPHONE")
    assert (call.listener.ended, call.speaker.ended) == (None, None)


def test_a_refreshed_token_carries_the_rights_after_a_promotion(pushed_stack: Stack) -> None:
    (bob,) = pushed_stack.users("bob")
    room_id = pushed_stack.room()
    pushed_stack.set_state(room_id, "io.lotus.call_permissions", {"microphone": SPEAKERS})
    token = pushed_stack.ask_token(bob, room_id).content["jwt"]
    with signalling(pushed_stack.sfu_url, token) as connection:
        assert "microphone" not in claims_in(connection.refreshed_token())["video"]["canPublishSources"]
        pushed_stack.set_level(room_id, bob, SPEAKERS)
        refreshed = connection.refreshed_token()
        assert "microphone" in claims_in(refreshed)["video"]["canPublishSources"]
    call = pushed_stack.connect(bob, refreshed)
    assert call.may_publish("MICROPHONE")
    call.publish("MICROPHONE")
