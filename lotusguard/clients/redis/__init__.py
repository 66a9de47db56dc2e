# SPDX-License-Identifier: Apache-2.0
"""The client for Valkey or Redis, which several guards share."""
