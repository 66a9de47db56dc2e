# SPDX-License-Identifier: Apache-2.0
"""What a Matrix room asks for: its policy."""
