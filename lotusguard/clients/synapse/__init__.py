# SPDX-License-Identifier: Apache-2.0
"""The homeserver: clients for Synapse's admin API and for the client-server API, and the readers of their answers."""

from lotusguard.clients.synapse.access_token import AccessToken
from lotusguard.clients.synapse.client import ROOMS_A_PAGE, SynapseClient
from lotusguard.clients.synapse.matrix import MatrixClient
from lotusguard.clients.synapse.openid import OpenIDClient

__all__ = ["ROOMS_A_PAGE", "AccessToken", "MatrixClient", "OpenIDClient", "SynapseClient"]
