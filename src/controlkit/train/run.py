"""Training a control: the paper's objective as an iterator of records, with exact resume.

``train_control(recipe, out)`` yields one ``Record`` a step; the command line prints them, ``OUT/log.jsonl`` keeps
them, a test takes three and stops. Run again with the same folder, it goes on from the last checkpoint and yields
what the uninterrupted run would have: every draw is keyed by (seed, step, sample), and checkpoints are whole or absent.
"""

import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from controlkit.backbones import Backbone, load_base, recomputed, save_difference
from controlkit.branch import ControlNetwork
from controlkit.data import Cached, FolderPairs, Pair, build_cache, open_store, turn_at
from controlkit.errors import UserError
from controlkit.formats import SavedControl, save_control, save_control_lora
from controlkit.images import HintSpec
from controlkit.measure import unmeasurable
from controlkit.precision import autocast, training_attention
from controlkit.train.checkpoints import (
    TrainState,
    begin_folder,
    check_folder,
    checkpoints_in,
    cut_log,
    keep_format,
    load_checkpoint,
    logged_step,
    save_checkpoint,
    sole_owner,
)
from controlkit.train.evaluation import Evaluator, HeldoutLoss, own_hints
from controlkit.train.plan import Meter, estimate, format_bytes
from controlkit.train.ranks import Ranks, ranks
from controlkit.train.recipe import Recipe
from controlkit.train.records import Record, best_of, should_stop, summary_of, verdict
from controlkit.train.schedule import Clock, learning_rate
from controlkit.train.setup import (
    buckets_in_words,
    hints_of,
    new_branch,
    own_contracts,
    plan_of,
    training_pairs,
)
from controlkit.train.step import Batch, controlled, draw_batch, objective
from controlkit.train.trackers import check_trackers, tracked

DIFFERENCE = "base-difference.safetensors"
"""What an unlocked base learnt, in the control's folder."""
_TELLING = 8
"""Held-out pairs of which fewer tell little."""


def train_control(
    recipe: Recipe,
    out: Path,
    base: Backbone | None = None,
    on_stage: Callable[[str, int], None] = lambda name, total: None,
    on_advance: Callable[[int], None] = lambda count: None,
    foreseen: bool = False,
) -> Iterator[Record]:
    """Train a control, yielding a record a step; ``OUT/control`` holds the result when the iterator ends, ``OUT/best``
    what obeyed best when it was measured.

    ``on_stage(name, total)`` and ``on_advance(count)`` report on the work between steps: caching and evaluating. With a
    total of 0 the name is something to know, such as what was done when memory ran out.

    ``foreseen``: try out a micro-batch and say what memory and time the run will take, and after its first step what
    memory it took.

    Where several processes were started together (``accelerate launch``), each computes its part of every batch.
    """
    contracts = hints_of(recipe)
    check_trackers(recipe.tracking.to)
    check_folder(recipe, out)
    base = base or load_base(recipe.base, vae=recipe.vae)
    notes: list[str] = []
    if recipe.size and recipe.size != base.size:
        notes.append(f'pictures of {recipe.size} pixels; "{base.name}" was trained on {base.size}')
        base = base.of_size(recipe.size)
    meter = Meter(base) if foreseen else None
    together = ranks(cpu=base.device.type == "cpu")
    _check_processes(recipe, together)
    pairs, heldout = training_pairs(recipe, base)
    if recipe.evaluation.every and (reason := _unmeasurable(contracts, heldout)):
        notes.append(f"obedience is not measured: {reason} What is best is told by the loss relative to no control")
        if recipe.evaluation.target is not None:
            raise UserError(f"evaluation.target is an obedience, and none is measured: {reason}")
    if recipe.evaluation.every and len(heldout) < min(recipe.evaluation.num, _TELLING):
        notes.append(f"{len(heldout)} pairs are held out to measure on: what they say of control is little")
    if "" in contracts:
        own_hints(recipe, contracts[""])  # files that cannot be read are said now
    branch = new_branch(recipe, base, contracts, not checkpoints_in(out), notes.append)
    learner = TrainState.of(recipe, branch, base.with_own_denoiser() if recipe.unfreeze_after else base, together)
    # Nothing is written before here: a recipe that cannot run leaves no folder behind.
    together.wait()
    out.mkdir(parents=True, exist_ok=True)
    with sole_owner(out) if together.first else nullcontext():
        plan = None
        if together.first:
            rows = "".join(part.digest() for part in (pairs, heldout) if isinstance(part, FolderPairs))
            begin_folder(recipe, out, base.device.type, rows)
            sentence = plan_of(recipe, base, branch, contracts, len(pairs))
            for line in (*together.notes, sentence, *(f"note: {note}" for note in notes)):
                on_stage(line, 0)
            if meter and not together.sharded:  # all processes would have to take part
                plan = estimate(recipe, base, learner, contracts, len(pairs), meter, together.count)
                on_stage("\n".join(plan.lines()), 0)
                meter.forget()  # or what the trial took would stand for what the run does
        run = _train(recipe, out, base, learner, contracts, pairs, heldout, together, on_stage, on_advance)
        with closing(run):
            for record in run:
                if meter and plan:
                    on_stage(f"memory held at most, until after the first step: {format_bytes(meter.peak())}", 0)
                    plan = None
                yield record


