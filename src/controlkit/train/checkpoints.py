"""A run's folder: who may write to it, whole checkpoints, and the log cut back to one."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from controlkit.backbones import Backbone
from controlkit.branch import ControlNetwork
from controlkit.errors import UserError
from controlkit.formats import SavedControl, save_control, write_tensors
from controlkit.images import SCRATCH, write_atomic
from controlkit.precision import faster_format, settle_format
from controlkit.train.optimizers import EMA, Optimizer
from controlkit.train.ranks import Ranks
from controlkit.train.recipe import FORMATS, Recipe, read_recipe
from controlkit.train.records import EvaluationSummary, summary_of

if TYPE_CHECKING:
    from controlkit.train.sharding import Shards


@dataclass(frozen=True)
class TrainState:
    """All that a step changes. Where it is shared out (``shards``), all processes ask for ``result`` and ``state``."""

    branch: ControlNetwork
    base: Backbone
    """What the branch learns on: the run's base, or one with a U-Net of its own that is unlocked sooner or later."""
    learning: nn.Module
    """What has parameters that learn: the branch, and such a U-Net."""
    optimizer: Optimizer
    average: EMA | None = None
    shards: "Shards | None" = None
    scaler: torch.amp.GradScaler | None = None
    """Scales the loss, so that float16 holds its gradients."""

    @classmethod
    def of(cls, recipe: Recipe, branch: ControlNetwork, base: Backbone, together: Ranks) -> "TrainState":
        """What a recipe asks for; ``UserError`` where the library of its optimizer is not installed."""
        learning: nn.Module = branch
        if recipe.unfreeze_after:
            learning = nn.ModuleDict({"branch": branch, "unet": base.denoiser.requires_grad_(True)})
        average = EMA(branch, recipe.ema) if recipe.ema else None
        shards = None
        if together.sharded:
            from controlkit.train.sharding import Shards

            shards = Shards(branch, [average.module] if average else [], base.device, together.count)
        optimizer = Optimizer(learning, recipe.optimizer, recipe.betas, recipe.weight_decay, recipe.epsilon)
        scaler = torch.amp.GradScaler(base.device.type) if recipe.precision == "fp16" else None
        return cls(branch, base, learning, optimizer, average, shards, scaler)

    def result(self) -> ControlNetwork:
        """The weights that are measured and saved, whole."""
        module = self.average.module if self.average else self.branch
        return self.shards.gathered(module) if self.shards else module  # type: ignore[return-value]

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradients to those at hand."""
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def clip(self, most: float) -> Tensor:
        """Scale the gradients down to a norm of at most ``most``; returns the norm they had, on the device."""
        if self.scaler:
            self.scaler.unscale_(self.optimizer)  # type: ignore[arg-type]  # it asks for param_groups alone
        norm = nn.utils.get_total_norm([p.grad for p in self.learning.parameters() if p.grad is not None])
        if self.shards:
            norm = self.shards.whole({"norm": norm}, keep=True)["norm"].to(norm.device)
        nn.utils.clip_grads_with_norm_(self.learning.parameters(), most, norm)
        return norm

    @property
    def forgives(self) -> bool:
        """Whether gradients that are not finite are left out, because the loss is scaled and may be scaled less."""
        return self.scaler is not None and self.scaler.get_scale() > 1

    def step(self, rate: float, number: int) -> None:
        """Step ``number``, from 1, with the gradients at hand."""
        if self.scaler:
            self.scaler.step(self.optimizer, rate)  # type: ignore[arg-type]
            self.scaler.update()
            self.learning.zero_grad()
        else:
            self.optimizer.step(rate)
        if self.average:
            self.average.update(self.branch, number)

    def state(self, keep: bool = True) -> dict[str, Tensor]:
        """All of it, as whole tensors by name; nothing where not ``keep``."""
        parts = {"optimizer": self.optimizer.state(), "learning": self.learning.state_dict()}
        if self.average:
            parts["average"] = self.average.module.state_dict()
        if self.scaler:
            parts["scaler"] = {n: torch.tensor(v) for n, v in self.scaler.state_dict().items()}
        found = {f"{part}.{name}": value.contiguous() for part, held in parts.items() for name, value in held.items()}
        return self.shards.whole(found, keep) if self.shards else found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a ``state``, of however many processes."""
        state = self.shards.parts(state) if self.shards else state

        def part(name: str) -> dict[str, Tensor]:
            return {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}

        self.learning.load_state_dict(part("learning"))
        self.optimizer.restore(part("optimizer"))
        if self.average:
            self.average.module.load_state_dict(part("average"))
        if self.scaler:
            self.scaler.load_state_dict({name: value.item() for name, value in part("scaler").items()})


_LAYOUT = "4"
"""Raised when a run that an earlier version began could not be gone on with as it began."""


def checkpoints_in(out: Path) -> list[Path]:
    """A run's checkpoints, the oldest first."""
    return sorted((out / "checkpoints").glob("step-*"))


def save_checkpoint(
    out: Path,
    step: int,
    controls: Mapping[str, SavedControl],
    base: Backbone,
    state: Mapping[str, Tensor],
    keep: int | None,
    more: Mapping[str, str] | None = None,
) -> None:
    """A whole checkpoint or none: written beside its place, then renamed. Older ones beyond ``keep`` go last.

    ``controls``: by the name of their folder in ``control``, or one under "" that is that folder itself.
    ``more``: facts to be told again by ``load_checkpoint``.
    """
    folder = out / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder, prefix=SCRATCH))
    try:
        for name, control in controls.items():
            save_control(scratch / "control" / name, control, base)
        facts = {"layout": _LAYOUT, "step": str(step), "base_digest": base.digest} | dict(more or {})
        write_tensors(scratch / "state.safetensors", state, facts)  # tensor by tensor: not all of it a second time
        scratch.chmod(0o755)
        target = folder / f"step-{step:07d}"
        if target.exists():
            shutil.rmtree(target)
        os.replace(scratch, target)
    except OSError as error:
        shutil.rmtree(scratch, ignore_errors=True)
        held = [p.name for p in checkpoints_in(out)]
        raise UserError(
            f"The checkpoint of step {step} could not be written ({error.strerror or error}). "
            f"Kept: {', '.join(held) or 'none'}. Make room, then run the same command to go on."
        ) from error
    for old in checkpoints_in(out)[: -keep if keep else 0]:
        shutil.rmtree(old, ignore_errors=True)  # what somebody holds open goes another time


