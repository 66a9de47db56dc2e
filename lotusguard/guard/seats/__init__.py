# SPDX-License-Identifier: Apache-2.0
"""Who holds the seats of a room's call, and what is remembered about issued tokens."""
