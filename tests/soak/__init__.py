# SPDX-License-Identifier: Apache-2.0
"""The soak test: random users, changes and faults against an oracle. ``python -m tests.soak --seconds 600``."""
