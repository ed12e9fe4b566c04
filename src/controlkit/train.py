"""Training a control: the paper's objective as an iterator of records, with exact resume.

``train_control(recipe, out)`` yields one ``Record`` a step; the command line prints them, ``OUT/log.jsonl`` keeps
them, a test takes three and stops. Run again with the same folder, it goes on from the last checkpoint and yields
what the uninterrupted run would have: every draw is keyed by (seed, step, sample), and checkpoints are whole or absent.
"""

import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from controlkit.annotators import ANNOTATORS, contract
from controlkit.backbones import Text, UNetBase, load_base, recomputed
from controlkit.branch import ControlBranch, ControlSpec
from controlkit.data import (
    Cached,
    CirclePairs,
    EmojiPairs,
    Pair,
    ScenePairs,
    TypedPairs,
    build_cache,
    hint_of,
    split_folder,
)
from controlkit.errors import UserError, nearest
from controlkit.formats import SavedControl, load_control, save_control
from controlkit.images import SCRATCH, Hint, grid, write_atomic, write_png
from controlkit.measure import (
    FOUND,
    Obedience,
    ceiling_pictures,
    check_findable,
    fidelity,
    metric_of,
    obedience,
    three_ways,
)
from controlkit.optimizers import Average, Optimizer
from controlkit.precision import autocast, number_format, settle_format, training_attention
from controlkit.ranks import Ranks, ranks
from controlkit.recipe import ControlRecipe, EvaluationRecipe, Recipe, read_recipe
from controlkit.sample import Control, Settings
from controlkit.seeds import numpy_rng, torch_rng
from controlkit.union import TYPES, UnionBranch

# --- records ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """One step of a run: what a line of ``log.jsonl`` holds. ``evaluation`` is there on the steps that have one."""

    step: int
    loss: float
    seconds: float
    evaluation: Obedience | None = None
    verdict: str | None = None
    relative: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """By type of hint, or under "": the loss on held-out pairs, relative to the base without control, with the same
    noise each time, in each quarter of the schedule from the least noise on. 1 is no control; a loss by itself says
    little, for it hardly moves while control comes."""

    def to_json(self) -> str:
        """The log's line; means alone for the figures' main keys, intervals for obedience."""
        line: dict[str, Any] = {"step": self.step, "loss": self.loss, "seconds": round(self.seconds, 3)}
        if self.evaluation is not None:
            for name in ("fidelity", "floor", "ceiling", "obedience"):
                line[name] = round(getattr(self.evaluation, name).mean, 5)
            line["obedience_interval"] = [
                self.evaluation.obedience.low,
                self.evaluation.obedience.high,
            ]
            line["counts"] = self.evaluation.counts
            line["verdict"] = self.verdict
        if self.relative:
            line["relative_loss"] = {kind: [round(x, 4) for x in quarters] for kind, quarters in self.relative.items()}
        return json.dumps(line)


@dataclass(frozen=True)
class Seen:
    """What an evaluation says of control: the lower bound of obedience, whether it counts, and its mean."""

    step: int
    low: float
    counts: bool
    mean: float = float("nan")

    @property
    def control(self) -> bool:
        """Whether control was seen."""
        return self.counts and self.low >= FOUND


def seen_in(line: Mapping[str, Any]) -> Seen | None:
    """What a line of the log says of control; None for a step without evaluation."""
    if "obedience" not in line:
        return None
    return Seen(line["step"], line["obedience_interval"][0], line["counts"], line["obedience"])


def found_step(evaluations: Sequence[Seen]) -> int | None:
    """The first of two successive evaluations whose lower bound of obedience is at least ``FOUND``."""
    return next((a.step for a, b in itertools.pairwise(evaluations) if a.control and b.control), None)


def best_of(evaluations: Sequence[Seen]) -> Seen | None:
    """The first of those that count with the highest obedience."""
    return max((one for one in evaluations if one.counts), key=lambda one: one.mean, default=None)


