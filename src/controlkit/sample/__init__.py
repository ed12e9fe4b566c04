"""Controlled sampling."""

from controlkit.sample.loop import *  # noqa: F403
from controlkit.sample.loop import (
    PLAIN_PROMPT,
    Control,
    Job,
    Picture,
    SamplingSettings,
    denoise,
    generate,
    picture_size,
    strength_table,
)
