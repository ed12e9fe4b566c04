"""A branch sharded over the processes of a run (FSDP2): each holds a part of every weight, of its gradient and of its
optimizer state. A layer's weights are gathered while the layer computes, and freed after it.

Files hold whole tensors: they are gathered to be saved, and cut into parts again when they are read.
"""

import copy
from collections.abc import Callable, Mapping

import torch
from diffusers.models.resnet import Downsample2D, ResnetBlock2D
from diffusers.models.transformers import Transformer2DModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from controlkit.branch import ControlNetwork

LAYERS = (ResnetBlock2D, Transformer2DModel, Downsample2D)
"""The modules that an encoder calls: weights are gathered for each call."""


class _Within(nn.Module):
    """The outermost module of a sharded branch, whose call gathers the weights: a branch is used by several methods."""

    def __init__(self, branch: ControlNetwork) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, compute: Callable[[], Tensor]) -> Tensor:
        return compute()


class Shards:
    """Shards ``branch``, and ``others`` of the same shape, over ``count`` processes, which hold equal ones.

    Their parameters are then parts (``DTensor``), and the loss has to be computed ``within``.
    """

    def __init__(self, branch: ControlNetwork, others: list[nn.Module], device: torch.device, count: int) -> None:
        self._mesh = init_device_mesh(device.type, (count,))
        self._device = device
        self._shape = copy.deepcopy(branch).to("meta")
        for module in (branch, *others):
            for layer in reversed(list(module.modules())):  # the inner ones first
                if isinstance(layer, LAYERS):
                    fully_shard(layer, mesh=self._mesh)
        self._within = _Within(branch)
        for module in (self._within, *others):
            fully_shard(module, mesh=self._mesh)

    def within(self, compute: Callable[[], Tensor]) -> Tensor:
        """Call ``compute`` with the branch's weights gathered."""
        return self._within(compute)

    def whole(self, state: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
        """Gather every tensor of ``state`` on the CPU; empty where not ``keep``. All processes have to call it."""
        gathered = {}
        for name, value in state.items():
            full = value.full_tensor() if isinstance(value, DTensor) else value
            if keep:
                gathered[name] = full.cpu()
        return gathered

    def parts(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cut this process's parts out of a whole ``state``, along the first dimension as FSDP does; not of scalars."""
        return {
            name: distribute_tensor(value, self._mesh, [Shard(0)], src_data_rank=None) if value.ndim else value
            for name, value in state.items()
        }

    def gather(self, module: nn.Module) -> ControlNetwork:
        """Make an ordinary branch with whole weights of ``module``. All processes have to call it."""
        branch = copy.deepcopy(self._shape).to_empty(device=self._device)
        branch.load_state_dict(self.whole(module.state_dict(), keep=True))
        return branch
