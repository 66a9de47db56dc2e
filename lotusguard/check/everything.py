# SPDX-License-Identifier: Apache-2.0
"""``lotusguard check``: would this configuration enforce anything? Asks all services, in bounded time."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, TimeoutError

from lotusguard.check.asking import Asking, Service, listener_address
from lotusguard.check.exposure import ExposureCheck
from lotusguard.check.homeserver import HomeserverCheck, Us
from lotusguard.check.host import GuardCheck, check_state_directory
from lotusguard.check.livekit import LiveKitCheck
from lotusguard.check.report import Findings, Report
from lotusguard.check.upstream import UpstreamCheck
from lotusguard.clients.http import ConnectionPool
from lotusguard.clients.waiting import gather
from lotusguard.config import Settings, suspicions
from lotusguard.rules.identity import server_of

PATIENCE, LONGEST = 5.0, 15.0
"""Seconds for one answer, and for the whole check."""
SKEW_SEEN, SKEW_HARMFUL = 5.0, 60.0
"""Seconds by which clocks may differ until we warn, and until LiveKit refuses tokens."""
ORDER = [
    "settings",
    "ports",
    "state directory",
    "synapse",
    "livekit",
    "lk-jwt-service",
    "redis",
    "clocks",
    "guard",
    "webhooks",
    "exposure",
]


async def check(
    settings: Settings,
    reactor: Any,
    *,
    patience: float = PATIENCE,
    longest: float = LONGEST,
    now: Callable[[], float] = time.time,
) -> Report:
    """Ask all services and report. :param now: our clock, in seconds since the epoch."""
    report = Report(order=ORDER)
    pool = ConnectionPool(reactor)

    checking = Check(settings, report, Asking(reactor, pool, patience, now))
    try:
        await Deferred.fromCoroutine(checking.run()).addTimeout(longest, reactor)
    except TimeoutError:
        Findings(report, "settings").wrong(
            "time", f"not done after {longest:g} s; what is not listed was not checked", "see which service is so slow"
        )
    finally:
        await pool.close()
    return report


class Check:
    """One check. What depends on nothing is asked at once; then the trial; then what needs its result."""

    def __init__(self, settings: Settings, report: Report, asking: Asking) -> None:
        self._settings = settings
        self._report = report
        self._reactor, self._patience = asking.reactor, asking.timeout
        self._services: list[Service] = [
            asking.service("SYNAPSE_API", settings.synapse_api),
            asking.service("LIVEKIT_API", settings.livekit_api),
            asking.service("GUARD_UPSTREAM", settings.guard_upstream),
        ]
        synapse, livekit, upstream = self._services
        self._homeserver = HomeserverCheck(settings, synapse, self._about("synapse"))
        self._livekit = LiveKitCheck(settings, livekit, self._about("livekit"), asking.now)
        self._upstream = UpstreamCheck(settings, upstream, self._about("lk-jwt-service"), asking.reactor)
        public = asking.service("GUARD_BIND_PORT", listener_address(settings.guard_bind_host, settings.guard_bind_port))
        operators = (
            asking.service("GUARD_ADMIN_PORT", listener_address(settings.guard_admin_host, settings.guard_admin_port))
            if settings.guard_admin_port
            else None
        )
        self._guard = GuardCheck(settings, public, operators, asking.reactor, patience=asking.timeout)
        self._exposure = ExposureCheck(asking, self._about("exposure"))
        self._us: Us | None = None
        self._is_upstream = self._runs = self._just_now = False

    async def run(self) -> None:
        """Ask all services."""
        self._look_at_settings()
        await gather(
            (
                self._part("synapse", self._ask_synapse()),
                self._part("livekit", self._livekit.run()),
                self._part("lk-jwt-service", self._ask_upstream()),
                self._part("ports", self._look_at_ports()),
                self._part("redis", self._ask_redis()),
            )
        )
        await self._part("state directory", self._look_at_state())
        await self._part("lk-jwt-service", self._try_a_token())
        self._compare_clocks()
        await self._part("webhooks", self._guard.check_webhooks(self._about("webhooks"), self._runs, self._just_now))
        if self._is_upstream:
            await self._part("exposure", self._look_at_exposure())
        if self._runs:
            await self._part("guard", self._guard.check_running(self._about("guard")))

    def _about(self, what: str) -> Findings:
        return Findings(self._report, what)

    async def _part(self, about: str, work: Awaitable[None] | Coroutine[Any, Any, Any]) -> None:
        """An unexpected exception in one part does not keep the others from being checked."""
        try:
            await work
        except CancelledError:
            raise
        except Exception as error:
            self._about(about).wrong(
                "understood",
                f"an unexpected answer ({type(error).__name__})",
                "see what the address points to",
            )

    def _look_at_settings(self) -> None:
        say, settings = self._about("settings"), self._settings
        for suspicion in suspicions(settings):
            say.warning("suspicious", suspicion, "correct it")
        if settings.guard_dry_run:
            say.warning(
                "GUARD_DRY_RUN", "is on: everything is decided and logged, nothing is enforced", "GUARD_DRY_RUN=off"
            )
        if not settings.guard_admin_token.get_secret_value() and settings.guard_admin_port is not None:
            say.warning(
                "GUARD_ADMIN_TOKEN",
                "is not set: /rooms answers nobody, and Synapse cannot report changed policies",
                "set it (openssl rand -hex 32), and give it to the Synapse module",
            )

    async def _ask_synapse(self) -> None:
        self._us = await self._homeserver.run()

    async def _ask_upstream(self) -> None:
        self._is_upstream = await self._upstream.run()

    async def _ask_redis(self) -> None:
        url = self._settings.guard_redis_url.get_secret_value()
        if url:
            from lotusguard.check.redis import RedisCheck  # txredisapi wants the reactor when it is imported

            await RedisCheck(url, self._about("redis"), self._reactor, self._patience).run()

    async def _look_at_ports(self) -> None:
        self._runs = await self._guard.check_ports(self._about("ports"))

    async def _look_at_state(self) -> None:
        """The running guard knows better than this process, which may run as another user and without systemd."""
        say = self._about("state directory")
        if not (self._runs and await self._guard.tells_state(say)):
            check_state_directory(self._settings, say)

    async def _try_a_token(self) -> None:
        if not self._is_upstream:
            return
        if self._us is None or self._us.openid is None:
            self._about("lk-jwt-service").unknown(
                "its tokens", "not requested: that takes an OpenID token from Synapse"
            )
            return
        self._just_now = await self._upstream.trial(self._us, self._livekit)

    async def _look_at_exposure(self) -> None:
        upstream = self._services[2]
        await self._exposure.check_upstream(upstream, await self._upstream.is_here())
        if self._us is not None:
            await self._exposure.check_advertised(self._services[0], server_of(self._us.user))
        if self._upstream.livekit_url is not None:
            await self._exposure.check_livekit(self._upstream.livekit_url)

    def _compare_clocks(self) -> None:
        say = self._about("clocks")
        for who in self._services:
            if who.skew is None:
                continue
            ahead = f"{abs(who.skew):.0f} s {'ahead of' if who.skew > 0 else 'behind'} ours"
            if abs(who.skew) > SKEW_HARMFUL:
                say.wrong(who.setting, f"{ahead}: tokens are refused, or live too long", "run NTP on both machines")
            elif abs(who.skew) > SKEW_SEEN:
                say.warning(who.setting, ahead, "run NTP on both machines")
            else:
                say.fine(who.setting, "no difference, to the second")
