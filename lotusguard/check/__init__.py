# SPDX-License-Identifier: Apache-2.0
"""``lotusguard check``: would this configuration enforce anything? A room of its own under the roof."""
