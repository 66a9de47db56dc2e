# SPDX-License-Identifier: Apache-2.0
"""How a client waits in a lobby: it polls, or its request is held."""

from __future__ import annotations

from typing import Protocol

from attrs import frozen


class Patience(Protocol):
    """What a listener offers to a request that has to wait."""

    @property
    def polls(self) -> bool:
        """Whether the client asks again by itself; its request is not held then."""

    def begin(self) -> None:
        """The request is held from now on. May be called again."""

    def is_silent(self) -> bool:
        """Whether the client has been sent nothing yet."""


@frozen
class _Silent:
    """Holds a request without sending anything."""

    polls: bool = False

    def begin(self) -> None:
        """There is nothing to do."""

    def is_silent(self) -> bool:
        return True


SILENT: Patience = _Silent()


class InLobby(Exception):
    """A client that polls has to wait.

    :ivar entry_id: the name of the user's lobby entry. :ivar colour: the user's colour in CSS.
    :ivar retry_after: seconds after which to ask again.
    """

    def __init__(self, entry_id: str, colour: str, retry_after: float) -> None:
        super().__init__(entry_id)
        self.entry_id = entry_id
        self.colour = colour
        self.retry_after = retry_after
