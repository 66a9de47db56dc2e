# SPDX-License-Identifier: Apache-2.0
"""The lobby: who waits (`entries`), whether it is on (`switching`), how moderators are asked (`notices`)."""

from lotusguard.guard.lobby.entries import POLL_AGAIN, Lobby, LobbyStopped, Waiting

__all__ = ["POLL_AGAIN", "Lobby", "LobbyStopped", "Waiting"]
