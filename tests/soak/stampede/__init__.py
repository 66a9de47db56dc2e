# SPDX-License-Identifier: Apache-2.0
"""Several guards over one Valkey: exactly as many people get in as there are seats, whatever is killed."""
