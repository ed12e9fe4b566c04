"""A branch shared out over the processes of a run (FSDP2): each holds a part of every weight, of its gradient and of
what the optimizer remembers of it. A layer's weights are put together where the layer computes, and let go after it.

Files know nothing of this: what is saved is gathered whole first, and cut up again when it is read.
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
"""What the walk through an encoder calls: weights are gathered for what is called, and for nothing around it."""


class _Within(nn.Module):
    """Computes anything with a sharded branch, by whatever of its methods.

    FSDP gathers weights when the outermost module is called, which is this one: a branch is not only called, its hint
    encoder is asked by itself.
    """

    def __init__(self, branch: ControlNetwork) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, compute: Callable[[], Tensor]) -> Tensor:
        return compute()


class Shards:
    """Shares out ``branch``, and ``others`` of the same shape, over ``count`` processes, which hold equal ones.

    From then on their parameters are parts (``DTensor``), and the loss has to be computed ``within``.
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
        """What ``compute`` gives, where the branch's weights are there to be computed with."""
        return self._within(compute)

    def whole(self, state: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
        """``state`` with every tensor gathered, on the CPU, one after the other. All processes have to ask; one that
        does not ``keep`` it only helps, and gets nothing."""
        gathered = {}
        for name, value in state.items():
            full = value.full_tensor() if isinstance(value, DTensor) else value
            if keep:
                gathered[name] = full.cpu()
        return gathered

    def parts(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's parts of a whole ``state``, cut along the first dimension as FSDP does; numbers stay whole."""
        return {
            name: distribute_tensor(value, self._mesh, [Shard(0)], src_data_rank=None) if value.ndim else value
            for name, value in state.items()
        }

    def gathered(self, module: nn.Module) -> ControlNetwork:
        """An ordinary branch with the whole weights of ``module``, while it is needed. All processes have to ask."""
        branch = copy.deepcopy(self._shape).to_empty(device=self._device)
        branch.load_state_dict(self.whole(module.state_dict(), keep=True))
        return branch
