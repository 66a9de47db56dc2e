# SPDX-License-Identifier: Apache-2.0
"""Settings: read once from the environment and an optional YAML file, then frozen.

A setting has one name everywhere: ``GUARD_SEAT_TTL`` in the environment is ``guard_seat_ttl`` in the file and here.
"""

from lotusguard.config.errors import ConfigurationError
from lotusguard.config.read import exposed_appservice, read_settings, suspicions
from lotusguard.config.settings import Settings

__all__ = ["ConfigurationError", "Settings", "exposed_appservice", "read_settings", "suspicions"]
