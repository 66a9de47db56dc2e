# SPDX-License-Identifier: Apache-2.0
"""From a token request to its answer: admission and the log of decisions."""
