# SPDX-License-Identifier: Apache-2.0
"""A guard imports only what its configuration uses. Each library costs time at the start, and memory while it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lotusguard.config import Settings

START = """
import sys
from twisted.internet import reactor
from lotusguard.tap import Options, makeService
service = makeService(Options())
service.privilegedStartService()
service.startService()
print(*sorted(sys.modules), file=sys.stderr)
"""
NOT_FOR_A_PLAIN_GUARD = (
    "lotusguard.clients.redis", "lotusguard.guard.seats.redis", "lotusguard.guard.seats.sharing",  # GUARD_REDIS_URL
    "lotusguard.guard.lobby.redis",
    "lotusguard.web.appservice",  # GUARD_APPSERVICE_PORT
    "lotusguard.cli", "lotusguard.commanding", "lotusguard.environment", "lotusguard.terminal",  # other commands
    "lotusguard.check", "lotusguard.history", "lotusguard.sandbox", "lotusguard.synapse_module",
    "argparse", "multiprocessing", "unittest", "xml.etree",  # not needed at all
    "livekit.api", "livekit.rtc", "pydantic.networks", "pydantic.v1", "werkzeug.debug",
    "twisted.conch", "twisted.mail", "twisted.names", "twisted.trial", "twisted.web.wsgi", "twisted.words",
)  # fmt: skip
LIBRARIES = {
    "attr", "attrs", "cachetools", "google", "httptools", "klein", "livekit", "prometheus_client", "pydantic",
    "treq", "twisted",
    # what these import themselves
    "OpenSSL", "annotated_types", "automat", "bcrypt", "constantly", "cryptography", "cython_runtime", "hyperlink",
    "idna", "incremental", "markupsafe", "multipart", "pydantic_core", "service_identity", "typing_extensions",
    "typing_inspection", "werkzeug", "zope",
}  # fmt: skip
"""The libraries that a plain guard imports; not YAML, for example, which reads ``GUARD_CONFIG``."""


def imported(directory: Path, **environment: str) -> set[str]:
    """The modules that a guard with these settings has imported once it listens."""
    names = {*Settings.model_fields, "guard_config", "state_directory", "notify_socket"}
    env = {name: value for name, value in os.environ.items() if name.lower() not in names}
    env |= {
        "LIVEKIT_KEY": "key", "LIVEKIT_SECRET": "a-secret-for-this-test-only-0123456", "MATRIX_TOKEN": "token",
        "GUARD_STATE_DIR": str(directory), "GUARD_BIND_HOST": "127.0.0.1", "GUARD_BIND_PORT": "0",
        "GUARD_ADMIN_PORT": "0", **environment,
    }  # fmt: skip
    started = subprocess.run(
        [sys.executable, "-c", START], env=env, cwd=directory, capture_output=True, text=True, check=True, timeout=120
    )
    return set(started.stderr.split())


def test_a_plain_guard_imports_nothing_that_it_does_not_use(tmp_path: Path) -> None:
    modules = imported(tmp_path)
    assert "lotusguard.guard.joins.admission" in modules
    assert [name for name in NOT_FOR_A_PLAIN_GUARD if name in modules] == []


def test_a_plain_guard_imports_no_other_libraries(tmp_path: Path) -> None:
    packages = {name.partition(".")[0] for name in imported(tmp_path) if not name.startswith("_")}
    assert packages - sys.stdlib_module_names - LIBRARIES == {"lotusguard"}


@pytest.mark.parametrize(
    ("variable", "value", "module"),
    [("GUARD_APPSERVICE_PORT", "0", "lotusguard.web.appservice"),
     ("GUARD_REDIS_URL", "redis://127.0.0.1:1", "lotusguard.clients.redis")],
)  # fmt: skip
def test_a_setting_brings_what_it_needs(tmp_path: Path, variable: str, value: str, module: str) -> None:
    assert module in imported(tmp_path, **{variable: value})
