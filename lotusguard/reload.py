# SPDX-License-Identifier: Apache-2.0
"""New values for settings while the guard runs: secrets that were replaced in their files, and the YAML file.

A process cannot be given another environment, so a change of the environment takes a restart. Calls and seats stay as
they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from attrs import define, field
from pydantic import SecretStr
from twisted.logger import Logger

from lotusguard.config import Settings, exposed_appservice
from lotusguard.guard.health import Health
from lotusguard.logs import LevelObserver
from lotusguard.metrics import Metrics
from lotusguard.web.console.sessions import Sessions
from lotusguard.web.operators import OperatorApi
from lotusguard.web.webhooks import Webhooks
from lotusguard.wiring import Calls, Clients, Joins, Rooms

if TYPE_CHECKING:  # it is imported only where there is such a listener
    from lotusguard.web.appservice import AppServiceApi

log = Logger()

Apply = Callable[["Reloader", Settings], None]


@define(eq=False)
class Reloader:
    """Applies settings that changed.

    :ivar settings: those that are in force.
    :ivar appservice: the app-service listener's routes; ``None`` if there is no such listener.
    :ivar operators: and :ivar sessions: the same of the operators' listener and its console.
    :ivar observer: the log whose level can be changed; ``None`` if twistd's own options send the log elsewhere.
    """

    settings: Settings
    _clients: Clients
    _rooms: Rooms
    _joins: Joins
    _calls: Calls
    _health: Health
    _webhooks: Webhooks
    _metrics: Metrics
    appservice: AppServiceApi | None = field(default=None, init=False)
    operators: OperatorApi | None = field(default=None, init=False)
    sessions: Sessions | None = field(default=None, init=False)
    observer: LevelObserver | None = field(default=None, init=False)

    def reload(self, new: Settings) -> None:
        """Apply what can be applied, and name what takes a restart."""
        changed = {name for name in Settings.model_fields if getattr(new, name) != getattr(self.settings, name)}
        changed = {name for name in changed if not name.endswith("_file")}  # what is in the file counts
        applied = {name for name in changed if name in APPLY and not _begins_or_ends(name, self.settings, new)}
        for name in sorted(applied):
            APPLY[name](self, new)
        self.settings = self.settings.model_copy(update={name: getattr(new, name) for name in applied})
        log.info(
            "settings were read again; changed: {changed}", changed=_names(applied) or "nothing",
            event_name="reloaded",
        )  # fmt: skip
        if changed - applied:
            log.warn(
                "these settings cannot be changed while the guard runs, restart it: {names}",
                names=_names(changed - applied), event_name="reload_incomplete",
            )  # fmt: skip

    def _key(self, new: Settings) -> None:
        key = new.sfu_key
        assert key is not None
        self._clients.livekit.key = key
        self._joins.issuer.key = self._webhooks.key = key

    def _matrix_token(self, new: Settings) -> None:
        token = new.matrix_token.get_secret_value()
        for client in (self._clients.homeserver, self._clients.discovery):
            client.use_token(token)

    def _admin_token(self, new: Settings) -> None:
        if self.operators is not None:
            self.operators.token = new.guard_admin_token.get_secret_value()
        if self.sessions is not None:
            self.sessions.use_token(new.guard_admin_token.get_secret_value())

    def _hs_token(self, new: Settings) -> None:
        if self.appservice is not None:
            self.appservice.hs_token = new.guard_appservice_token.get_secret_value()
        self._health.exposed = exposed_appservice(new)

    def _dry_run(self, new: Settings) -> None:
        on = new.guard_dry_run
        self._joins.admission.dry_run = self._calls.participants.dry_run = self._health.dry_run = on
        self._metrics.dry_run.set(1 if on else 0)

    def _token(self, new: Settings) -> None:
        self._joins.issuer.token_ttl = new.guard_token_ttl
        self._joins.issuer.all_tokens = new.guard_tokens == "all"

    def _policies(self, new: Settings) -> None:
        policies = self._rooms.policies
        policies.ttl, policies.stale = new.guard_policy_ttl, new.guard_policy_stale
        policies.remembered.default_limit = new.guard_default_max_users

    def _enforcement(self, new: Settings) -> None:
        self._calls.limits.eject = new.guard_overflow == "eject"
        self._calls.participants.restore = new.guard_restore
        self._calls.enforcement.settings_changed()

    def _level(self, new: Settings) -> None:
        if self.observer is not None:
            self.observer.set_level(new.guard_log_level)


APPLY: dict[str, Apply] = {
    "livekit_key": Reloader._key,
    "livekit_secret": Reloader._key,
    "matrix_token": Reloader._matrix_token,
    "guard_admin_token": Reloader._admin_token,
    "guard_appservice_token": Reloader._hs_token,
    "guard_dry_run": Reloader._dry_run,
    "guard_token_ttl": Reloader._token,
    "guard_tokens": Reloader._token,
    "guard_policy_ttl": Reloader._policies,
    "guard_policy_stale": Reloader._policies,
    "guard_default_max_users": Reloader._policies,
    "guard_overflow": Reloader._enforcement,
    "guard_restore": Reloader._enforcement,
    "guard_log_level": Reloader._level,
}
"""What can be changed while the guard runs, and how. ``docs/configuration.md`` lists it."""
_CREDENTIALS = ("livekit_key", "livekit_secret", "matrix_token")


def _begins_or_ends(name: str, old: Settings, new: Settings) -> bool:
    """Whether credentials are set that were not, or the other way round: other parts are then wired."""
    return name in _CREDENTIALS and (not _text(getattr(old, name)) or not _text(getattr(new, name)))


def _text(value: Any) -> str:
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)


def _names(settings: set[str]) -> str:
    return ", ".join(sorted(name.upper() for name in settings))
