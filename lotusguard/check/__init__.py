# SPDX-License-Identifier: Apache-2.0
"""``lotusguard check``: would this configuration enforce anything?"""
