# SPDX-License-Identifier: Apache-2.0
"""Seats, and what is known about tokens, shared by several guards through Valkey or Redis."""
