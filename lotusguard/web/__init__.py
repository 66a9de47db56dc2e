# SPDX-License-Identifier: Apache-2.0
"""The doors: Klein routes that read and answer HTTP; nothing is decided here."""
