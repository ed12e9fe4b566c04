"""Training a control: the paper's objective as an iterator of records, with exact resume.

``train_control(recipe, out)`` yields one ``Record`` a step; the command line prints them, ``OUT/log.jsonl`` keeps
them, a test takes three and stops. Called again with the same folder, it resumes from the last checkpoint and yields
what the uninterrupted run would have: every draw is keyed by (seed, step, sample), and checkpoints are whole or absent.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from controlkit.backbones import Backbone, load_base, recomputed, save_difference
from controlkit.branch import ControlNetwork
from controlkit.data import Cached, FolderPairs, Pair, build_cache, open_store
from controlkit.errors import Invalid, Mismatch, Unsupported
from controlkit.formats import SavedControl, save_control, save_control_lora
from controlkit.images import HintSpec
from controlkit.measure import unmeasurable
from controlkit.train.checkpoints import (
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
from controlkit.train.evaluation import Evaluator, own_hints
from controlkit.train.gradients import Gradients
from controlkit.train.heldout import HeldoutLoss
from controlkit.train.parts import Resolved
from controlkit.train.plan import Meter, estimate, format_bytes
from controlkit.train.ranks import Ranks, connect_ranks
from controlkit.train.recipe import Recipe
from controlkit.train.records import EvaluationSummary, Record, best_of, should_stop, summary_of, verdict
from controlkit.train.schedule import Clock, learning_rate
from controlkit.train.setup import describe_buckets, describe_run, new_branch, own_specs, resolve, training_pairs
from controlkit.train.state import TrainState
from controlkit.train.trackers import check_trackers, tracked

DIFFERENCE = "base-difference.safetensors"
"""What an unfrozen base learnt, in the control's folder."""
_FEW = 8
"""Fewer held-out pairs say little."""


def train_control(
    recipe: Recipe,
    out: Path,
    base: Backbone | None = None,
    on_stage: Callable[[str, int], None] = lambda name, total: None,
    on_advance: Callable[[int], None] = lambda count: None,
    estimate_first: bool = False,
) -> Iterator[Record]:
    """Train a control, yielding a record a step: the paper's Section 3.3, with the objective of equation 5.

    ``OUT/control`` holds the result when the iterator ends, ``OUT/best`` the most obedient control measured. Called
    again it resumes from the last checkpoint. With several processes (``accelerate launch``), each computes its part of
    every batch.

    ``on_stage(name, total)`` and ``on_advance(count)`` report the work between steps: caching and evaluating. With a
    total of 0 the name is a sentence for the user, such as what was done when memory ran out.

    ``estimate_first``: try a part of a batch and report the memory and time the run will take, and after the first step
    the memory it took.

    Raises a ``UserError``: ``NotFound`` for a base, data, control or package that is missing; ``Invalid`` for a setting
    or file; ``Mismatch`` for the folder of another recipe, or other weights or data than the run began with;
    ``Unsupported`` for settings that do not work together, or a folder another process trains in; ``OutOfRoom`` where
    memory or disk is too small. A recipe that cannot run leaves no folder behind.
    """
    run = Run.prepare(recipe, out, base, Reports(on_stage, on_advance), estimate_first)
    with run.opened:
        run.resume()
        while not run.ended:
            yield run.step()
        run.finish()


@dataclass(frozen=True)
class Reports:
    """Where a run reports its progress (``train_control``)."""

    on_stage: Callable[[str, int], None]
    on_advance: Callable[[int], None]


