# SPDX-License-Identifier: Apache-2.0
"""lotusguard: enforces the call policy of Matrix rooms for every client, when a token is issued and during the call."""

__version__ = "0.1.0"
