# SPDX-License-Identifier: Apache-2.0
"""Listeners and routes: reading and answering HTTP; no decisions."""
