"""Every kind of control network behind ``ControlNetwork``'s calls, and the one table of kinds."""

from controlkit.branch import ControlNetwork
from controlkit.controls.adapter import Adapter
from controlkit.controls.registry import BODIES, KINDS, ControlKind, new_control, start_from
from controlkit.controls.several import MultiBranch
from controlkit.controls.union import TYPES, OneType, UnionBranch, new_union
from controlkit.controls.xs import XSBranch

__all__ = [
    "BODIES",
    "KINDS",
    "TYPES",
    "Adapter",
    "ControlKind",
    "ControlNetwork",
    "MultiBranch",
    "OneType",
    "UnionBranch",
    "XSBranch",
    "new_control",
    "new_union",
    "start_from",
]
