# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for the three dependencies, as real HTTP services. ``lotusguard sandbox`` and the tests use them.

Except for the demo, they import nothing else of lotusguard: a mistake in shared code would not be noticed.
"""
