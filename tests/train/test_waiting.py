"""A step reads a number off the device once: each time it does, a GPU's queue runs empty."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from controlkit.train import draw_batch, train_control
from controlkit.train.recipe import parse_recipe


class Reads(TorchDispatchMode):
    """Counts numbers read off tensors, wherever it is done, but for draws, which are made on the CPU."""

    def __init__(self):
        super().__init__()
        self.count, self.drawing = 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default and not self.drawing
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_of_several_parts_reads_off_the_device_once(optimizer, toy_base, tmp_path, monkeypatch):
    reads, lists, real = Reads(), [], torch.Tensor.tolist

    def drawn(*args):
        reads.drawing = True
        batch = draw_batch(*args)
        reads.drawing = False
        return batch

    def listed(tensor):  # on the CPU it is no operation that could be counted
        if not reads.drawing:
            lists.append(tensor.shape)
        return real(tensor)

    content = {
        "data": {"source": "fill50k", "count": 4},
        "batch": 4,
        "gradient_accumulation": 4,
        "evaluation": {"every": 0},
    }
    run = train_control(parse_recipe(content | {"optimizer": optimizer, "ema": 0.9}), tmp_path, toy_base)
    next(run)
    monkeypatch.setattr("controlkit.train.gradients.draw_batch", drawn)
    monkeypatch.setattr(torch.Tensor, "tolist", listed)
    with reads:
        assert next(run).loss > 0
    assert (reads.count, lists) == (0, [(2,)])
