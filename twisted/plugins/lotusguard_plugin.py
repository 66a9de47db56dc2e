# SPDX-License-Identifier: Apache-2.0
from twisted.application.service import ServiceMaker

lotusguard = ServiceMaker(
    "lotusguard",
    "lotusguard.start",
    "Enforces Matrix rooms' call policies in front of lk-jwt-service.",
    "lotusguard",
)
