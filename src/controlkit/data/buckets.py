"""Aspect-ratio buckets: a handful of sizes for pictures of all shapes, and whose turn it is at which step.

A batch is of one size. Pictures are brought to the size nearest to them in shape, and each step takes its batch from
one bucket, as often as the bucket has pictures.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence

from controlkit.seeds import numpy_rng

Size = tuple[int, int]
"""Height and width in pixels."""


def bucket_sizes(size: int, multiple: int) -> list[Size]:
    """The sizes of about ``size`` x ``size`` pixels and never more, with sides that ``multiple`` divides.

    Sides are half to twice ``size``: shapes from 1:4 to 4:1, as kohya's buckets are.
    """
    found = {(size // multiple * multiple,) * 2}
    for side in range(multiple, 2 * size + 1, multiple):
        other = size * size // side // multiple * multiple
        if 2 * min(side, other) >= size:
            found |= {(side, other), (other, side)}
    return sorted(found)


def nearest_bucket(sides: Size, sizes: Sequence[Size]) -> Size:
    """The bucket for a picture of these (height, width): nearest in shape, and of equal ones the largest."""
    shape = math.log(sides[0] / sides[1])
    return min(sizes, key=lambda size: (round(abs(shape - math.log(size[0] / size[1])), 6), -size[0] * size[1]))


def turn_at(counts: Sequence[int], batch: int, step: int, seed: int) -> tuple[int, int]:
    """(which bucket has a step, how many steps it had before), for buckets of ``counts`` pairs, ``batch`` pairs a step.

    Depends on the seed and the step alone. Whenever every pair has been due e times, each bucket has had all the whole
    batches in e x its pairs; what is left over counts towards its next. Within such an epoch the order is shuffled.
    """

    def had(epochs: int) -> list[int]:
        return [epochs * count // batch for count in counts]

    # had(e) adds up to at most e x pairs / batch, and to less than one a bucket below it.
    likely = step * batch // sum(counts)
    epochs = range(likely, likely + (len(counts) + 1) * -(-batch // sum(counts)) + 2)
    epoch = epochs[bisect_right(epochs, step, key=lambda e: sum(had(e))) - 1]
    before, after = had(epoch), had(epoch + 1)
    order = [which for which, (first, last) in enumerate(zip(before, after, strict=True)) for _ in range(last - first)]
    if len(counts) > 1:
        order = [order[k] for k in numpy_rng("buckets", seed, epoch).permutation(len(order))]
    place = step - sum(before)
    return order[place], before[order[place]] + order[:place].count(order[place])
