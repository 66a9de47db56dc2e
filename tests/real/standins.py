# SPDX-License-Identifier: Apache-2.0
"""Our stand-ins for lk-jwt-service and LiveKit as a program, to compare them with the real ones. Tests.

Arguments: key, secret, port of lk-jwt-service, port of LiveKit, LiveKit's URL for lk-jwt-service, the homeserver's
name and its URL.
"""

from __future__ import annotations

import sys
from typing import Any

from twisted.internet import task
from twisted.internet.defer import Deferred

from lotusguard.sandbox.livekit.server import FakeLiveKit
from lotusguard.sandbox.lk_jwt_service.service import FakeLkJwtService


async def run(reactor: Any) -> None:
    key, secret, port, sfu_port, sfu_url, server_name, homeserver_url = sys.argv[1:]
    homeservers = {server_name: homeserver_url}
    await FakeLiveKit(reactor, key=key, secret=secret, port=int(sfu_port)).start()
    await FakeLkJwtService(
        reactor, key=key, secret=secret, sfu_url=sfu_url, homeservers=homeservers, full_access=(server_name,),
        port=int(port),
    ).start()  # fmt: skip
    await Deferred()  # until the process is ended


if __name__ == "__main__":
    task.react(lambda reactor: Deferred.fromCoroutine(run(reactor)))