class Run:
    """A training run: ``prepare``, then ``resume`` within ``opened``, ``step`` until ``ended``, and ``finish``.

    ``frozen``: the base as it was loaded, of which ``state.base`` has a trained copy where the recipe unfreezes it.
    ``done``: the steps made. ``evaluations``: those up to this step, in order.
    """

    def __init__(
        self,
        plan: Resolved,
        out: Path,
        frozen: Backbone,
        state: TrainState,
        pairs: tuple[Sequence[Pair], Sequence[Pair]],
        ranks: Ranks,
        reports: Reports,
    ) -> None:
        self.plan, self.out, self.frozen, self.state = plan, out, frozen, state
        self.pairs, self.heldout = pairs
        self.ranks, self.reports = ranks, reports
        self.opened = ExitStack()
        """Closes the run's files and frees its folder."""
        self.done = 0
        self.evaluations: list[EvaluationSummary] = []
        self._meter: Meter | None = None
        self._out_of_time = False

    @classmethod
    def prepare(
        cls, recipe: Recipe, out: Path, base: Backbone | None, reports: Reports, estimate_first: bool = False
    ) -> "Run":
        """Check the recipe, load the base, find the data, make the branch, and take the folder.

        Nothing is written before all of that succeeded.
        """
        plan = resolve(recipe)
        check_trackers(recipe.tracking.to)
        check_folder(recipe, out)
        base = base or load_base(recipe.base, vae=recipe.vae)
        notes: list[str] = []
        if recipe.size and recipe.size != base.size:
            notes.append(f'pictures of {recipe.size} pixels; "{base.name}" was trained on {base.size}')
            base = base.of_size(recipe.size)
        meter = Meter(base) if estimate_first else None
        ranks = connect_ranks(cpu=base.device.type == "cpu")
        _check_processes(plan, ranks)
        pairs = training_pairs(plan.data, base)
        notes += _notes_on_measuring(plan, pairs[1])
        begin = not checkpoints_in(out)
        branch = new_branch(recipe.control, plan.specs, base, recipe.seed, begin, notes.append)
        learner = base.with_own_denoiser() if recipe.unfreeze_after else base
        run = cls(plan, out, base, TrainState.of(plan.learning, branch, learner, ranks), pairs, ranks, reports)
        with ExitStack() as opening:
            run._take_folder(opening)
            if ranks.first:
                run._announce(notes, meter)
            run.opened = opening.pop_all()
        return run

    def resume(self) -> None:
        """Cache the pairs, restore the last checkpoint if there is one, and open the log and the trackers."""
        recipe, specs, base = self.plan.recipe, self.plan.specs, self.state.base
        self._clock = Clock(self.plan.rates.max_minutes)
        if self.ranks.first:
            self.reports.on_stage("caching", len(self.pairs))
        cached = self._cached("pairs", self.pairs, self.reports.on_advance, mirrors=recipe.data.flip > 0)
        if not self.ranks.first:
            keep_format(self.out, base.device.type)
        elif recipe.data.buckets:
            self.reports.on_stage(describe_buckets(cached, self.plan.batches.pairs), 0)
        self._evaluator = self._loss = None
        if recipe.evaluation.every:
            if "" in specs:
                self._evaluator = Evaluator(base, self.heldout, specs[""], recipe, self.out, self.ranks, self.frozen)
                if self._evaluator.unjudged and self.ranks.first:
                    self.reports.on_stage(f"note: {self._evaluator.unjudged}", 0)
            [heldout] = self._cached("heldout", self.heldout)
            self._loss = HeldoutLoss(base, heldout, self.plan.batches, self.ranks, self.frozen)
        self._gradients = Gradients(
            self.state, cached, self.plan.batches, self.plan.compute, self.ranks, self.reports.on_stage
        )
        if checkpoints := checkpoints_in(self.out):
            facts = load_checkpoint(checkpoints[-1], self.state, self.frozen)
            self.done, self._clock = int(facts["step"]), Clock(self.plan.rates.max_minutes, facts)
            self._out_of_time = self.ranks.broadcast(self._clock.over)  # there is always a first step
        self._open_log()

    @property
    def ended(self) -> bool:
        """Whether no step is left: all are made, the time is over, or the evaluations say so."""
        stopped = should_stop(self.plan.recipe.evaluation, self.evaluations)
        return self.done >= self.plan.rates.steps or stopped or self._out_of_time

    def step(self) -> Record:
        """Make one step; evaluate and keep where it is due."""
        started = time.perf_counter()
        if after := self.plan.learning.unfreeze_after:
            self.state.base.denoiser.requires_grad_(self.done >= after)
            if self.done == after:
                self._gradients.check_again()
        loss = self._gradients.of(self.done)
        norm = self.state.clip(self.plan.learning.max_grad_norm)
        # Where a step waits for the device, once: what is not finite must not reach the weights.
        value, slope = torch.stack([loss, norm]).tolist()
        if not np.isfinite([value, slope]).all() and not (np.isfinite(value) and self.state.skips_overflow):
            raise Invalid(
                f"At step {self.done + 1} the loss is {value} and its gradient's norm {slope}. Lower the learning rate "
                f"(it is {self.plan.rates.lr}) and give another --out."
            )
        limited = self.plan.rates.max_minutes is not None
        spent = self.ranks.broadcast(self._clock.share) if limited else 0.0
        rate = learning_rate(self.plan.rates, self.done, spent)
        self.done += 1
        self.state.step(rate, self.done)
        record = Record(self.done, value, self._clock.stepped(started))
        every = self.plan.recipe.evaluation.every
        if every and (self.done % every == 0 or self.done == self.plan.rates.steps):
            record = self.evaluate(record)
        self._out_of_time = limited and self.ranks.broadcast(self._clock.over)
        if self.ranks.first:
            self._log_record(record, rate)
        if self.done % self.plan.recipe.checkpoint_every == 0 or self.ended:
            self.keep()
        if self._meter:
            self.reports.on_stage(f"most memory held up to the first step: {format_bytes(self._meter.peak())}", 0)
            self._meter = None
        return record

    def evaluate(self, record: Record) -> Record:
        """Measure the control after a step, add what was found to its record, and keep the best control."""
        assert self._loss
        weights = self.state.result()
        record = replace(record, relative=self._loss.measure(weights), residuals=self._loss.residuals(weights))
        if self._evaluator:
            self.reports.on_stage("evaluating", self._evaluator.work)
            found = self._evaluator.measure(weights, self.done, self.reports.on_advance)
            record = replace(record, evaluation=found.obedience, drift=found.drift, quality=found.quality)
        summary = summary_of(json.loads(record.to_json()))  # as the log has it: a resumed run decides alike
        assert summary is not None
        self.evaluations.append(summary)
        if record.evaluation:
            record = replace(record, verdict=verdict(self.evaluations))
        if self.ranks.first and best_of(self.evaluations) is summary:
            self._write(self.out / "best", weights)
        self.evaluations = self.ranks.broadcast(self.evaluations)
        return record

    def keep(self) -> None:
        """Write a checkpoint, from which a run resumes exactly."""
        state, weights = self.state.state(keep=self.ranks.first), self.state.result()
        if self.ranks.first:
            controls, facts = self._controls(weights), self._clock.facts()
            save_checkpoint(self.out, self.done, controls, self.frozen, state, self.plan.recipe.keep, facts)

    def finish(self) -> None:
        """Write the control into ``OUT/control``."""
        weights = self.state.result()
        if self.ranks.first:
            self._write(self.out / "control", weights)
        self.ranks.wait()

    def _take_folder(self, opened: ExitStack) -> None:
        self.ranks.wait()
        self.out.mkdir(parents=True, exist_ok=True)
        if self.ranks.first:
            opened.enter_context(sole_owner(self.out))
            folders = [part for part in (self.pairs, self.heldout) if isinstance(part, FolderPairs)]
            rows = "".join(folder.digest() for folder in folders)
            begin_folder(self.plan.recipe, self.out, self.frozen.device.type, rows)

    def _announce(self, notes: Sequence[str], meter: Meter | None) -> None:
        """Report what the run is about to do and, with a meter, what it will take."""
        sentence = describe_run(self.plan, self.frozen, self.state.branch, len(self.pairs))
        for line in (*self.ranks.notes, sentence, *(f"note: {note}" for note in notes)):
            self.reports.on_stage(line, 0)
        if meter and not self.ranks.sharded:  # all processes would have to take part
            found = estimate(self.plan, self.frozen, self.state, len(self.pairs), meter, self.ranks.count)
            self.reports.on_stage("\n".join(found.lines()), 0)
            meter.reset()  # the memory of the trial is not the run's
            self._meter = meter

    def _cached(
        self,
        name: str,
        pairs: Sequence[Pair],
        on_advance: Callable[[int], None] = lambda count: None,
        mirrors: bool = False,
    ) -> list[Cached]:
        """Build the cache of pairs in the run's folder, if it is not there, in the first process; read it in all."""
        path = self.out / f"{name}-{self.state.base.digest}.safetensors"
        if self.ranks.first:
            with open_store() if self.plan.recipe.data.cache else nullcontext() as store:
                build_cache(self.state.base, pairs, self.plan.specs, path, on_advance, mirrors=mirrors, store=store)
        self.ranks.wait()
        return Cached.read(path)

    def _open_log(self) -> None:
        """Cut the log back to the checkpoint, and open what is open while the run goes on."""
        path, recipe = self.out / "log.jsonl", self.plan.recipe
        logged = logged_step(path) if self.ranks.first else 0
        self.evaluations = self.ranks.broadcast(cut_log(path, self.done) if self.ranks.first else None)
        self._log = self._track = None
        if self.ranks.first:
            self._log = self.opened.enter_context(path.open("a"))
            trackers = tracked(recipe.tracking, recipe.model_dump(), self.out, self.done, logged)
            self._track = self.opened.enter_context(trackers)
        if self.plan.compute.gradient_checkpointing:
            branch, denoiser = self.state.branch, self.state.base.denoiser
            self.opened.enter_context(recomputed(branch, denoiser, within=self._gradients.attention))

    def _log_record(self, record: Record, rate: float) -> None:
        assert self._log and self._track
        self._log.write(record.to_json() + "\n")
        self._log.flush()
        self._track(record, rate)

    @property
    def _unfrozen(self) -> bool:
        after = self.plan.learning.unfreeze_after
        return after is not None and self.done > after

    def _controls(self, weights: ControlNetwork) -> dict[str, SavedControl]:
        """The control of this step, with what it was trained on, under ""; of several branches each under its name."""
        return {name: self._control(name, branch) for name, branch in weights.parts().items()}

    def _control(self, name: str, weights: ControlNetwork) -> SavedControl:
        recipe, specs = self.plan.recipe, own_specs(self.plan.specs, name)
        facts = {"base": self.frozen.name, "base_digest": self.frozen.digest, "step": self.done}
        facts |= {"data": recipe.data.source}
        facts |= {"base_difference": f"../{DIFFERENCE}" if name else DIFFERENCE} if self._unfrozen else {}
        facts |= {"recipe": recipe.model_dump()}
        hints = specs if recipe.control.types else {}
        return SavedControl(weights, specs.get("", HintSpec("")), facts, hints, recipe.control.hint_cfg_scale)

    def _write(self, folder: Path, weights: ControlNetwork) -> None:
        """Write the control as a folder, with what its base learnt, and as a Control-LoRA where it is one.

        Of several branches each is such a folder within it; what their base learnt lies beside them.
        """
        for name, control in self._controls(weights).items():
            own = folder / name
            save_control(own, control, self.state.base)
            if self.plan.recipe.control.body == "lora":
                rank = self.plan.recipe.control.rank
                save_control_lora(own / "control-lora.safetensors", control, self.state.base, rank)
        if self._unfrozen:
            save_difference(folder / DIFFERENCE, self.frozen, self.state.base)


