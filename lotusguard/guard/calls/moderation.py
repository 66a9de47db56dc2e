# SPDX-License-Identifier: Apache-2.0
"""What moderators do to people in a call, or waiting for one, through the guard."""

from __future__ import annotations

from enum import Enum
from typing import Protocol


class ModerationAction(Enum):
    """The value is the ``action`` of ``POST /moderate``."""

    ADMIT = "admit"
    DENY = "deny"
    REMOVE = "remove"
    MUTE = "mute"


class OnlyDecided(Exception):
    """The user is in the call, and nothing was done to them: ``GUARD_DRY_RUN`` is on."""


class Moderation(Protocol):
    """One implementation serves ``POST /moderate``, commands, reactions and the console."""

    async def act(self, room_id: str, user: str, action: ModerationAction, by: str) -> bool:
        """Do it. Whether ``by`` may do it is checked by the caller.

        :param by: who asked for it, for the log.
        :return: ``False`` if the user neither waits nor is in the call.
        :raises OnlyDecided: in a dry run.
        """
