# SPDX-License-Identifier: Apache-2.0
"""``lotusguard check`` looks at this machine: the state directory, the ports, and the guard if it runs."""

from __future__ import annotations

import errno
import shutil
import socket
import stat
import tempfile
from pathlib import Path
from typing import Any

from twisted.internet.task import deferLater

from lotusguard import __version__
from lotusguard.check.asking import NoAnswer, Service, json_of
from lotusguard.check.exposure import is_guard, is_held_by_systemd
from lotusguard.check.report import Findings
from lotusguard.clients.http import Answer
from lotusguard.config import Settings

LEAST_SPACE, SOME_SPACE = 1024 * 1024, 64 * 1024 * 1024
REFUSED = (401, 403)
"""What the operators' listener, or a proxy before it, answers to a wrong token."""
NOTHING = Answer(0)
MAKE_ROOM = "make room on its file system (df -h, df -i), or raise the quota"
WEBHOOKS_TAKE = 3.0
"""Seconds within which LiveKit sends webhooks about a room that was created and deleted."""
WIRING = (
    "livekit.yaml: webhook: {api_key: <LIVEKIT_KEY>, urls: [http://<guard>:8070/sfu_webhook]}; "
    "until then only reconciling revokes what is forbidden, seconds later"
)


def check_state_directory(settings: Settings, say: Findings) -> None:
    """Whether state can survive a restart. Leaves no file in the directory."""
    directory = settings.state_dir
    if directory is None:
        say.warning(
            "kept",
            "in memory only: after a restart, participants are unknown until they ask for a token again",
            "set GUARD_STATE_DIR, or StateDirectory= in the unit (then ask with systemd-run, or set it here, too)",
        )
        return
    existing = directory
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    owner = "make it a directory that the service's user may write to (chown, chmod 700)"
    if not existing.is_dir():
        say.wrong("writable", f"{existing} is not a directory", "correct GUARD_STATE_DIR")
        return
    try:
        with tempfile.TemporaryFile(dir=existing) as trying:
            trying.write(b"lotusguard check")
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        say.wrong("writable", f"{existing} cannot be written to ({error.strerror})", MAKE_ROOM if full else owner)
        return
    say.fine("writable", f"{directory}" + ("" if existing == directory else ", created at the first start"))
    free = shutil.disk_usage(existing).free
    if free < SOME_SPACE:
        told = say.wrong if free < LEAST_SPACE else say.warning
        told("space", f"{free // 1024} KiB left on its file system", MAKE_ROOM)
    else:
        say.fine("space", f"{free // (1024 * 1024)} MiB left")
    if existing == directory:
        _check_permissions(directory, say)


def _check_permissions(directory: Path, say: Findings) -> None:
    mode = stat.S_IMODE(directory.stat().st_mode)
    if mode & (stat.S_IROTH | stat.S_IWOTH | stat.S_IXOTH):
        say.warning(
            "private",
            f"{directory} is readable by everybody ({mode:o}): it shows who called whom",
            f"chmod 700 {directory}",
        )
    else:
        say.fine("private", f"mode {mode:o}")