def enough(recipe: EvaluationRecipe, evaluations: Sequence[Seen]) -> bool:
    """Whether a run ends before its last step: it got where it should, or has not got better for long enough."""
    best = best_of(evaluations)
    if best is None:
        return False
    if recipe.target is not None and any(one.counts and one.low >= recipe.target for one in evaluations):
        return True
    return 0 < recipe.patience <= sum(one.step > best.step for one in evaluations)


def verdict(evaluations: Sequence[Seen]) -> str:
    """The state of the run in words (the paper's sudden convergence, Section 3.3 and Figure 4)."""
    if (step := found_step(evaluations)) is not None:
        return f"control found at step {step}"
    if evaluations and evaluations[-1].control:
        return f"control perhaps found at step {evaluations[-1].step}: the next evaluation will confirm"
    if evaluations and not evaluations[-1].counts:
        return "control cannot be told here: floor and ceiling are too close, or the ceiling too low"
    return "no control yet"


# --- the pairs ----------------------------------------------------------------------------------------------


def training_pairs(recipe: Recipe, base: UNetBase) -> tuple[Sequence[Pair], Sequence[Pair]]:
    """(pairs to train on, held-out pairs to measure obedience on)."""
    data, num = recipe.data, recipe.evaluation.num
    emoji, scenes = (data.source in (name, "world") for name in ("emoji", "scenes"))
    if emoji or scenes:
        seen: list[Sequence[Pair]] = []
        heldout: list[Sequence[Pair]] = []
        if emoji:
            seen.append(EmojiPairs(base.size, "control", data.variants, recipe.seed, data.count))
            heldout.append(EmojiPairs(base.size, "heldout_concepts", seed=recipe.seed, count=num))
        if scenes:
            seen.append(ScenePairs(base.size, data.scenes, recipe.seed, count=data.count))
            heldout.append(ScenePairs(base.size, data.scenes, recipe.seed, heldout=True, count=num))
        visits = [1] * emoji + [data.visits] * scenes
        types = recipe.control.types
        return TypedPairs(seen, types or [""], visits), TypedPairs(heldout, types, [4] * 2) if types else heldout[0]
    if recipe.control.types:
        raise UserError(
            f'A Union learns from data.source emoji, scenes or world; "{data.source}" has hints of one type.'
        )
    if data.source == "fill50k":
        count = data.count or 50_000
        return CirclePairs(base.size, count, recipe.seed), CirclePairs(base.size, num, recipe.seed, first=count)
    if not Path(data.source).is_dir():
        known = ["emoji", "scenes", "world", "fill50k"]
        raise UserError(f'data.source is "{data.source}", which is no folder: {nearest(data.source, known)}')
    folder, held = split_folder(Path(data.source), base.size)
    if not folder.hinted and recipe.control.annotator not in ANNOTATORS:
        raise UserError(
            f"{data.source} has pictures and no hints, and nothing here makes hints of "
            f'"{recipe.control.annotator}": set control.annotator to one of {", ".join(ANNOTATORS)}.'
        )
    return folder.part(slice(data.count)), held.part(slice(num))


def hints_of(recipe: Recipe) -> dict[str, Hint]:
    """The contracts of a recipe's hints: by type for a Union, else one under ""."""
    control = recipe.control
    if not control.types:
        made = ANNOTATORS.get(control.annotator)
        if control.options and not made:
            raise UserError(f"Nothing here makes hints of {control.annotator}: leave out control.options.")
        return {"": made.hint(**control.options) if made else contract(control.annotator)}
    plain = ControlRecipe()
    words = {"annotator", "options", "body", "join", "taps"}
    if changed := [word for word in sorted(words) if getattr(control, word) != getattr(plain, word)]:
        raise UserError(f"A Union has no control.{changed[0]}: with control.types it is the paper's copy, all of it.")
    if unknown := [kind for kind in control.types if kind not in TYPES]:
        raise UserError(f'control.types has "{unknown[0]}": {nearest(unknown[0], TYPES)}')
    return {kind: ANNOTATORS[kind].hint() if kind in ANNOTATORS else contract(kind) for kind in control.types}


