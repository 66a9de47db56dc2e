# SPDX-License-Identifier: Apache-2.0
"""How Go's HTTP server and JSON decoder treat their input."""
