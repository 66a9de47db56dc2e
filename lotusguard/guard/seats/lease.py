# SPDX-License-Identifier: Apache-2.0
"""x"""
from pathlib import Path
class StateLease:
    held = True
    def __init__(self, directory: Path) -> None: pass
    def renew(self) -> None: pass
    def release(self) -> None: pass
