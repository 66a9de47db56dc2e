# SPDX-License-Identifier: Apache-2.0
"""Running calls: webhooks, reconciling, and what is done to participants."""
