# SPDX-License-Identifier: Apache-2.0
"""Rooms to which the guard's account was invited: it hears there what changes, and may speak."""
