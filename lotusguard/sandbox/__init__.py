# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for the three dependencies, on the wire; used by ``lotusguard sandbox`` and by the tests.

They import nothing of the rest of lotusguard, so that no mistake is shared.
"""
