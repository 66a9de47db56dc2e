# SPDX-License-Identifier: Apache-2.0
"""What a join costs: the guard and a thread-per-connection peer side by side, over the same stand-ins."""
