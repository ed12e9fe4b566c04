"""Settings of a server: where it listens, whom it answers, and how much it takes on."""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from controlkit.errors import Invalid, one_line
from controlkit.sample.jobs import BATCH

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Names and addresses of this machine for itself."""


@dataclass(frozen=True)
class Limits:
    """The most that is taken on; what is beyond is refused in a sentence."""

    body: int = 64 << 20
    """Bytes of a request's body."""
    bodies: int = 512 << 20
    """Bytes of all bodies that are read at the same time; then 503."""
    pictures_given: int = 16
    """Pictures in a request."""
    pixels_given: int = 1 << 24
    """Pixels of each; 4096 x 4096."""
    side: int = 2048
    """Pixels of a side of the pictures to be made, in the second pass, too."""
    steps: int = 150
    """Sampling steps of a pass."""
    count: int = BATCH
    """Pictures of a job."""
    controls: int = 8
    """Controls of a picture."""
    loras: int = 16
    """LoRAs that a prompt names."""
    waiting: int = 256
    """Jobs that wait; then 503."""
    bytes_waiting: int = 512 << 20
    """Bytes of the jobs that wait, as they are stored."""
    kept: int = 500
    """Jobs that have ended whose pictures are kept; older ones are deleted."""


@dataclass(frozen=True)
class Folders:
    """Folders of files that may be asked for by name; None is none."""

    controls: Path | None = None
    """Beside the shipped ones."""
    loras: Path | None = None
    embeddings: Path | None = None
    """Textual inversions."""


@dataclass(frozen=True)
class Settings:
    """A server. ``Invalid`` for a host beyond this machine without a token, and for a token that is none."""

    state: Path
    """The folder of the queue and the pictures."""
    host: str = "127.0.0.1"
    port: int = 7860
    token: str = ""
    """The word that a client must send; "": none."""
    origins: Sequence[str] = ()
    """Origins of web pages that may ask, such as ``http://localhost:3000``, beside the server's own."""
    limits: Limits = field(default_factory=Limits)
    folders: Folders = field(default_factory=Folders)

    def __post_init__(self) -> None:
        if self.token and not re.fullmatch(r"[!-~]{8,200}", self.token):
            raise Invalid("--token is none: expected 8 to 200 letters, digits and signs of ASCII, without spaces.")
        if not self.token and not self.is_local:
            raise Invalid(
                f"--host {one_line(self.host)} lets other machines in: give a token, too, by --token or "
                "CONTROLKIT_TOKEN, or leave --host out."
            )
        for origin in self.origins:
            if not re.fullmatch(r"https?://[\w.\-\[\]:]+", origin):
                raise Invalid(f'--allow-origin is "{one_line(origin)}"; expected such as http://localhost:3000.')

    @property
    def is_local(self) -> bool:
        """Whether it listens to this machine alone."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a name or an address is that of this machine for itself."""
    if host.lower() in LOOPBACK:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
