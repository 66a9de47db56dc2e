# SPDX-License-Identifier: Apache-2.0
"""``twistd lotusguard``: its options, its log, and what it does when it is told to reload."""

from __future__ import annotations

import signal
import sys
from typing import Any, ClassVar

from twisted.application.service import MultiService
from twisted.logger import ILogObserver, Logger, LogLevel
from twisted.python import usage
from twisted.python.components import Componentized

from lotusguard.config import ConfigurationError, Settings, read_settings
from lotusguard.logs import LevelObserver, observer_for, write_error
from lotusguard.process import tune_garbage_collector, use_monotonic_time
from lotusguard.service import Guard

log = Logger()

_TWIST_LOG = "fileLogObserverFactory"
"""The option of ``twist``, which twistd does not have, that makes the log's observer."""
WRONG_SETTING = 78
"""Exit status for a wrong setting (``EX_CONFIG``): the unit does not start the guard again until it is corrected."""


class Options(usage.Options):
    """The command line options; everything else is in the environment (see docs/configuration.md)."""

    synopsis = "[options]"
    longdesc = "Enforces Matrix rooms' call policies in front of lk-jwt-service. Settings come from the environment."
    optParameters: ClassVar[list[list[str | None]]] = [
        ["admin-listen", None, None, "endpoint of the operators' listener instead of GUARD_ADMIN_…"],
    ]

    def __init__(self) -> None:
        super().__init__()
        self["listen"] = []

    def opt_listen(self, endpoint: str) -> None:
        """endpoint to listen on instead of GUARD_BIND_HOST and GUARD_BIND_PORT; may be given several times"""
        self["listen"].append(endpoint)

    opt_l = opt_listen


def makeService(options: Options) -> Unbuilt:
    """The service of ``twistd lotusguard``. A wrong setting ends it with one line."""
    from twisted.internet import reactor

    try:
        settings = read_settings()
    except ConfigurationError as error:
        write_error(f"lotusguard: {error}", sys.stderr)
        raise SystemExit(WRONG_SETTING) from None
    use_monotonic_time(reactor)
    reactor.callWhenRunning(tune_garbage_collector)
    return Unbuilt(settings, reactor, options)


class Unbuilt(MultiService):
    """The guard before it is built: ``twistd`` may still go into the background, where the threads and the open
    database of this process would not follow."""

    def __init__(self, settings: Settings, reactor: Any, options: Options) -> None:
        super().__init__()
        self._settings = settings
        self._reactor = reactor
        self._options = options
        self._observer: LevelObserver | None = None
        self._guard: Guard | None = None

    def setServiceParent(self, parent: Any) -> None:
        """Under ``twistd`` and ``twist`` the parent is the application. Its log gets the configured format, unless
        twistd's own options send the log elsewhere, or twistd goes into the background."""
        runner = getattr(self._options, "parent", None) or {"nodaemon": True}
        elsewhere = any(runner.get(option) for option in ("logfile", "syslog", "logger"))
        if _TWIST_LOG in runner:
            runner[_TWIST_LOG], runner["logLevel"] = self._observe, LogLevel.debug  # our observer leaves lines out
        elif isinstance(parent, Componentized) and runner.get("nodaemon") and not elsewhere:
            parent.setComponent(ILogObserver, self._observe(None))
        super().setServiceParent(parent)

    def _observe(self, stream: Any) -> LevelObserver:
        """:param stream: where to write; ``None``: standard output."""
        self._observer = observer_for(self._settings.guard_log_format, self._settings.guard_log_level, stream)
        if self._guard is not None:  # `twist` begins to log after the start
            self._guard.change_levels_of(self._observer)
        return self._observer

    def startService(self) -> None:
        if self._guard is None:  # `twist` starts services without `privilegedStartService`
            self.privilegedStartService()
        super().startService()

    def privilegedStartService(self) -> None:
        listen, admin_listen = self._options["listen"], self._options["admin-listen"]
        self._guard = Guard(
            self._settings, self._reactor, listen=listen, admin_listen=admin_listen, observer=self._observer
        )
        self._guard.setServiceParent(self)
        signal.signal(signal.SIGHUP, lambda *_: self._reactor.callFromThread(self._reload))
        super().privilegedStartService()

    def _reload(self) -> None:
        """Read the settings again, all of them before one is applied; a wrong one changes nothing."""
        try:
            settings = read_settings()
        except ConfigurationError as error:
            log.error("nothing was reloaded: {error}", error=str(error), event_name="reload_failed")
            return
        if self._guard is not None:
            self._guard.reload(settings)
