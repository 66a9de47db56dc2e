# SPDX-License-Identifier: Apache-2.0
"""The lobby: who waits (`entries`), where that is kept (`book`, `redis`), whether it is on (`switching`), and how
moderators are asked (`notices`)."""

from lotusguard.guard.lobby.book import LobbyEntries, MemoryEntries
from lotusguard.guard.lobby.entries import POLL_AGAIN, Lobby, LobbyStopped, Waiting

__all__ = ["POLL_AGAIN", "Lobby", "LobbyEntries", "LobbyStopped", "MemoryEntries", "Waiting"]
