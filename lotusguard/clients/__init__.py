# SPDX-License-Identifier: Apache-2.0
"""What we ask of others: one file a dependency, plus the HTTP plumbing they share."""
