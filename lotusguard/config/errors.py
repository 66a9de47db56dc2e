# SPDX-License-Identifier: Apache-2.0
"""The errors about a setting."""

from __future__ import annotations


class ConfigurationError(Exception):
    """A setting is wrong. The text is one line: the name, the problem, what is expected; never a secret."""


class WrongSettingError(ValueError):
    """The same, raised while pydantic validates."""

    def __init__(self, name: str, problem: str, expected: str) -> None:
        super().__init__(f"{name.upper()}: {problem}; expected {expected}")
