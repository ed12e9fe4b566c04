"""Noise processes: noise added to latents, the prediction's target in training, and the steps of sampling.

Each base has one; training and sampling ask it and nothing else. Schedulers are diffusers'.
"""

# ruff: noqa: D102  # members of the two protocols are explained there

import inspect
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from controlkit.backbones.schedulers import scheduler_named
from controlkit.errors import Invalid, Unsupported

Prediction = Literal["eps", "v", "flow"]
"""The noise; v = alpha eps - sigma x_0 (Salimans and Ho, 2022); or the velocity eps - x_0 of a straight flow."""


Noises = Sequence[torch.Generator] | None


class Sampler(Protocol):
    """One run through the timesteps, from noise to latents. It may remember earlier steps: make one for each run."""

    timesteps: Tensor
    """(steps,), the most noise first."""

    def begin(self, step: int) -> None:
        """Begin at a step, from 0; called once, before anything else."""

    def start(self, noise: Tensor) -> Tensor:
        """The first latents (B, C, h, w) of a run, given standard normal noise of that shape."""

    def noised(self, latents: Tensor, noise: Tensor, step: int) -> Tensor:
        """Latents (B, C, h, w) of pictures with as much noise as there is before a step; after the last, with none.

        The run begins at this step, or has just arrived there.
        """

    def scaled(self, x: Tensor, t: Tensor) -> Tensor:
        """Noisy latents x (B, C, h, w) at a timestep, as the base reads them."""

    def step(self, prediction: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """The latents (B, C, h, w) after a step, given the base's prediction and the latents x before it."""


class NoiseProcess(Protocol):
    """Noise in training and in sampling. Timesteps in training are whole numbers, 0 to ``count`` - 1."""

    prediction: Prediction
    count: int

    def add(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noisy latents z_t (B, C, h, w) of latents z_0 and standard normal noise, at timesteps t (B,)."""

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The value (B, C, h, w) that the base should predict of them."""

    def sampler(self, steps: int, scheduler: str | None = None, noises: Noises = None) -> Sampler:
        """A run of so many steps, 1 to ``count``.

        Args:
            scheduler: its name, as in ``SCHEDULERS``; None is the base's own.
            noises: of each picture, what noise is drawn from on the way, by schedulers that draw some.

        Raises ``Invalid`` for a name that is not known or does not fit.
        """


class Diffusion(NoiseProcess):
    """The variance-preserving process of Stable Diffusion, sqrt(alpha_bar) z_0 + sqrt(1 - alpha_bar) eps.

    By one of diffusers' schedulers. Raises ``Unsupported`` where the scheduler's prediction is neither noise nor v.
    """

    PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v"}  # noqa: RUF012
    """Names in diffusers' scheduler configurations -> ours."""

    def __init__(self, scheduler: Any) -> None:
        name = scheduler.config.prediction_type
        if name not in self.PREDICTIONS:
            raise Unsupported(f'The scheduler predicts "{name}"; expected one of {", ".join(self.PREDICTIONS)}.')
        self.scheduler, self.prediction = scheduler, self.PREDICTIONS[name]
        self.count: int = scheduler.config.num_train_timesteps

    def add(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return self.scheduler.add_noise(latents, noise, t.long())

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise if self.prediction == "eps" else self.scheduler.get_velocity(latents, noise, t.long())

    def sampler(self, steps: int, scheduler: str | None = None, noises: Noises = None) -> "SchedulerRun":
        made = scheduler_named(scheduler, self.scheduler) if scheduler else self.scheduler
        return SchedulerRun(made, steps, noises)


class SchedulerRun(Sampler):
    """A ``Sampler`` by one of diffusers' schedulers, of which it takes a fresh copy."""

    def __init__(self, scheduler: Any, steps: int, noises: Noises = None) -> None:
        self._scheduler = type(scheduler).from_config(scheduler.config)
        self._scheduler.set_timesteps(steps)
        self.timesteps = self._scheduler.timesteps
        draws = "generator" in inspect.signature(self._scheduler.step).parameters
        self._drawn_from = {"generator": list(noises)} if draws and noises is not None else {}

    def begin(self, step: int) -> None:
        if hasattr(self._scheduler, "set_begin_index"):  # else it looks for the timestep, which may be there twice
            self._scheduler.set_begin_index(step)

    def start(self, noise: Tensor) -> Tensor:
        return noise * getattr(self._scheduler, "init_noise_sigma", 1.0)  # a flow begins with the noise itself

    def noised(self, latents: Tensor, noise: Tensor, step: int) -> Tensor:
        if step == len(self.timesteps):
            return latents
        t = self.timesteps[step : step + 1]
        if hasattr(self._scheduler, "scale_noise"):
            return self._scheduler.scale_noise(latents, t, noise)
        return self._scheduler.add_noise(latents, noise, t)

    def scaled(self, x: Tensor, t: Tensor) -> Tensor:
        scale = getattr(self._scheduler, "scale_model_input", None)  # a flow's latents are read as they are
        return scale(x, t) if scale else x

    def step(self, prediction: Tensor, t: Tensor, x: Tensor) -> Tensor:
        return self._scheduler.step(prediction, t, x, **self._drawn_from).prev_sample


class Flow(NoiseProcess):
    """A straight flow between noise and latents (rectified flow, Liu et al., 2022): z_s = (1 - s) z_0 + s eps.

    The base predicts the velocity eps - z_0. Timestep t stands for s = t / ``count``.
    """

    prediction = "flow"

    def __init__(self, count: int = 1000, shift: float = 1.0) -> None:
        self.count, self.shift = count, shift

    def add(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        share = (t / self.count).view(-1, *[1] * (latents.dim() - 1)).to(latents)
        return torch.lerp(latents, noise, share)

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - latents

    def sampler(self, steps: int, scheduler: str | None = None, noises: Noises = None) -> SchedulerRun:
        from diffusers import FlowMatchEulerDiscreteScheduler

        if scheduler:
            raise Invalid(f'The scheduler "{scheduler:.80}" is of diffusion; this base is a flow: leave it out.')
        return SchedulerRun(FlowMatchEulerDiscreteScheduler(self.count, self.shift), steps)
