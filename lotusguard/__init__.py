# SPDX-License-Identifier: Apache-2.0
"""lotusguard: enforces a Matrix room's call policy for every client, at the token door and during the call."""

__version__ = "0.1.0"
