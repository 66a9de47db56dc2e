# SPDX-License-Identifier: Apache-2.0
"""The recipes in ``docs/state-events.md`` do what their headings say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lotusguard.rules.policy import Policy, read_policy
from lotusguard.rules.sources import EVERY_SOURCE, MICROPHONE
from lotusguard.rules.state import CREATE, POWER_LEVELS, StateEvent

PAGE = Path(__file__).parents[2] / "docs" / "state-events.md"
MODERATOR, REGULAR, GUEST, EVE = "@mod:example.org", "@reg:example.org", "@guest:example.org", "@eve:example.org"
RECIPES = dict(re.findall(r"^### (.*?)\n(.*?)(?=^##)", PAGE.read_text(encoding="utf-8"), re.M | re.S))


def policy_of(recipe: str) -> Policy:
    """The policy of a recipe's curl line, which sends the event that is shown above it."""
    text = RECIPES[recipe]
    shown = re.findall(r"```json\n(.*?)```", text, re.S)
    sent = re.findall(r"-d '(.*?)' \"\$state/([\w.]+)/\"", text)
    assert [json.loads(content) for content in shown] == [json.loads(content) for content, _ in sent]
    ((content, kind),) = sent
    events = {
        kind: StateEvent(kind, json.loads(content), MODERATOR),
        POWER_LEVELS: StateEvent(POWER_LEVELS, {"users": {MODERATOR: 50, REGULAR: 1}}, MODERATOR),
        CREATE: StateEvent(CREATE, {"room_version": "11"}, MODERATOR),
    }
    policy, malformed = read_policy(events)
    assert not malformed
    assert policy
    return policy


def sources(recipe: str, *users: str) -> list[frozenset[object]]:
    policy = policy_of(recipe)
    assert all(policy.may_join(user) for user in users)
    return [frozenset(policy.allowed_sources(user)) for user in users]


def test_only_speakers_talk_on_a_stage() -> None:
    assert sources("Only speakers talk", MODERATOR, REGULAR) == [EVERY_SOURCE, frozenset()]


def test_moderators_start_the_call() -> None:
    policy = policy_of("Moderators start the call")
    assert [policy.may_start(user) for user in (MODERATOR, REGULAR)] == [True, False]
    assert policy.may_join(REGULAR)


def test_voice_only_applies_to_moderators_too() -> None:
    assert sources("Voice only", MODERATOR, GUEST) == [{MICROPHONE}, {MICROPHONE}]


def test_guests_only_listen() -> None:
    assert sources("Guests only listen", REGULAR, GUEST) == [EVERY_SOURCE, frozenset()]


def test_one_person_is_muted() -> None:
    assert sources("Mute one person", EVE, GUEST) == [EVERY_SOURCE - {MICROPHONE}, EVERY_SOURCE]


def test_moderators_get_into_a_full_room() -> None:
    policy = policy_of("Moderators get into a full room")
    assert [policy.bypasses_limit(user) for user in (MODERATOR, REGULAR)] == [True, False]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_an_event_that_can_be_used(recipe: str) -> None:
    assert policy_of(recipe)
