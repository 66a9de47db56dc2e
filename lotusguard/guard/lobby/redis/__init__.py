# SPDX-License-Identifier: Apache-2.0
"""Lobby entries in Valkey or Redis, which several guards share."""
