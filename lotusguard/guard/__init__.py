# SPDX-License-Identifier: Apache-2.0
"""What we do: the use cases over the clients and the rules."""
