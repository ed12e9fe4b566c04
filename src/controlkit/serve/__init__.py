"""The HTTP API: one queue of jobs, one worker a device, and three APIs that speak to both (the extra `serve`)."""

from controlkit.serve.replicas import serve_replicas
from controlkit.serve.running import serve
from controlkit.serve.settings import Folders, Limits, Settings

__all__ = ["Folders", "Limits", "Settings", "serve", "serve_replicas"]