class GuardCheck:
    """Asks the guard that may be running with these settings.

    :param operators: its operators' listener; None if there is none.
    :param public: its public listener.
    """

    def __init__(
        self, settings: Settings, public: Service, operators: Service | None, reactor: Any, *, patience: float
    ) -> None:
        self._settings = settings
        self._public = public
        self._operators = operators
        self._reactor = reactor
        self._patience = min(WEBHOOKS_TAKE, patience)

    async def check_ports(self, say: Findings) -> bool:
        """Whether a guard can listen on its ports, or does so already. :return: whether a guard runs there."""
        settings = self._settings
        if settings.guard_bind_port and settings.guard_bind_port == settings.guard_admin_port:
            say.wrong(
                "GUARD_ADMIN_PORT",
                f"is {settings.guard_admin_port}, as is GUARD_BIND_PORT",
                "give them different ports",
            )
            return False
        runs = False
        if self._operators is not None and settings.guard_admin_port is not None:
            trouble = _listening_trouble(settings.guard_admin_host, settings.guard_admin_port)
            if trouble == errno.EADDRINUSE:
                version = json_of(await self._tried(self._operators, "GET", "/healthz")).get("version")
                runs = isinstance(version, str)
                taken = None if runs else "is taken by another program"
                self._say_port(say, "GUARD_ADMIN_PORT", settings.guard_admin_port, taken, f"guard {version} listens")
            else:
                self._say_port(say, "GUARD_ADMIN_PORT", settings.guard_admin_port, _words(trouble), "free")
        trouble = _listening_trouble(settings.guard_bind_host, settings.guard_bind_port)
        if trouble == errno.EADDRINUSE:
            holder, guard = await self._holder()
            self._say_port(say, "GUARD_BIND_PORT", settings.guard_bind_port, None if guard else holder, holder)
        else:
            self._say_port(say, "GUARD_BIND_PORT", settings.guard_bind_port, _words(trouble), "free")
        return runs

    def _say_port(self, say: Findings, setting: str, port: int, trouble: str | None, fine: str) -> None:
        if trouble is None:
            say.fine(setting, f"{port}, {fine}")
        else:
            say.wrong(
                setting, f"{port} {trouble}", f"stop what holds it (ss -ltnp 'sport = :{port}'), or change {setting}"
            )

    async def _holder(self) -> tuple[str, bool]:
        """What listens on the public port, and whether that is a guard, or systemd for a guard."""
        by_systemd = is_held_by_systemd(self._settings.guard_bind_port)
        try:
            guard = await is_guard(self._public)
        except NoAnswer:
            if by_systemd:
                return "held by systemd (lotusguard.socket); no guard answers there yet", True
            guard = None
        if guard:
            return "a guard listens" + (" on systemd's socket" if by_systemd else ""), True
        if guard is False:
            return "is taken by lk-jwt-service, which belongs behind the guard (LIVEKIT_JWT_BIND=127.0.0.1:8071)", False
        return "is taken by another program", False

    async def check_running(self, say: Findings) -> None:
        """What the running guard reports about itself."""
        assert self._operators is not None
        version = json_of(await self._tried(self._operators, "GET", "/healthz")).get("version")
        if version == __version__:
            say.fine("version", __version__)
        else:
            say.warning("version", f"{version} runs, this is {__version__}", "restart the service")
        await self._check_token(say)
        report = json_of(await self._tried(self._operators, "GET", "/readyz"))
        if report.get("ready"):
            say.fine("enforcing", "the limit, the sources, and during calls")
        else:
            reasons = "; ".join(map(str, report.get("reasons", []))) or "it does not say why"
            say.wrong("enforcing", f"not everything: {reasons}", "see the findings above, and the service's log")

    async def _check_token(self, say: Findings) -> None:
        """Whether the running guard has the token of these settings."""
        token = self._settings.guard_admin_token.get_secret_value()
        if not token:
            return  # that there is none is a finding of its own
        answer = await self._tried(self._operators, "GET", "/lobby", None, {"Authorization": f"Bearer {token}"})
        if answer.code in REFUSED:
            say.warning(
                "GUARD_ADMIN_TOKEN",
                f"is not the running guard's: its operators' listener answers {answer.code}",
                "give both the same one (--unit lotusguard reads the service's); reload the service if it was changed",
            )
        elif answer.code == 200:
            say.fine("GUARD_ADMIN_TOKEN", "is the running guard's")

    async def tells_state(self, say: Findings) -> bool:
        """Report what the running guard says about its state directory. :return: whether it says anything."""
        assert self._operators is not None
        state = json_of(await self._tried(self._operators, "GET", "/readyz")).get("state")
        if not isinstance(state, dict):
            return False
        if state.get("error"):
            say.wrong("writable", f"the running guard cannot use it: {state['error']}", "see its log; restart it after")
        elif not state.get("kept"):
            say.warning(
                "kept",
                "the running guard keeps everything in memory: after a restart, participants are unknown until they "
                "ask for a token again",
                "StateDirectory= in the unit, or GUARD_STATE_DIR",
            )
        elif not state.get("writable"):
            waiting = state.get("waiting_writes", "some")
            say.wrong("writable", f"the running guard cannot write to it; {waiting} writes wait", MAKE_ROOM)
        else:
            say.fine("writable", "the running guard writes to it")
        return True

    async def check_webhooks(self, say: Findings, runs: bool, just_now: bool) -> None:
        """Whether LiveKit's webhooks reach the running guard.

        :param just_now: LiveKit has just had something to report.
        """
        if not runs or self._operators is None:
            say.unknown(
                "arrive",
                "no guard is running with these settings",
                "start it, then look at `webhooks` in its /readyz during a call, or ask again here",
            )
            return
        ago = await self._webhook_ago()
        waited = 0.0
        while just_now and (ago is None or ago > WEBHOOKS_TAKE + 2) and waited < self._patience:
            waited += 0.2
            await deferLater(self._reactor, 0.2)
            ago = await self._webhook_ago()
        if ago is None:
            since = "although LiveKit has just had something to report" if just_now else "since it started"
            say.warning("arrive", f"the guard has received no valid webhook, {since}", WIRING)
        elif just_now and ago > WEBHOOKS_TAKE + 2:
            say.warning("arrive", f"the last came {ago:.0f} s ago, none about the room that was just created", WIRING)
        else:
            say.fine("arrive", f"the last came {ago:.0f} s ago" + (", on the trial's room" if just_now else ""))

    async def _webhook_ago(self) -> float | None:
        assert self._operators is not None
        seen = json_of(await self._tried(self._operators, "GET", "/readyz")).get("webhooks")
        ago = seen.get("last_seen_seconds_ago") if isinstance(seen, dict) else None
        return float(ago) if isinstance(ago, int | float) else None

    async def _tried(self, whom: Service | None, *question: Any) -> Answer:
        """The answer, or an empty one."""
        assert whom is not None
        try:
            return await whom.ask(*question)
        except NoAnswer:
            return NOTHING


def _listening_trouble(host: str, port: int) -> int:
    """The errno of an attempt to bind there; 0 if it works. Does not listen."""
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as trying:
            trying.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trying.bind((host, port))
    except OSError as error:
        return error.errno or errno.EINVAL
    return 0


def _words(trouble: int) -> str | None:
    return f"cannot be used ({errno.errorcode.get(trouble, trouble)})" if trouble else None
