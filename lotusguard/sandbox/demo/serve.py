# SPDX-License-Identifier: Apache-2.0
"""Everything at once, served until stopped, with a script of what to ``curl``. ``lotusguard sandbox``. Sandbox."""

from __future__ import annotations

from typing import Any, TextIO

from twisted.internet.defer import Deferred

from lotusguard.sandbox.demo.sandbox import ADMIN_TOKEN, SERVER_NAME, Sandbox

ROOM = f"!call:{SERVER_NAME}"
USERS = ("alice", "bob", "carol")

_SCRIPT = """\
# lotusguard's sandbox: stand-ins for Synapse, LiveKit and lk-jwt-service, with the guard before lk-jwt-service.
# Everything below is for a shell: paste it, as a whole or line by line, into another terminal.
GUARD={guard}         # what clients reach, in front of lk-jwt-service at {authorizer}
OPERATORS={operators}     # the guard's own: /readyz, /metrics, /rooms
SYNAPSE={synapse}
LIVEKIT={livekit}
ROOM='{room}'
{tokens}

# An OpenID token, by which lk-jwt-service knows who asks:          openid USER ACCESS_TOKEN
openid() {{ curl -s -X POST -H "Authorization: Bearer $2" -d '{{}}' \\
  "$SYNAPSE/_matrix/client/v3/user/@$1:{server}/openid/request_token"; }}

# A LiveKit token, as Element Call asks for it:                      token USER ACCESS_TOKEN
token() {{ curl -s -H 'Content-Type: application/json' "$GUARD/sfu/get" \\
  -d "{{\\"room\\": \\"$ROOM\\", \\"device_id\\": \\"PHONE\\", \\"openid_token\\": $(openid "$1" "$2")}}"; echo; }}

# Joining the call with it (LiveKit's stand-in takes this by HTTP):  join USER ACCESS_TOKEN
join() {{ curl -s "$LIVEKIT/sandbox/join" \\
  -d "{{\\"token\\": \\"$(token "$1" "$2" | sed 's/.*"jwt":"\\([^"]*\\)".*/\\1/')\\"}}"; }}

# The room's policy, set by alice, its admin:                        policy EVENT CONTENT
policy() {{ curl -s -X PUT -H "Authorization: Bearer $ALICE" -d "$2" \\
  "$SYNAPSE/_matrix/client/v3/rooms/{room_quoted}/state/$1/"; echo; }}

policy io.lotus.voice_limit '{{"max_users": 2}}'
policy io.lotus.room_quality '{{"allow_screenshare": false}}'

join alice $ALICE
join bob $BOB
token carol $CAROL                                                   # 403: this voice channel is full

curl -s "$LIVEKIT/sandbox/rooms"                                     # who is in, and with what permission
curl -s -H 'Authorization: Bearer {admin_token}' "$OPERATORS/rooms"  # the same as the guard sees it
curl -s "$OPERATORS/readyz"

# Publishing and leaving, by the names that /sandbox/rooms shows:
#   curl -s "$LIVEKIT/sandbox/publish" -d '{{"room": "…", "identity": "@alice:{server}:PHONE", "source": "MICROPHONE"}}'
#   curl -s "$LIVEKIT/sandbox/leave"   -d '{{"room": "…", "identity": "@alice:{server}:PHONE"}}'

# The guard's log follows on the other stream. Ctrl-C ends everything.
"""


def script(sandbox: Sandbox) -> str:
    """A shell script that goes through a call with ``curl``; says on the way what everything is."""
    tokens = {name: sandbox.homeserver.add_user(name) for name in USERS}
    if ROOM not in sandbox.homeserver.rooms:
        sandbox.homeserver.create_room("alice", ROOM, joined=USERS)
    return _SCRIPT.format(
        guard=sandbox.url,
        authorizer=sandbox.upstream.url,
        operators=sandbox.admin_url,
        synapse=sandbox.homeserver.url,
        livekit=sandbox.livekit.url,
        room=ROOM,
        room_quoted=ROOM.replace("!", "%21"),
        server=SERVER_NAME,
        admin_token=ADMIN_TOKEN,
        tokens="\n".join(f"{name.upper()}={token}" for name, token in tokens.items()),
    )


async def serve(reactor: Any, out: TextIO) -> None:
    """Start everything, say what to do with it, and serve until cancelled."""
    sandbox = Sandbox(reactor)
    await sandbox.start()
    try:
        out.write(script(sandbox))
        out.flush()
        await Deferred()
    finally:
        await sandbox.stop()
