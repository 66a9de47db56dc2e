# SPDX-License-Identifier: Apache-2.0
"""What the plugin of ``twistd`` loads: the guard, imported without garbage collections.

Importing makes hundreds of thousands of objects that live for ever. Collections that look at them again and again were
a fifth of the time that the import takes.
"""

from __future__ import annotations

from lotusguard.process import without_collections

with without_collections():
    from lotusguard.tap import Options, makeService

__all__ = ["Options", "makeService"]
