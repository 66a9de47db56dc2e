# SPDX-License-Identifier: Apache-2.0
"""The lease of a state directory: of several guard processes that use it, one holds it and removes people from calls.

Two guards that do not share their seats would each remove those whom the other admitted.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from attrs import define, field
from twisted.logger import Logger

log = Logger()


@define(eq=False)
class StateLease:
    """A lock on the file ``lock``. The kernel releases it when the process ends, however it ends.

    :ivar held: whether this process holds the lease. A guard that does not hold it removes nobody.
    """

    directory: Path
    held: bool = field(init=False, default=False)
    _file: int | None = field(init=False, repr=False, default=None)
    _reported: str = field(init=False, repr=False, default="")

    def renew(self) -> bool:
        """Try to get the lease, unless it is held. It is called every second. The log says so at each change.

        :return: whether it is held now.
        """
        if not self.held:
            self.held = self._lock()
        return self.held

    def release(self) -> None:
        """Give the lease up; does nothing if it is not held."""
        self.held = False
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _lock(self) -> bool:
        path = self.directory / "lock"
        try:
            if self._file is None:
                self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._report("another process holds it")
            return False
        except OSError as error:
            self._report(error.strerror or str(error))
            return False
        log.info("the lease of {path} is held: this guard removes people", path=str(path), event_name="lease_acquired")
        self._reported = ""
        return True

    def _report(self, reason: str) -> None:
        if reason != self._reported:
            self._reported = reason
            log.error(
                "the lease of {directory} is not held, this guard removes nobody: {reason}",
                directory=str(self.directory), reason=reason, event_name="lease_missing",
            )  # fmt: skip