def _train(
    recipe: Recipe,
    out: Path,
    locked: Backbone,
    learner: TrainState,
    contracts: Mapping[str, HintSpec],
    pairs: Sequence[Pair],
    heldout: Sequence[Pair],
    together: Ranks,
    on_stage: Callable[[str, int], None],
    on_advance: Callable[[int], None],
) -> Generator[Record, None, None]:
    clock = Clock(recipe.max_minutes)
    base, branch = learner.base, learner.branch
    path = out / f"pairs-{base.digest}.safetensors"
    if together.first:
        on_stage("caching", len(pairs))
        with open_store() if recipe.data.cache else nullcontext() as store:
            cached = build_cache(base, pairs, contracts, path, on_advance, mirrors=recipe.data.flip > 0, store=store)
        if recipe.data.buckets:
            on_stage(buckets_in_words(cached, recipe), 0)
    together.wait()
    if not together.first:
        keep_format(out, base.device.type)
        cached = Cached.read(path)
    evaluates = recipe.evaluation.every > 0
    shows = evaluates and "" in contracts
    evaluator = Evaluator(base, heldout, contracts[""], recipe, out, together, locked) if shows else None
    gauge = HeldoutLoss(base, heldout, contracts, recipe, out, together, locked) if evaluates else None
    result = _Result(recipe, locked, base, contracts)
    gradients = _Gradients(recipe, learner, cached, contracts, together, on_stage)
    step = 0
    kept = checkpoints_in(out)
    if kept:
        facts = load_checkpoint(kept[-1], learner, locked)
        step, clock = int(facts["step"]), Clock(recipe.max_minutes, facts)
    logged = logged_step(out / "log.jsonl") if together.first else 0
    evaluations = together.broadcast(cut_log(out / "log.jsonl", step) if together.first else None)
    short = (
        recomputed(branch, base.denoiser, within=gradients.attention)
        if recipe.gradient_checkpointing
        else nullcontext()
    )
    over = bool(kept) and together.broadcast(clock.over)  # there is always a first step, however long caching took
    tracking = tracked(recipe, out, step, logged) if together.first else nullcontext()
    with (out / "log.jsonl").open("a" if together.first else "r") as log, short, tracking as track:
        while step < recipe.steps and not should_stop(recipe.evaluation, evaluations) and not over:
            started = time.perf_counter()
            if recipe.unfreeze_after:
                base.denoiser.requires_grad_(step >= recipe.unfreeze_after)
            loss = gradients.of(step)
            norm = learner.clip(recipe.max_grad_norm)
            # Where a step waits for the device, once: what is not finite must not reach the weights.
            value, slope = torch.stack([loss, norm]).tolist()
            if not np.isfinite([value, slope]).all() and not (np.isfinite(value) and learner.forgives):
                raise UserError(
                    f"At step {step + 1} the loss is {value} and its gradient's norm {slope}. Lower the learning rate "
                    f"(it is {recipe.lr}) and give another --out."
                )
            step += 1
            spent = together.broadcast(clock.share) if recipe.max_minutes else 0.0
            rate = learning_rate(recipe, step - 1, spent)
            learner.step(rate, step)
            record = Record(step, value, clock.stepped(started))
            if gauge and (step % recipe.evaluation.every == 0 or step == recipe.steps):
                weights = learner.result()
                record = replace(record, relative=gauge.measure(weights), residuals=gauge.residuals(weights))
                if evaluator:
                    on_stage("evaluating", evaluator.work)
                    found = evaluator.measure(weights, step, on_advance)
                    record = replace(record, evaluation=found.obedience, drift=found.drift, quality=found.quality)
                seen = summary_of(json.loads(record.to_json()))  # as the log has it: a resumed run decides alike
                assert seen is not None
                evaluations.append(seen)
                if record.evaluation:
                    record = replace(record, verdict=verdict(evaluations))
                if together.first and best_of(evaluations) is seen:
                    result.write(out / "best", step, weights)
                evaluations = together.broadcast(evaluations)
                del weights
            over = bool(recipe.max_minutes) and together.broadcast(clock.over)
            last = step == recipe.steps or should_stop(recipe.evaluation, evaluations) or over
            if together.first:
                log.write(record.to_json() + "\n")
                log.flush()
                if track:
                    track(record, rate)
            if step % recipe.checkpoint_every == 0 or last:
                state, weights = learner.state(keep=together.first), learner.result()
                if together.first:
                    controls = result.controls(step, weights)
                    save_checkpoint(out, step, controls, locked, state, recipe.keep, clock.facts())
                del state, weights
            yield record
    weights = learner.result()
    if together.first:
        result.write(out / "control", step, weights)
    together.wait()


