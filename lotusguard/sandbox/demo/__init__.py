# SPDX-License-Identifier: Apache-2.0
"""Everything on loopback: the sandbox and the demo."""