# --- the objective ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """One step's draws: latents z_0, noise, timesteps, text and hints."""

    latents: Tensor  # (B, C, h, w)
    noise: Tensor  # (B, C, h, w)
    t: Tensor  # (B,)
    text: Text
    hints: Mapping[str, Tensor]  # by type, or under "": (pairs of that type, channels, H, W), in its contract's range
    draws: int = 1  # rows of a pair, one after the other


def draw_batch(
    base: UNetBase,
    cached: Cached,
    contracts: Mapping[str, Hint],
    recipe: Recipe,
    step: int,
    part: int = 0,
    parts: int = 1,
) -> Batch:
    """The batch of a step, or one of several equal parts of it: shuffled epochs, with noise, timestep and prompt
    dropout keyed by (seed, step, sample).

    Pairs of one type of hint stand together, in the contracts' order. Of several draws of a pair each has its timestep
    from a share of the schedule of its own.
    """
    names = list(contracts)
    count = recipe.batch // recipe.draws
    own = range(part * count // parts, (part + 1) * count // parts)
    order: dict[int, np.ndarray] = {}
    chosen = {}
    for place in own:
        number = step * count + place
        epoch, turn = divmod(number, len(cached))
        if epoch not in order:
            order[epoch] = numpy_rng("order", recipe.seed, epoch).permutation(len(cached))
        chosen[place] = int(order[epoch][turn])
    places = sorted(own, key=lambda place: int(cached.kinds[chosen[place]]))

    total = base.scheduler.config.num_train_timesteps
    shares = [total * draw // recipe.draws for draw in range(recipe.draws + 1)]
    latents, noise, times, rows = [], [], [], []
    hints: dict[str, list[Tensor]] = {}
    for place in places:
        index = chosen[place]
        moments = cached.moments[index].float()
        shape = (moments.shape[0] // 2, *moments.shape[1:])
        for draw in range(recipe.draws):
            generator = torch_rng("noise", recipe.seed, step, place * recipe.draws + draw)
            latents.append(base.draw_latents(moments[None], torch.randn(shape, generator=generator))[0])
            noise.append(torch.randn(shape, generator=generator))
            times.append(int(torch.randint(shares[draw], shares[draw + 1], (), generator=generator)))
            dropped = float(torch.rand((), generator=generator)) < recipe.prompt_dropout
            rows.append(0 if dropped else int(cached.prompt_rows[index]))
        picture, name = cached.hints[index].numpy(), names[int(cached.kinds[index])]
        hints.setdefault(name, []).append(contracts[name].tensor(picture, picture.shape[:2]))
    device = base.device
    return Batch(
        torch.stack(latents).to(device),
        torch.stack(noise).to(device),
        torch.tensor(times, device=device),
        cached.text[rows].to(device, torch.float32),
        {name: torch.cat(of_type).to(device) for name, of_type in hints.items()},
        recipe.draws,
    )


def _features(branch: ControlBranch, batch: Batch) -> Any:
    """What the branch reads of a batch's hints, for row after row; a Union's types one after the other."""
    read = branch.encode_each(batch.hints) if isinstance(branch, UnionBranch) else branch.encode_hint(batch.hints[""])
    if isinstance(read, Tensor):
        return read.repeat_interleave(batch.draws, 0)
    return {name: feature.repeat_interleave(batch.draws, 0) for name, feature in read.items()}


def controlled(base: UNetBase, branch: ControlBranch, z: Tensor, t: Tensor, text: Text, features: Any) -> Tensor:
    """The base's prediction under control: what a step spends its time on, apart from reading hints."""
    return base.decode_noise(base.encode_noise(z, t, text), branch(z, t, text, features))


def objective(
    base: UNetBase, branch: ControlBranch, batch: Batch, predict: Callable[..., Tensor] = controlled
) -> Tensor:
    """Equation (5): the mean squared error of the prediction, given z_t, t, the prompt and the hint.

    ``predict`` is ``controlled``, or that compiled.
    """
    z = base.scheduler.add_noise(batch.latents, batch.noise, batch.t)
    prediction = predict(base, branch, z, batch.t, batch.text, _features(branch, batch))
    return F.mse_loss(prediction.float(), target_of(base, batch))


def target_of(base: UNetBase, batch: Batch) -> Tensor:
    """What the base should predict of a batch: the noise (eps), or v = alpha eps - sigma x_0."""
    if base.prediction == "v":
        return base.scheduler.get_velocity(batch.latents, batch.noise, batch.t)
    return batch.noise


def learning_rate(recipe: Recipe, step: int) -> float:
    """The rate of a step (from 0): warm-up, plateau, cooldown."""
    rise = (step + 1) / (recipe.warmup + 1)
    fall = (recipe.steps - step) / (recipe.cooldown + 1)
    return recipe.lr * min(1.0, rise, fall)


# --- checkpoints --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Learner:
    """All that a step changes."""

    branch: ControlBranch
    optimizer: Optimizer
    average: Average | None = None

    @property
    def result(self) -> ControlBranch:
        """The weights that are measured and saved."""
        return self.average.module if self.average else self.branch  # type: ignore[return-value]

    def step(self, rate: float, number: int) -> None:
        """Step ``number``, from 1, with the gradients at hand."""
        self.optimizer.step(rate)
        if self.average:
            self.average.update(self.branch, number)

    def state(self) -> dict[str, Tensor]:
        """All of it, as tensors by name."""
        parts = {"optimizer": self.optimizer.state(), "branch": self.branch.state_dict()}
        if self.average:
            parts["average"] = self.average.module.state_dict()
        return {f"{part}.{name}": value.contiguous() for part, held in parts.items() for name, value in held.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a ``state``."""

        def part(name: str) -> dict[str, Tensor]:
            return {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}

        self.branch.load_state_dict(part("branch"))
        self.optimizer.restore(part("optimizer"))
        if self.average:
            self.average.module.load_state_dict(part("average"))


_LAYOUT = "2"
"""Of a checkpoint's tensors; raised when their names change."""


def _checkpoints(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("step-*"))


def _save_checkpoint(
    out: Path, step: int, control: SavedControl, base: UNetBase, state: Mapping[str, Tensor], keep: int
) -> None:
    """A whole checkpoint or none: written beside its place, then renamed. Older ones beyond ``keep`` go last."""
    folder = out / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder, prefix=SCRATCH))
    try:
        save_control(scratch / "control", control, base)
        facts = {"layout": _LAYOUT, "step": str(step), "base_digest": base.digest}
        write_atomic(scratch / "state.safetensors", save(dict(state), facts))
        scratch.chmod(0o755)
        target = folder / f"step-{step:07d}"
        if target.exists():
            shutil.rmtree(target)
        os.replace(scratch, target)
    except OSError as error:
        shutil.rmtree(scratch, ignore_errors=True)
        held = [p.name for p in _checkpoints(out)]
        raise UserError(
            f"The checkpoint of step {step} could not be written ({error.strerror or error}). "
            f"Kept: {', '.join(held) or 'none'}. Make room, then run the same command to go on."
        ) from error
    for old in _checkpoints(out)[:-keep]:
        shutil.rmtree(old)


def _load_checkpoint(folder: Path, learner: _Learner, base: UNetBase) -> int:
    path = folder / "state.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata()
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
    return int(facts["step"])


def _cut_log(path: Path, step: int) -> list[Seen]:
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
        if seen := seen_in(record):
            evaluations.append(seen)
    write_atomic(path, "".join(f"{line}\n" for line in lines).encode())
    return evaluations


# --- the run ------------------------------------------------------------------------------------------------


def train_control(
    recipe: Recipe,
    out: Path,
    base: UNetBase | None = None,
    on_stage: Callable[[str, int], None] = lambda name, total: None,
    on_advance: Callable[[int], None] = lambda count: None,
) -> Iterator[Record]:
    """Train a control, yielding a record a step; ``OUT/control`` holds the result when the iterator ends, ``OUT/best``
    what obeyed best when it was measured.

    ``on_stage(name, total)`` and ``on_advance(count)`` report on the work between steps: caching and evaluating. With a
    total of 0 the name is something to know, such as what was done when memory ran out.

    Where several processes were started together (``accelerate launch``), each computes its part of every batch.
    """
    contracts = hints_of(recipe)
    _check_folder(recipe, out)
    base = base or load_base(recipe.base)
    together = ranks(cpu=base.device.type == "cpu")
    if recipe.batch % (recipe.draws * recipe.accumulate * together.count):
        raise UserError(
            f"A batch of {recipe.batch} rows cannot be shared out in {recipe.draws} draws of each pair, "
            f"{recipe.accumulate} equal parts and {together.count} processes: take another batch."
        )
    pairs, heldout = training_pairs(recipe, base)
    torch.manual_seed(recipe.seed)
    spec = ControlSpec(recipe.control.body, recipe.control.join, recipe.control.taps)
    branch = base.new_union() if recipe.control.types else base.new_branch(spec, contracts[""].channels)
    branch.train()
    if recipe.control.start_from and not _checkpoints(out):
        _begin_with(branch, recipe.control.start_from, base)
    # Nothing is written before here: a recipe that cannot run leaves no folder behind.
    together.wait()
    out.mkdir(parents=True, exist_ok=True)
    with _sole_owner(out) if together.first else nullcontext():
        yield from _train(recipe, out, base, branch, contracts, pairs, heldout, together, on_stage, on_advance)


def plan_of(recipe: Recipe, base: UNetBase, branch: ControlBranch, contracts: Mapping[str, Hint], pairs: int) -> str:
    """What a run is about to do, in one sentence: to be read before it is waited for."""
    learning = sum(p.numel() for p in branch.parameters() if p.requires_grad)
    hints = ", ".join(
        f"{kind or contract.annotator or 'no name'} [{contract.low:g}, {contract.high:g}]"
        for kind, contract in contracts.items()
    )
    often = recipe.steps * (recipe.batch // recipe.draws) / max(pairs, 1)
    return (
        f"{learning / 1e6:.2f}M parameters learn hints of {hints} for {base.name}: {pairs:,} pairs, {often:.1f} times "
        f"each, in {recipe.steps:,} steps of {recipe.batch} rows; {recipe.prompt_dropout:.0%} of prompts dropped; "
        f"{number_format(base.device.type)}, {recipe.optimizer}, rate {recipe.lr:g}"
    )


def _train(
    recipe: Recipe,
    out: Path,
    base: UNetBase,
    branch: ControlBranch,
    contracts: Mapping[str, Hint],
    pairs: Sequence[Pair],
    heldout: Sequence[Pair],
    together: Ranks,
    on_stage: Callable[[str, int], None],
    on_advance: Callable[[int], None],
) -> Iterator[Record]:
    path = out / f"pairs-{base.digest}.safetensors"
    if together.first:
        _begin_folder(recipe, out, base.device.type)
        on_stage(plan_of(recipe, base, branch, contracts, len(pairs)), 0)
        on_stage("caching", len(pairs))
        cached = build_cache(base, pairs, contracts, path, on_advance)
    together.wait()
    if not together.first:
        _keep_format(out, base.device.type)
        cached = Cached.read(path)
    optimizer = Optimizer(branch, recipe.optimizer, weight_decay=recipe.weight_decay)
    learner = _Learner(branch, optimizer, Average(branch, recipe.ema) if recipe.ema else None)
    evaluates = recipe.evaluation.every > 0 and together.first
    evaluator = _Evaluator(base, heldout, contracts[""], recipe, out) if evaluates and "" in contracts else None
    gauge = _Gauge(base, heldout, contracts, recipe, out) if evaluates else None
    predict = torch.compile(controlled) if recipe.compile else controlled
    step = 0
    kept = _checkpoints(out)
    if kept:
        step = _load_checkpoint(kept[-1], learner, base)
    evaluations = together.told(_cut_log(out / "log.jsonl", step) if together.first else None)

    def saved(at: int) -> SavedControl:
        facts = {"base": base.name, "base_digest": base.digest, "step": at, "data": recipe.data.source}
        hints = contracts if recipe.control.types else {}
        return SavedControl(learner.result, contracts.get("", Hint("")), facts | {"recipe": recipe.model_dump()}, hints)

    attention = partial(training_attention, base.device.type)

    def gradients(step: int, parts: int) -> float:
        """The gradients of a step's batch, added up over this process's equal parts of it; returns their loss."""
        total = torch.zeros((), device=base.device)
        for part in range(together.index * parts, (together.index + 1) * parts):
            batch = draw_batch(base, cached, contracts, recipe, step, part, parts * together.count)
            with autocast(base.device.type), attention():
                loss = objective(base, branch, batch, predict) / parts
            loss.backward()
            total += loss.detach()
        return total.item()

    parts = recipe.accumulate
    short = recomputed(branch, base.unet, within=attention) if recipe.checkpointing else nullcontext()
    with (out / "log.jsonl").open("a" if together.first else "r") as log, short:
        while step < recipe.steps and not enough(recipe.evaluation, evaluations):
            started = time.perf_counter()
            full: torch.OutOfMemoryError | None = None
            value = float("nan")
            try:
                value = gradients(step, parts)
            except torch.OutOfMemoryError as error:
                full = error
            if together.any(full is not None, base.device):
                branch.zero_grad()
                parts = _more_parts(recipe.batch // recipe.draws // together.count, parts, full)
                said = f"step {step + 1} and the rest in {parts} parts, the batch is still {recipe.batch}"
                on_stage(f"out of memory: {said}", 0)
                continue
            losses = torch.tensor(value, device=base.device)
            together.mean([losses])
            together.mean_gradients(branch)
            value = losses.item()
            slope = float(nn.utils.clip_grad_norm_(branch.parameters(), 1.0))
            if not np.isfinite([value, slope]).all():
                raise UserError(
                    f"At step {step + 1} the loss is {value} and its gradient's norm {slope}. Lower the learning rate "
                    f"(it is {recipe.lr}) and give another --out."
                )
            step += 1
            learner.step(learning_rate(recipe, step - 1), step)
            seconds = time.perf_counter() - started
            measured: Obedience | None = None
            words: str | None = None
            relative: dict[str, list[float]] = {}
            due = recipe.evaluation.every > 0 and (step % recipe.evaluation.every == 0 or step == recipe.steps)
            if due and gauge:
                relative = gauge.measure(learner.result)
                if evaluator:
                    on_stage("evaluating", evaluator.work)
                    measured = evaluator.measure(learner.result, step, on_advance)
                    reached = round(measured.obedience.mean, 5)  # as the log has it: a resumed run decides alike
                    evaluations.append(Seen(step, measured.obedience.low, measured.counts, reached))
                    words = verdict(evaluations)
                    if best_of(evaluations) == evaluations[-1]:
                        save_control(out / "best", saved(step), base)
            if due:
                evaluations = together.told(evaluations)
            record = Record(step, value, seconds, measured, words, relative)
            last = step == recipe.steps or enough(recipe.evaluation, evaluations)
            if together.first:
                log.write(record.to_json() + "\n")
                log.flush()
                if step % recipe.checkpoint_every == 0 or last:
                    _save_checkpoint(out, step, saved(step), base, learner.state(), recipe.keep)
            yield record
    if together.first:
        save_control(out / "control", saved(step), base)
    together.wait()


def _more_parts(pairs: int, parts: int, error: torch.OutOfMemoryError | None) -> int:
    """In how many parts to compute a process's ``pairs``, which did not fit in memory in ``parts``."""
    more = next((count for count in range(2 * parts, pairs + 1) if pairs % count == 0), None)
    if more is None:
        reason = str(error).splitlines()[0] if error else "of another process"
        raise UserError(
            f"Memory does not hold even {pairs // parts} pair and its draws ({reason}). Set checkpointing: true, "
            "draws: 1, or take a smaller base or size."
        ) from error
    return more


def _begin_with(branch: ControlBranch, name: str, base: UNetBase) -> None:
    """Begin with the weights of a control of the same kind.

    One of the middle alone is reconnected (the paper's small-scale recipe): the joins it lacks stay zero.
    """
    neighbour = load_control(name, base).branch
    if type(neighbour) is not type(branch):
        raise UserError(
            f'The control "{name}" is a {type(neighbour).__name__}; this recipe starts from a {type(branch).__name__}.'
        )
    reconnected = replace(neighbour.spec, taps="all") if branch.spec.join == "zero" else neighbour.spec
    if branch.spec not in (neighbour.spec, reconnected):
        raise UserError(
            f'The control "{name}" is {neighbour.spec}; the recipe asks for {branch.spec}: they must be equal, but '
            "that zero joins of the middle alone may become joins of all taps."
        )
    branch.load_state_dict(branch.state_dict() | neighbour.state_dict())


def _check_folder(recipe: Recipe, out: Path) -> None:
    """Refuse a run's folder that is of another recipe, or no folder."""
    path = out / "recipe.yaml"
    before = read_recipe(path) if path.is_file() else recipe
    if before != recipe:
        changed = [key for key, value in recipe if getattr(before, key) != value]
        raise UserError(
            f"{out} holds a run of another recipe (it differs in {', '.join(changed)}): give another --out, "
            "or run with the recipe as it was to go on."
        )
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; expected a folder, or a name for a new one.")


@contextmanager
def _sole_owner(out: Path) -> Iterator[None]:
    """Hold the run's folder; ``UserError`` if another process holds it. A killed process holds nothing."""
    lock = FileLock(out / ".lock", timeout=0)
    try:
        with lock:
            yield
    except Timeout:
        raise UserError(f"Another process is training in {out}: wait until it ends, or give another --out.") from None


def _begin_folder(recipe: Recipe, out: Path, device_type: str) -> None:
    """Tidy what a kill left, write the recipe, and keep to the threads and number format the run began with.

    Bit-exactness holds for one thread count and one format, whatever this machine would choose now.
    """
    for stale in sorted(out.rglob(f"{SCRATCH}*")):  # what a kill left half written
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink(missing_ok=True)
    write_atomic(out / "recipe.yaml", yaml.safe_dump(recipe.model_dump(), sort_keys=False).encode())
    path = out / "machine.json"
    if not path.is_file():
        begun = {"threads": torch.get_num_threads(), "format": number_format(device_type)}
        write_atomic(path, (json.dumps(begun) + "\n").encode())
    _keep_format(out, device_type)


def _keep_format(out: Path, device_type: str) -> None:
    begun = json.loads((out / "machine.json").read_text())
    if begun["threads"] != torch.get_num_threads():
        torch.set_num_threads(begun["threads"])
    if begun["format"] != number_format(device_type):
        settle_format(device_type, begun["format"])


class _Evaluator:
    """Obedience on held-out hints; what does not depend on the branch is made once."""

    def __init__(self, base: UNetBase, pairs: Sequence[Pair], contract: Hint, recipe: Recipe, out: Path) -> None:
        self.base, self.contract, self.out = base, contract, out
        self.pairs = [pairs[i] for i in range(len(pairs))]
        check_findable(contract, self.pairs)
        self.hints = [hint_of(pair, contract) for pair in self.pairs]
        self.settings = Settings(recipe.evaluation.steps, recipe.evaluation.guidance)
        self._fixed: tuple[list[np.ndarray], np.ndarray, np.ndarray] | None = None

    @property
    def work(self) -> int:
        """Picture-steps the next evaluation takes; the first one also samples without control."""
        return len(self.pairs) * self.settings.steps * (3 if self._fixed is None else 2)

    def measure(self, branch: ControlBranch, step: int, on_advance: Callable[[int], None]) -> Obedience:
        branch.eval()
        control = Control(branch, self.contract)
        first = self._fixed is None
        made = three_ways(
            self.base, control, self.pairs, self.hints, self.settings, on_step=on_advance, skip_no_control=not first
        )
        if self._fixed is None:
            ceiling = ceiling_pictures(self.base, [pair.picture for pair in self.pairs])
            scores = [fidelity(p, self.hints, self.contract) for p in (made["no_control"], ceiling)]
            self._fixed = (made["no_control"], scores[0], scores[1])
        without, no_control, ceiling_score = self._fixed
        scored = [fidelity(made[name], self.hints, self.contract) for name in ("controlled", "shuffled")]
        shown = [
            [hint, pair.picture, got, plain]
            for hint, pair, got, plain in zip(self.hints, self.pairs, made["controlled"], without, strict=True)
        ]
        sheet = grid(shown[:8], ["hint", "truth", "controlled", "no control"])
        write_png(self.out / "samples" / f"step-{step:07d}.png", sheet)
        branch.train()
        return obedience(scored[0], no_control, scored[1], ceiling_score, metric_of(self.contract).name)


class _Gauge:
    """The loss on held-out pairs relative to the base without control, with the same noise each time."""

    QUARTERS = 4

    def __init__(
        self, base: UNetBase, pairs: Sequence[Pair], contracts: Mapping[str, Hint], recipe: Recipe, out: Path
    ) -> None:
        cached = build_cache(base, pairs, contracts, out / f"heldout-{base.digest}.safetensors")
        fixed = {"batch": self.QUARTERS * len(cached), "draws": self.QUARTERS, "accumulate": 1, "prompt_dropout": 0.0}
        asked = recipe.model_copy(update=fixed)
        parts = -(-len(cached) // 8)
        self.base = base
        self.batches = [draw_batch(base, cached, contracts, asked, 0, part, parts) for part in range(parts)]
        self.without = [self._errors(batch, None) for batch in self.batches]

    @torch.no_grad()
    def _errors(self, batch: Batch, branch: ControlBranch | None) -> Tensor:
        """The squared error of each pair (P, quarters); ``branch`` None: without control."""
        z = self.base.scheduler.add_noise(batch.latents, batch.noise, batch.t)
        with autocast(self.base.device.type):
            if branch is None:
                prediction = self.base.decode_noise(self.base.encode_noise(z, batch.t, batch.text))
            else:
                prediction = controlled(self.base, branch, z, batch.t, batch.text, _features(branch, batch))
        off = (prediction.float() - target_of(self.base, batch)).square().mean((1, 2, 3))
        return off.view(-1, self.QUARTERS).cpu()

    def measure(self, branch: ControlBranch) -> dict[str, list[float]]:
        """By type of hint: under control / without, in each quarter of the schedule."""
        branch.eval()
        sums: dict[str, list[Tensor]] = {}
        for batch, without in zip(self.batches, self.without, strict=True):
            counts = [len(hint) for hint in batch.hints.values()]
            parts = (errors.split(counts) for errors in (self._errors(batch, branch), without))
            for kind, under, plain in zip(batch.hints, *parts, strict=True):
                sums.setdefault(kind, []).append(torch.stack([under.sum(0), plain.sum(0)]))
        branch.train()
        found = {kind: torch.stack(of_kind).sum(0) for kind, of_kind in sums.items()}
        return {kind: (under / plain).tolist() for kind, (under, plain) in sorted(found.items())}
