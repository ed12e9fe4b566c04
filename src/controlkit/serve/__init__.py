"""The HTTP API: one queue of jobs, one worker a device, and three APIs that speak to both (the extra `serve`)."""

from controlkit.serve.running import serve
from controlkit.serve.settings import Limits, Settings

__all__ = ["Limits", "Settings", "serve"]
