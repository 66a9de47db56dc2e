# SPDX-License-Identifier: Apache-2.0
"""``lotusguard why`` and ``lotusguard ejected``: what became of somebody's joins, and who was removed from calls."""
