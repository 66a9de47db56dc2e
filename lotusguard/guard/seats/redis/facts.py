# SPDX-License-Identifier: Apache-2.0
"""What Redis keeps about issued tokens: the names of its keys, and how facts are written as text."""

from __future__ import annotations

import hashlib
import json

from attrs import evolve

from lotusguard.guard.seats.redis.scripts import PREFIX
from lotusguard.guard.seats.registry import IdentityEntry, Slot
from lotusguard.rules.sources import mask_of, sources_of

ALIAS_KEPT = 30 * 86400
IDENTITY_KEPT = 7 * 86400
"""Seconds for which Redis keeps what nobody has written again."""
ALIASES_KEPT = 256
"""The latest SFU rooms of one Matrix room, which Redis keeps."""
NOBODY = ""
"""The entry of an identity that some guard has asked about and nothing is known of: that guard is to be told."""


def alias_key(alias: str) -> str:
    """The key of an SFU room's slot."""
    return f"{PREFIX}alias:{{{alias}}}"


def slots_key(room_id: str) -> str:
    """The key of the SFU rooms of a Matrix room: a sorted set, the latest last."""
    return f"{PREFIX}slots:{{{room_id}}}"


def identity_key(alias: str, identity: str) -> str:
    """The key of an identity's entry."""
    return f"{PREFIX}identity:{{{alias}}}:{hashlib.sha256(identity.encode()).hexdigest()[:32]}"


def slot_to_text(slot: Slot) -> str:
    return json.dumps([slot.room_id, slot.slot_id])


def slot_from_text(text: str) -> Slot:
    return Slot(*json.loads(text))


def entry_to_text(entry: IdentityEntry) -> str:
    ceiling = None if entry.ceiling is None else mask_of(entry.ceiling)
    return json.dumps([entry.user, entry.device, ceiling, mask_of(entry.withheld)])


def entry_from_text(text: str) -> IdentityEntry:
    user, device, ceiling, withheld = json.loads(text)
    return IdentityEntry(user, device, None if ceiling is None else sources_of(ceiling), sources_of(withheld))


def merged(entry: IdentityEntry, before: IdentityEntry) -> IdentityEntry:
    """An entry, and what another guard withheld from an earlier token of the same user."""
    if before.user != entry.user:
        return entry
    kept = entry.withheld | before.withheld
    return evolve(entry, withheld=kept if entry.ceiling is None else kept & entry.ceiling)
