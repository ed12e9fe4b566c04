"""Controlled sampling: a request, made ready for a base, and the pictures that come of it."""

from controlkit.sample.acting import HintTensors, Steering
from controlkit.sample.loop import Denoised, Maker, Start, denoise, generate, maker, pictures
from controlkit.sample.memory import MEMORY, Memory, plan_memory
from controlkit.sample.prepare import (
    Prepared,
    PreparedControl,
    SamplingSettings,
    check_pictures,
    hint_of,
    load,
    picture_size,
    prepare,
)
from controlkit.sample.preview import LinearPreviewer, Previewer
from controlkit.sample.request import (
    PLAIN_PROMPT,
    ControlRequest,
    EditRequest,
    HiresRequest,
    Picture,
    Request,
    Step,
)
from controlkit.sample.scales import scale_table

__all__ = [
    "MEMORY",
    "PLAIN_PROMPT",
    "ControlRequest",
    "Denoised",
    "EditRequest",
    "HintTensors",
    "HiresRequest",
    "LinearPreviewer",
    "Maker",
    "Memory",
    "Picture",
    "Prepared",
    "PreparedControl",
    "Previewer",
    "Request",
    "SamplingSettings",
    "Start",
    "Steering",
    "Step",
    "check_pictures",
    "denoise",
    "generate",
    "hint_of",
    "load",
    "maker",
    "picture_size",
    "pictures",
    "plan_memory",
    "prepare",
    "scale_table",
]
