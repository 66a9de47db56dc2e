# SPDX-License-Identifier: Apache-2.0
"""The operators' console: one page that works without JavaScript and updates itself with it."""
