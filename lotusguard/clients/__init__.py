# SPDX-License-Identifier: Apache-2.0
"""What we ask of others: one file a neighbour, plus the HTTP plumbing they share."""
