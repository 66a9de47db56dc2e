# SPDX-License-Identifier: Apache-2.0
"""A dependency that was not configured: every call fails at once and says so."""

from __future__ import annotations

from typing import Any, NoReturn

from attrs import define, field

from lotusguard.clients.dependency import Dependency, DependencyFailed


@define(eq=False)
class UnconfiguredDependency(Dependency):
    """Stands where a dependency would be, so that nothing else has to ask whether there is one.

    :ivar missing: the reason that every call fails with, such as ``no_matrix_token``.
    """

    missing: str = field(kw_only=True)

    async def call(self, *_: Any, **__: Any) -> NoReturn:
        """:raises DependencyFailed: always."""
        raise DependencyFailed(self.name, self.missing)
