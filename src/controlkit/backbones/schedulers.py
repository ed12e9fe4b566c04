"""Schedulers by their usual names, as one table over diffusers' classes."""

from typing import Any

from controlkit.errors import Invalid, Unsupported, nearest

_SOLVER = "DPMSolverMultistepScheduler"
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {}),
    "DDPM": ("DDPMScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "DPM++ 2M": (_SOLVER, {"algorithm_type": "dpmsolver++"}),
    "DPM++ 2M SDE": (_SOLVER, {"algorithm_type": "sde-dpmsolver++"}),
    "DPM++ 3M": (_SOLVER, {"algorithm_type": "dpmsolver++", "solver_order": 3}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "DEIS": ("DEISMultistepScheduler", {"algorithm_type": "deis"}),
    "LCM": ("LCMScheduler", {}),
    "TCD": ("TCDScheduler", {}),
}
"""Name, as A1111 writes it -> diffusers' class, and its settings beside the base's own."""

SPACINGS: dict[str, dict[str, Any]] = {
    "Karras": {"use_karras_sigmas": True},
    "Exponential": {"use_exponential_sigmas": True},
    "Beta": {"use_beta_sigmas": True},
    "SGM Uniform": {"timestep_spacing": "trailing"},
}
"""A word after the name -> settings of how steps are spread."""


def scheduler_named(name: str, base: Any) -> Any:
    """A new scheduler by its name, such as ``DPM++ 2M Karras``, for the noise of ``base``, a scheduler of diffusers.

    Betas, prediction and zero terminal SNR are the base's. Letters' case does not matter. Raises ``Invalid`` for names
    that are not known and for a spacing that the scheduler does not have, ``Unsupported`` where a package is missing.
    """
    import diffusers

    kind, spacing = parted_name(name)
    made = getattr(diffusers, SCHEDULERS[kind][0])
    spread = SPACINGS.get(spacing, {})
    if not has_spacing(kind, spacing):
        having = [one for one in SCHEDULERS if has_spacing(one, spacing)]
        raise Invalid(f'"{kind}" has no spacing "{spacing}"; these have it: {", ".join(having)}.')
    off = {
        key: False for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas") if key in _keys(made)
    }
    try:
        return made.from_config(base.config, **(off | SCHEDULERS[kind][1] | spread))
    except ImportError as error:
        raise Unsupported(f'The spacing "{spacing}" needs a package: pip install scipy') from error


def has_spacing(kind: str, spacing: str) -> bool:
    """Whether a scheduler of ``SCHEDULERS`` can spread its steps as one of ``SPACINGS``, or "", says."""
    import diffusers

    return SPACINGS.get(spacing, {}).keys() <= _keys(getattr(diffusers, SCHEDULERS[kind][0]))


def own_name(noise: Any) -> str:
    """The usual name of a noise process's own scheduler; where it has none, that of diffusers' class."""
    made = type(getattr(noise, "scheduler", None)).__name__
    known = {name: usual for usual, (name, more) in SCHEDULERS.items() if not more}
    return known.get(made, made.removesuffix("Scheduler")) if made != "NoneType" else "Euler"  # of a flow


def _keys(made: Any) -> set[str]:
    """The settings that a class of diffusers has."""
    return set(made._get_init_keys(made))


def parted_name(name: str) -> tuple[str, str]:
    """A name as (scheduler, spacing or ""), spelled as in the tables; ``Invalid`` for one that is not known."""
    names = {f"{kind} {spacing}".strip().lower(): (kind, spacing) for kind in SCHEDULERS for spacing in ("", *SPACINGS)}
    found = names.get(name.strip().lower().replace("_", " "))
    if found is None:
        guess = nearest(name, SCHEDULERS).removesuffix(".")
        raise Invalid(f'There is no scheduler "{name:.80}": {guess}; each with one of {", ".join(SPACINGS)} after it.')
    return found