class _Gradients:
    """Computes the gradients of a step's batch: of this process's equal parts of it, one after the other, and then the
    mean over all processes. Where memory runs out, in more parts from then on, which is said."""

    def __init__(
        self,
        recipe: Recipe,
        learner: TrainState,
        cached: Sequence[Cached],
        contracts: Mapping[str, HintSpec],
        together: Ranks,
        on_stage: Callable[[str, int], None],
    ) -> None:
        self.recipe, self.learner, self.cached, self.contracts = recipe, learner, cached, contracts
        self.ranks, self.on_stage, self.parts = together, on_stage, recipe.gradient_accumulation
        self.predict = torch.compile(controlled) if recipe.compile else controlled
        self.attention = partial(training_attention, learner.base.device.type)
        # At birth what lies before zero joins has no gradient yet: the second step shows it.
        self._untried = 2 if recipe.compile and not learner.shards else 0

    def of(self, step: int) -> torch.Tensor:
        """The batch's loss, on the device: nothing waits for it. Its gradients are at hand."""
        while True:
            full: torch.OutOfMemoryError | None = None
            loss = torch.zeros((), device=self.learner.base.device)
            try:
                loss = self._own(step)
            except torch.OutOfMemoryError as error:
                if self.learner.shards:  # the others wait for this one's weights: there is no going on
                    raise UserError(
                        f"Memory does not hold a part of the batch ({str(error).splitlines()[0]}). Set gradient_checkpointing: "
                        f"true or a greater gradient_accumulation (it is {self.recipe.gradient_accumulation}), or take more processes."
                    ) from error
                full = error
            if not self.ranks.any(full is not None):
                break
            self._take_more_parts(step, full)
        self.ranks.mean([loss])
        self.ranks.mean_gradients(self.learner.learning)
        return loss

    def _own(self, step: int) -> torch.Tensor:
        recipe, learner, together = self.recipe, self.learner, self.ranks
        total = torch.zeros((), device=learner.base.device)
        sizes = [len(one) for one in self.cached]
        which, turn = turn_at(sizes, recipe.batch // recipe.noises_per_pair, step, recipe.seed)
        parts = self.parts * together.count
        for part in range(together.index * self.parts, (together.index + 1) * self.parts):
            batch = draw_batch(learner.base, self.cached[which], self.contracts, recipe, step, part, parts, turn)
            if part == together.index * self.parts and self.predict is not controlled:
                self._untried += (
                    step == recipe.unfreeze_after and not learner.shards
                )  # the base's weights are new to it
                if self._untried:
                    self._try_compiled(batch)
            with autocast(total.device.type), self.attention():
                compute = partial(objective, learner.base, learner.branch, batch, self.predict)
                loss = (learner.shards.within(compute) if learner.shards else compute()) / self.parts
            learner.backward(loss)
            total += loss.detach()
        return total

    def _try_compiled(self, batch: Batch) -> None:
        """Go on without compiling where that loses gradients: with torch 2.13 on a CPU they were zero at all levels but
        the finest, while the loss was right (docs/decisions.md)."""
        found = []
        for predict in (controlled, self.predict):
            with autocast(self.learner.base.device.type), self.attention():
                loss = objective(self.learner.base, self.learner.branch, batch, predict)
            loss.backward()
            grads = {
                name: p.grad.detach().clone()
                for name, p in self.learner.learning.named_parameters()
                if p.grad is not None
            }
            found.append(grads)
            self.learner.learning.zero_grad()
        plain, compiled = found
        lost = [name for name, grad in plain.items() if grad.any() and not (name in compiled and compiled[name].any())]
        self._untried -= 1
        if lost:  # each process by itself: their gradients are right either way
            self.predict = controlled
            said = f"compiled, {len(lost)} of {len(plain)} weights have no gradient here ({lost[0]})"
            self.on_stage(f"not compiled: {said}", 0)

    def _take_more_parts(self, step: int, error: torch.OutOfMemoryError | None) -> None:
        """``error``: where it was this process that had not enough memory."""
        recipe = self.recipe
        self.learner.learning.zero_grad()
        pairs = recipe.batch // recipe.noises_per_pair // self.ranks.count
        more = next((count for count in range(2 * self.parts, pairs + 1) if pairs % count == 0), None)
        if more is None:
            reason = str(error).splitlines()[0] if error else "of another process"
            raise UserError(
                f"Memory does not hold even {pairs // self.parts} pair and its draws ({reason}). Set gradient_checkpointing: "
                "true, noises_per_pair: 1, or take a smaller base or size."
            ) from error
        self.parts = more
        said = f"step {step + 1} and the rest in {more} parts, the batch is still {recipe.batch}"
        self.on_stage(f"out of memory: {said}", 0)


@dataclass(frozen=True)
class _Result:
    """What a run makes of weights: a control, and what belongs to it."""

    recipe: Recipe
    locked: Backbone
    base: Backbone
    contracts: Mapping[str, HintSpec]

    def controls(self, step: int, weights: ControlNetwork) -> dict[str, SavedControl]:
        """The control of a step, with what it was trained on, under ""; of several branches each under its name."""
        return {name: self._control(step, name, branch) for name, branch in weights.parts().items()}

    def _control(self, step: int, name: str, weights: ControlNetwork) -> SavedControl:
        recipe, contracts = self.recipe, own_contracts(self.contracts, name)
        facts = {"base": self.base.name, "base_digest": self.locked.digest, "step": step, "data": recipe.data.source}
        facts |= {"base_difference": f"../{DIFFERENCE}" if name else DIFFERENCE} if self._unlocked(step) else {}
        facts |= {"recipe": recipe.model_dump()}
        hints = contracts if recipe.control.types else {}
        return SavedControl(weights, contracts.get("", HintSpec("")), facts, hints, recipe.control.hint_cfg_scale)

    def write(self, folder: Path, step: int, weights: ControlNetwork) -> None:
        """The control as a folder; in it what its base learnt, and itself as a Control-LoRA, where there is such.

        Of several branches each is such a folder within it; what their base learnt lies beside them.
        """
        for name, control in self.controls(step, weights).items():
            own = folder / name
            save_control(own, control, self.base)
            if self.recipe.control.body == "lora":
                save_control_lora(own / "control-lora.safetensors", control, self.base, self.recipe.control.rank)
        if self._unlocked(step):
            save_difference(folder / DIFFERENCE, self.locked, self.base)

    def _unlocked(self, step: int) -> bool:
        return self.recipe.unfreeze_after is not None and step > self.recipe.unfreeze_after


def _unmeasurable(contracts: Mapping[str, HintSpec], heldout: Sequence[Pair]) -> str:
    """Why a run cannot measure obedience, as a sentence; "" where it can."""
    return (
        unmeasurable(contracts[""], heldout) if "" in contracts else "A Union's is, type by type, when it is trained."
    )


def _check_processes(recipe: Recipe, together: Ranks) -> None:
    """Refuse what several processes, or shared-out weights, cannot do."""
    if together.sharded and recipe.precision == "fp16":
        raise UserError("precision: fp16 scales its loss, which weights that are shared out cannot: take bf16.")
    if together.sharded and (recipe.optimizer != "adamw" or recipe.unfreeze_after):
        what = "unfreeze_after" if recipe.optimizer == "adamw" else f"optimizer: {recipe.optimizer}"
        raise UserError(
            f"{what} is not made for weights that are shared out (--use_fsdp): "
            f"{'leave it out' if recipe.optimizer == 'adamw' else 'take adamw'}, or launch without it."
        )
    if recipe.batch % (recipe.noises_per_pair * recipe.gradient_accumulation * together.count):
        raise UserError(
            f"A batch of {recipe.batch} rows cannot be shared out in {recipe.noises_per_pair} draws of each pair, "
            f"{recipe.gradient_accumulation} equal parts and {together.count} processes: take another batch."
        )
