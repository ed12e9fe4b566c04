"""Orders: what a job is to do, as values that are written into the queue and read by a worker."""

import hashlib
import secrets
from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from controlkit.prompts import DIALECTS, without_loras
from controlkit.sample.jobs import likeness
from controlkit.sample.request import HintSource, Request


class _Order(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    def to_json(self) -> str:
        """All of it as JSON, pictures as ``data:`` URIs."""
        return self.model_dump_json()

    @property
    def count(self) -> int:
        """How many pictures are to be made."""
        return 1

    @property
    def alike(self) -> str:
        """A digest that orders have in common that can be made in one batch; "" where an order is made by itself."""
        return ""


class Pictures(_Order):
    """Pictures to make: one request, and the seeds of each."""

    kind: Literal["generate"] = "generate"
    request: Request
    seeds: tuple[tuple[int, int], ...]
    """Of each picture its seed, and that of its variation."""
    shows_hints: bool = False
    """Whether the hints are wanted, too."""
    takes_parts: bool = False
    """Whether pictures are wanted as they are when they are interrupted."""

    @property
    def count(self) -> int:
        """How many pictures are to be made."""
        return len(self.seeds)

    @property
    def loras(self) -> tuple[tuple[str, float], ...]:
        """The LoRAs that the prompt names, in the dialect that can, with their weights; not names that are known."""
        return tuple(without_loras(self.request.prompt)[1]) if DIALECTS[self.request.dialect].edits else ()

    @property
    def alike(self) -> str:
        """A digest of the controls, the LoRAs, and what pictures made together share.

        Where a picture's own shape decides the size, it is of that shape; where its mask does, an order is made alone.
        """
        edit, shape = self.request.edit, ()
        if edit and self.request.size is None:
            if edit.margin is not None:
                return ""
            assert isinstance(edit.image, np.ndarray)
            shape = (*edit.image.shape[:2], edit.outpaint)
        shared = (*likeness(self.request)[:2], self.loras, shape)
        return hashlib.sha256(repr(shared).encode()).hexdigest()[:32]

    def requests(self) -> list[Request]:
        """The request of each picture, its prompt without the names of LoRAs."""
        plain = {"prompt": without_loras(self.request.prompt)[0]} if self.loras else {}
        return [
            self.request.model_copy(update={"seed": seed, "variation_seed": other, **plain})
            for seed, other in self.seeds
        ]


class Annotation(_Order):
    """A hint to make of a picture."""

    kind: Literal["annotate"] = "annotate"
    annotator: str
    options: Mapping[str, float] = {}
    picture: HintSource
    side: int | None = None
    """The shorter side of the hint in pixels; None is as the picture's."""


class Evaluation(_Order):
    """A control to measure, as ``controlkit evaluate`` does."""

    kind: Literal["evaluate"] = "evaluate"
    control: str
    """As ``load_control`` takes it."""
    annotator: str | None = None
    num: int = 32
    steps: int = 20
    guidance: float = 4.0
    scale: float = 1.0


def drawn_seed() -> int:
    """A seed that nobody chose, of 32 bits."""
    return secrets.randbelow(2**32)


Order = Pictures | Annotation | Evaluation
_READER: TypeAdapter[Order] = TypeAdapter(Annotated[Order, Field(discriminator="kind")])


def order_of(text: str) -> Order:
    """The order that ``to_json`` wrote."""
    return _READER.validate_json(text)