def _notes_on_measuring(plan: Resolved, heldout: Sequence[Pair]) -> Iterator[str]:
    """Sentences on what the evaluations cannot show; errors for what they cannot do."""
    evaluation, specs = plan.recipe.evaluation, plan.specs
    if evaluation.every:
        union = "A Union's is, type by type, when it is trained."
        if reason := unmeasurable(specs[""], heldout) if "" in specs else union:
            yield f"obedience is not measured: {reason} The best control is the one with the least relative loss"
            if evaluation.target is not None:
                raise Unsupported(f"evaluation.target is an obedience, and none is measured: {reason}")
        if len(heldout) < min(evaluation.num, _FEW):
            yield f"{len(heldout)} pairs are held out to measure on: too few to say much"
    if "" in specs:
        own_hints(evaluation, specs[""])  # files that cannot be read are errors now


def _check_processes(plan: Resolved, ranks: Ranks) -> None:
    """Refuse what several processes, or sharded weights, cannot do."""
    learning, batch = plan.learning, plan.batches
    if ranks.sharded and learning.precision == "fp16":
        raise Unsupported("precision: fp16 scales its loss, which sharded weights cannot: use bf16.")
    if ranks.sharded and (learning.optimizer != "adamw" or learning.unfreeze_after):
        what = "unfreeze_after" if learning.optimizer == "adamw" else f"optimizer: {learning.optimizer}"
        raise Unsupported(
            f"{what} does not work with sharded weights (--use_fsdp): "
            f"{'leave it out' if learning.optimizer == 'adamw' else 'use adamw'}, or launch without it."
        )
    if batch.batch % (batch.noises_per_pair * plan.compute.gradient_accumulation * ranks.count):
        raise Mismatch(
            f"A batch of {batch.batch} rows cannot be split into pairs of {batch.noises_per_pair} noises, "
            f"{plan.compute.gradient_accumulation} equal parts and {ranks.count} processes: use another batch."
        )
