# SPDX-License-Identifier: Apache-2.0
"""Two whole guards before one LiveKit and one homeserver, which share a real Valkey."""

from __future__ import annotations

import json
from typing import Any

from attrs import define

from lotusguard.clients.http import Answer
from lotusguard.sandbox.demo.sandbox import Sandbox
from lotusguard.service import Guard


@define
class Two:
    """The sandbox's guard and a second one, one of which answers."""

    sandbox: Sandbox
    guards: tuple[Guard, Guard]

    def use(self, number: int) -> None:
        """Let one of the guards answer clients and operators. LiveKit's webhooks go on to the first."""
        guard = self.guards[number]
        assert guard.public.port is not None
        assert guard.admin is not None
        assert guard.admin.port is not None
        self.sandbox.guard = guard
        self.sandbox.url = f"http://127.0.0.1:{guard.public.port.getHost().port}"  # type: ignore[attr-defined]
        self.sandbox.admin_url = f"http://127.0.0.1:{guard.admin.port.getHost().port}"  # type: ignore[attr-defined]

    async def ask(self, number: int, user: str, room_id: str, **how: Any) -> Answer:
        self.use(number)
        return await self.sandbox.ask_token(user, room_id, **how)

    async def enter(self, number: int, user: str, room_id: str, **how: Any) -> Any:
        self.use(number)
        return await self.sandbox.enter(user, room_id, **how)

    async def ready(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads((await self.sandbox.operator("GET", "/readyz")).body)
        return report

    @classmethod
    async def start(cls, sandbox: Sandbox, **settings: Any) -> Two:
        """Start a second guard beside the sandbox's."""
        first, hooks = sandbox.guard, list(sandbox.livekit.webhooks.urls)
        await sandbox.start_guard(**settings)
        sandbox.livekit.webhooks.urls[:] = hooks
        return cls(sandbox, (first, sandbox.guard))

    async def stop(self) -> None:
        """Stop the guards that run, but for one, which the sandbox stops."""
        last, *others = [guard for guard in self.guards if guard.running]
        for guard in others:
            await guard.stopService()
        self.sandbox.guard = last
