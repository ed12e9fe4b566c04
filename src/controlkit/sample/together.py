"""Batches that differ in steps, scheduler or guidance, predicted in one pass through the base.

Each batch is a generator that yields an ``Ask`` where it needs a prediction, and is sent the answer. So one loop serves
a batch by itself and several side by side, each with its own schedule; one that ends leaves the others.
"""

from collections.abc import Callable, Generator, Hashable, Sequence
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from controlkit.backbones import ActiveControl, Backbone, TextEmbedding

Result = TypeVar("Result")


class Ask(NamedTuple):
    """A prediction that a batch needs: the arguments of ``Backbone.predict``, whose rows are its pictures by halves."""

    x: Tensor
    t: Tensor
    text: TextEmbedding
    controls: list[ActiveControl]
    """With their scales."""
    pictures: int

    def form(self) -> Hashable:
        """Equal forms can be answered in one pass: of the same networks and shapes."""
        controls = [(id(one.network), one.silent > 0, _shapes((one.features, one.scale))) for one in self.controls]
        return repr([self.x.dtype, len(self.text) // self.pictures, _shapes((self.x, self.text.tensors())), *controls])


Batch = Generator[Any, Any, Result]
"""Yields an ``Ask`` and is sent the prediction, a tensor, or yields a record and is sent None; returns its result."""


def relayed(batch: Batch[Result], turned: Callable[[Any], Any]) -> Batch[Result]:
    """A batch whose records are turned into others on their way."""
    answer = None
    while True:
        try:
            said = batch.send(answer)
        except StopIteration as end:
            return end.value
        answer = yield said if isinstance(said, Ask) else turned(said)


@torch.no_grad()
def side_by_side(base: Backbone, batches: Sequence[Batch[Result]]) -> Generator[Any, None, list[Result]]:
    """Run batches, answering those that ask alike in one pass; yields their records, returns their results."""
    results: dict[int, Result] = {}
    answers: dict[int, Tensor | None] = dict.fromkeys(range(len(batches)))
    while answers:
        asks: dict[int, Ask] = {}
        for number, answer in answers.items():
            try:
                while not isinstance(said := batches[number].send(answer), Ask):
                    answer = None
                    yield said
                asks[number] = said
            except StopIteration as end:
                results[number] = end.value
        answers = _answers(base, asks)
    return [results[number] for number in range(len(batches))]


def _answers(base: Backbone, asks: dict[int, Ask]) -> dict[int, Tensor | None]:
    """The prediction that each asks for."""
    forms = {number: ask.form() if len(asks) > 1 else "" for number, ask in asks.items()}
    found: dict[int, Tensor | None] = {}
    for _, alike in groupby(sorted(asks, key=lambda number: (forms[number], number)), forms.__getitem__):
        numbers = list(alike)
        some = [asks[number] for number in numbers]
        with base.inference():
            prediction = base.predict(*_joined(some)[:4])
        found |= zip(numbers, _split(prediction, [ask.pictures for ask in some]), strict=True)
    return dict(sorted(found.items()))


def _joined(asks: Sequence[Ask]) -> Ask:
    """One question of several: of each half the rows of all, half by half."""
    if len(asks) == 1:
        return asks[0]

    def rows(*values: Any) -> Any:
        leaves, form = zip(*(tree_flatten(value) for value in values), strict=True)
        joined = [_by_halves(column, [ask.pictures for ask in asks]) for column in zip(*leaves, strict=True)]
        return tree_unflatten(joined, form[0])

    text = TextEmbedding(**rows(*(ask.text.tensors() for ask in asks)))
    controls = [
        ActiveControl(
            column[0].network,
            rows(*(one.features for one in column)),
            rows(*(dict(one.scale or {}) for one in column)),
            sum(one.silent for one in column),
        )
        for column in zip(*(ask.controls for ask in asks), strict=True)
    ]
    pictures = sum(ask.pictures for ask in asks)
    return Ask(rows(*(ask.x for ask in asks)), rows(*(ask.t for ask in asks)), text, controls, pictures)


def _by_halves(values: Sequence[Tensor], pictures: Sequence[int]) -> Tensor:
    parts = [value.split(count) for value, count in zip(values, pictures, strict=True)]
    return torch.cat([part for half in zip(*parts, strict=True) for part in half])


def _split(prediction: Tensor, pictures: Sequence[int]) -> list[Tensor]:
    """The rows of each question of a joined one's answer."""
    halves = len(prediction) // sum(pictures)
    parts = prediction.split([*pictures] * halves)
    return [torch.cat(parts[number :: len(pictures)]) for number in range(len(pictures))]


def _shapes(tree: Any) -> str:
    leaves, form = tree_flatten(tree)
    return repr((form, [leaf.shape[1:] if isinstance(leaf, Tensor) else leaf for leaf in leaves]))
