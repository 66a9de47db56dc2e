# SPDX-License-Identifier: Apache-2.0
"""Whether calls are for members of the room only (``GUARD_MEMBERS_ONLY``)."""

from __future__ import annotations

from enum import Enum


class MembersOnly(Enum):
    """What happens to people who are not joined to the Matrix room."""

    ON = "on"
    """They get no token, and are removed from the call."""
    LOG = "log"
    """They are only logged."""
    OFF = "off"
    """Memberships are not looked up."""
