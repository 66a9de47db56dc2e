# SPDX-License-Identifier: Apache-2.0
"""The operators' listener: what cannot be read."""

from __future__ import annotations

import pytest
import pytest_twisted

from lotusguard.sandbox.demo.sandbox import Sandbox
from tests.calls import crashes, logged


@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        ("/policy-changed", rb'{"room_id": "!half \ud800 a pair:x", "user": "@\udfff:x"}', 400),
        ("/moderate", rb'{"room_id": "!half \ud800 a pair:x", "user": "@\udfff:x", "action": "remove"}', 400),
        ("/policy-changed", b'{"room_id": ' + 5_000 * b"[" + 5_000 * b"]" + b"}", 400),
        ("/moderate", 5_000 * b"[", 400),
    ],
)
@pytest_twisted.ensureDeferred
async def test_what_operators_send_is_answered_whatever_is_in_it(
    sandbox: Sandbox, path: str, body: bytes, code: int
) -> None:
    with logged() as events:
        assert (await sandbox.operator("POST", path, body)).code == code
        await sandbox.guard.enforcement.worker.idle()
    assert not crashes(events)
