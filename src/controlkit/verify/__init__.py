"""Verification of real weights: a base and a control against diffusers, against their hints, as one page to look at."""

from controlkit.verify.album import PHOTOGRAPHS, Photograph, photographs
from controlkit.verify.checks import Check
from controlkit.verify.page import write_verification
from controlkit.verify.run import Verification, VerifyPlan, verify
from controlkit.verify.subject import kind_in_name

__all__ = [
    "PHOTOGRAPHS",
    "Check",
    "Photograph",
    "Verification",
    "VerifyPlan",
    "kind_in_name",
    "photographs",
    "verify",
    "write_verification",
]
