# SPDX-License-Identifier: Apache-2.0
"""The homeserver: a client for Synapse's admin API and the readers of its answers."""

from lotusguard.clients.synapse.client import ROOMS_A_PAGE, SynapseClient

__all__ = ["ROOMS_A_PAGE", "SynapseClient"]
