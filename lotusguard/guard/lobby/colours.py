# SPDX-License-Identifier: Apache-2.0
"""A colour for each user, the same in every process, as La Suite Meet's lobby shows it."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from random import Random

SEED_BYTES = 2
"""The seed is the end of the name's SHA-1: users may share a colour."""


def colour_of(user: str) -> str:
    """The user's colour in CSS: ``hsl(151, 66%, 36%)`` for ``@alice:example.org``.

    Hue, saturation and lightness are the first three numbers that Python's generator draws for the user's seed.
    """
    digest = hashlib.sha1(user.encode("utf-8", "surrogatepass"), usedforsecurity=False).digest()
    return _colour(int.from_bytes(digest[-SEED_BYTES:], "big"))


@lru_cache(maxsize=8192)
def _colour(seed: int) -> str:
    """Drawing takes longer than anything else when everybody who waits is shown. A colour has some 80 bytes."""
    draw = Random(seed).randint
    hue, saturation, lightness = draw(0, 360), draw(50, 75), draw(25, 60)
    return f"hsl({hue}, {saturation}%, {lightness}%)"
