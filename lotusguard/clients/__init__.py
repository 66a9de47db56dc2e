# SPDX-License-Identifier: Apache-2.0
"""Clients for the services we depend on, and the calling code they share."""
