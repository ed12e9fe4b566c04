"""The HTTP API: one queue of jobs, one worker a device, and three dialects that speak to both."""

from controlkit.serve.desk import Desk
from controlkit.serve.settings import Limits, Settings

__all__ = ["Desk", "Limits", "Settings"]
