# SPDX-License-Identifier: Apache-2.0
"""How the guard's parts are put together, in the order of the layers. Nothing else constructs them."""

from __future__ import annotations

import time

from lotusguard.wiring.clients import Clients, connect
from lotusguard.wiring.guard import Calls, Joins, Rooms, Waiting, calls, health, joins, rooms, syncing, waiting
from lotusguard.wiring.listeners import appservice_listener, operators_listener, public_listener
from lotusguard.wiring.state import State, open_state

__all__ = [
    "WALL_CLOCK", "Calls", "Clients", "Joins", "Rooms", "State", "Waiting",
    "appservice_listener", "calls", "connect", "health", "joins", "open_state", "operators_listener", "public_listener",
    "rooms", "syncing", "waiting",
]  # fmt: skip

WALL_CLOCK = time.time
