# SPDX-License-Identifier: Apache-2.0
"""Pure rules: no Twisted, no clock, no I/O; `now` is an argument."""