def load_checkpoint(folder: Path, learner: TrainState, base: Backbone) -> dict[str, str]:
    """Put a checkpoint into ``learner``; returns its facts, ``step`` among them."""
    path = folder / "state.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            facts: dict[str, str] = file.metadata()
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({error}). Delete {folder} and run again: the run goes on from the one before."
        ) from error
    if facts.get("layout") != _LAYOUT:
        raise UserError(f"{folder} was written by an earlier version and cannot be gone on from: give another --out.")
    if facts["base_digest"] != base.digest:
        raise UserError(
            f'{folder} was trained on other weights of "{base.name}" ({facts["base_digest"]}, now {base.digest}): '
            "go on with those weights, or give another --out."
        )
    learner.restore(load_file(path))
    return facts


def logged_step(path: Path) -> int:
    """The last step of a log; 0 if there is none."""
    lines = path.read_text().splitlines() if path.is_file() else []
    for line in reversed(lines):
        with suppress(ValueError):  # the line a kill cut short
            return int(json.loads(line)["step"])
    return 0


def cut_log(path: Path, step: int) -> list[EvaluationSummary]:
    """Cut the log back to a checkpoint's step; returns the evaluations that remain."""
    lines = []
    evaluations = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            break  # the line a kill cut short
        if record["step"] > step:
            break
        lines.append(line)
        if seen := summary_of(record):
            evaluations.append(seen)
    write_atomic(path, "".join(f"{line}\n" for line in lines).encode())
    return evaluations


def check_folder(recipe: Recipe, out: Path) -> None:
    """Refuse a run's folder that is of another recipe, or no folder.

    What changes no step that was made may differ: how long the run goes on (``_lasting``).
    """
    path = out / "recipe.yaml"
    both = (read_recipe(path) if path.is_file() else recipe, recipe)
    endless = all(_endless(one) for one in both)
    before, after = (_lasting(one, endless) for one in both)
    if changed := [key for key, value in after.items() if before[key] != value]:
        longer = " A run can be made longer where its rate does not come down (no cooldown, schedule: constant)."
        raise UserError(
            f"{out} holds a run of another recipe (it differs in {', '.join(changed)}): give another --out, "
            f"or run with the recipe as it was to go on.{longer if {'steps', 'max_minutes'} & {*changed} else ''}"
        )
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; expected a folder, or a name for a new one.")


def _endless(recipe: Recipe) -> bool:
    """Whether the rate knows of no end of the run."""
    return recipe.schedule in ("constant", "constant_with_warmup") and not recipe.cooldown


def _lasting(recipe: Recipe, endless: bool) -> dict[str, Any]:
    """What of a recipe a run keeps from its first step to its last; its length, unless it is ``endless``."""
    values = recipe.model_dump(exclude={"keep": True, "checkpoint_every": True, "tracking": True,
                                        "evaluation": {"every", "patience", "target"}})  # fmt: skip
    if endless:
        del values["steps"], values["max_minutes"]
    return values


@contextmanager
def sole_owner(out: Path) -> Iterator[None]:
    """Hold the run's folder; ``UserError`` if another process holds it. A killed process holds nothing."""
    lock = FileLock(out / ".lock", timeout=0)
    try:
        with lock:
            yield
    except Timeout:
        raise UserError(f"Another process is training in {out}: wait until it ends, or give another --out.") from None


def begin_folder(recipe: Recipe, out: Path, device_type: str, rows: str = "") -> None:
    """Tidy what a kill left, write the recipe, and keep to the threads and number format the run began with.

    Bit-exactness holds for one thread count and one format, whatever this machine would choose now. ``rows``: a digest
    of the data set's; ``UserError`` where the run began with others: what it is measured on may be what it has seen.
    """
    path = out / "machine.json"
    begun = json.loads(path.read_text()) if path.is_file() else None
    if begun and begun.get("rows", rows) != rows:
        raise UserError(
            f"{recipe.data.source} has other names or captions than when the run in {out} began: put them back as they "
            "were, or give another --out (control.start_from: what this one has learnt)."
        )
    own = out.glob(".tmp??????")  # safetensors' name for a file that it is writing
    for stale in sorted([*out.rglob(f"{SCRATCH}*"), *own]):  # what a kill left half written
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink(missing_ok=True)
    write_atomic(out / "recipe.yaml", yaml.safe_dump(recipe.model_dump(), sort_keys=False).encode())
    if not begun:
        asked = FORMATS.get(recipe.precision) or faster_format(device_type)
        begun = {"threads": torch.get_num_threads(), "format": asked, "rows": rows}
        write_atomic(path, (json.dumps(begun) + "\n").encode())
    keep_format(out, device_type)


def keep_format(out: Path, device_type: str) -> None:
    """Keep to the threads and number format the run in ``out`` began with."""
    begun = json.loads((out / "machine.json").read_text())
    if begun["threads"] != torch.get_num_threads():
        torch.set_num_threads(begun["threads"])
    settle_format(device_type, begun["format"])
