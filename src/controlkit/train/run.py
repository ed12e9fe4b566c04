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
from typing import NoReturn

import numpy as np
import torch
from safetensors import SafetensorError

from controlkit.backbones import Backbone, load_base, recomputed, save_difference
from controlkit.backbones.memory import Meter, narrowed
from controlkit.branch import ControlNetwork
from controlkit.data import Cached, FolderPairs, Pair, build_cache, open_store
from controlkit.errors import Invalid, Mismatch, Unsupported
from controlkit.files import inside
from controlkit.formats import SavedControl, save_control, save_control_lora
from controlkit.images import HintSpec
from controlkit.measure import EvaluationPlan, Obedience, Verdict, meaningless, unmeasurable, verdict_on
from controlkit.precision import HALVES, number_format
from controlkit.sample import ControlRequest
from controlkit.train.checkpoints import (
    begin_folder,
    check_folder,
    checkpoints_in,
    cut_log,
    keep_format,
    load_checkpoint,
    save_checkpoint,
    sole_owner,
)
from controlkit.train.ending import ENDING, Ending, Reason, next_command, read_ending, train_command, why_ended
from controlkit.train.evaluation import CONTROL, Evaluator, own_hints
from controlkit.train.gradients import Gradients
from controlkit.train.heldout import HeldoutLoss
from controlkit.train.parts import Resolved
from controlkit.train.plan import estimate, format_bytes
from controlkit.train.ranks import Ranks, connect_ranks
from controlkit.train.recipe import Recipe
from controlkit.train.records import (
    EvaluationSummary,
    Record,
    best_of,
    divergence,
    should_stop,
    summary_of,
    verdict,
)
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
    stopping: Callable[[], bool] = lambda: False,
) -> Iterator[Record]:
    """Train a control, yielding a record a step: the paper's Section 3.3, with the objective of equation 5.

    ``OUT/control`` holds the result when the iterator ends, ``OUT/best`` the most obedient control measured, and
    ``read_ending(OUT)`` tells why it ended and what was found. Called again it resumes from the last checkpoint. With
    several processes (``torchrun``), each computes its part of every batch.

    ``on_stage(name, total)`` and ``on_advance(count)`` report the work between steps: caching and evaluating. With a
    total of 0 the name is a sentence for the user, such as what was done when memory ran out.

    ``estimate_first``: try a part of a batch and report the memory and time the run will take, and after the first step
    the memory it took.

    ``stopping`` is asked after every step: where it is true in any process, a checkpoint is written and the run ends,
    to go on another time. Before the first step it is a ``KeyboardInterrupt``.

    Raises a ``UserError``: ``NotFound`` for a base, data, control or package that is missing; ``Invalid`` for a setting
    or file, or where the run diverges; ``Mismatch`` for the folder of another recipe, or other weights or data than it
    began with;
    ``Unsupported`` for settings that do not work together, or a folder another process trains in; ``OutOfRoom`` where
    memory or disk is too small. A recipe that cannot run leaves no folder behind.
    """
    prepared = prepare(recipe, out, base, estimate_first)
    with ExitStack() as opened:
        run = Run(prepared, out, Reports(on_stage, on_advance, stopping), opened)
        del prepared, base  # the run's own may be narrower
        while not run.reason:
            yield run.step()
        run.finish()


@dataclass(frozen=True)
class Reports:
    """Where a run reports its progress, and asks whether to stop (``train_control``)."""

    on_stage: Callable[[str, int], None]
    on_advance: Callable[[int], None]
    stopping: Callable[[], bool]


@dataclass(frozen=True)
class Prepared:
    """All that a run begins with; nothing is written yet. ``state.base`` is a copy of ``frozen`` where it is trained.

    ``heldout``: the pairs to measure on. ``unmeasured``: why obedience is not measured, as a sentence, or "".
    ``shown``: (prompt, hint) of the user's own hints. ``meter``: where an estimate is wanted.
    """

    plan: Resolved
    frozen: Backbone
    state: TrainState
    pairs: Sequence[Pair]
    heldout: Sequence[Pair]
    unmeasured: str
    shown: Sequence[tuple[str, np.ndarray]]
    ranks: Ranks
    notes: Sequence[str]
    meter: Meter | None


def prepare(recipe: Recipe, out: Path, base: Backbone | None, estimate_first: bool = False) -> Prepared:
    """Check the recipe and the folder, load the base, find the data and make the branch."""
    plan = resolve(recipe)
    check_trackers(recipe.tracking.to)
    notes = check_folder(recipe, out)
    base = base or load_base(recipe.base, vae=recipe.vae)
    if recipe.size and recipe.size != base.size:
        notes.append(f'pictures of {recipe.size} pixels; "{base.name}" was trained on {base.size}')
        base = base.of_size(recipe.size)
    meter = Meter(base) if estimate_first else None
    ranks = connect_ranks(cpu=base.device.type == "cpu")
    _check_processes(plan, ranks)
    _check_timesteps(recipe, base)
    pairs, heldout = training_pairs(plan.data, base)
    unmeasured = _why_unmeasured(plan, heldout)
    notes += _notes_on_measuring(recipe, unmeasured, len(heldout))
    shown = own_hints(recipe.evaluation, plan.specs[""]) if "" in plan.specs else []
    branch = new_branch(recipe.control, plan.specs, base, recipe.seed, not checkpoints_in(out), notes.append)
    learner = base.with_own_denoiser() if recipe.unfreeze_after else base
    state = TrainState.of(plan.learning, branch, learner, ranks)
    return Prepared(plan, base, state, pairs, heldout, unmeasured, shown, ranks, notes, meter)


class Run:
    """A training run in its folder: ``step`` until there is a ``reason`` to end, then ``finish``.

    ``done``: the steps made. ``evaluations``: those up to this step, in order.
    """

    def __init__(self, prepared: Prepared, out: Path, reports: Reports, opened: ExitStack) -> None:
        """Take the folder, report the plan, cache the pairs, restore the last checkpoint, and open the log.

        ``opened`` closes the run's files and frees its folder.
        """
        self.plan, self.frozen, self.state = prepared.plan, prepared.frozen, prepared.state
        self.ranks, self.out, self.reports = prepared.ranks, out, reports
        recipe = self.plan.recipe
        self._clock, self._unmeasured = Clock(self.plan.rates.max_minutes), prepared.unmeasured
        note = self._take_folder(prepared, opened)
        self._narrow()
        base = self.state.base
        if self.ranks.first:
            self._announce(prepared, note)
            reports.on_stage("caching", len(prepared.pairs))
        cached = self._cached("pairs", prepared.pairs, self._advance, mirrors=recipe.data.flip > 0)
        if self.ranks.first and recipe.data.buckets:
            reports.on_stage(describe_buckets(cached, self.plan.batches.pairs), 0)
        self._evaluator = self._loss = None
        if recipe.evaluation.every:
            self._evaluator = self._new_evaluator(prepared)
            if self._evaluator and self._evaluator.unjudged and self.ranks.first:
                reports.on_stage(f"note: {self._evaluator.unjudged}", 0)
            [heldout] = self._cached("heldout", prepared.heldout)
            self._loss = HeldoutLoss(base, self.frozen, heldout, self.plan.batches, self.ranks)
        batches, compute = self.plan.batches, self.plan.compute
        self._gradients = Gradients(self.state, cached, batches, compute, self.ranks, reports.on_stage)
        self._unmetered = prepared.meter
        """Tells after the first step how much memory it took."""
        self.done, self._out_of_time, self._stopped = 0, False, False
        if checkpoints := checkpoints_in(out):
            facts = load_checkpoint(checkpoints[-1], self.state, self.frozen)
            self._clock.restore(facts["seconds"], facts["last_step"])
            self.done, self._out_of_time = facts["step"], self.ranks.broadcast(self._clock.over)
        self.evaluations: list[EvaluationSummary] = []
        self._losses: list[float] = []
        self._measured = Record(0, 0.0, 0.0)
        """What the last evaluation found."""
        if self.ranks.first:
            self.evaluations, self._losses, logged = cut_log(out / "log.jsonl", self.done)
            self._log = opened.enter_context((out / "log.jsonl").open("a"))
            trackers = tracked(recipe.tracking, recipe.model_dump(), out, self.done, logged)
            self._track = opened.enter_context(trackers)
        self.evaluations, self._losses = self.ranks.broadcast((self.evaluations, self._losses))
        if compute.gradient_checkpointing:
            opened.enter_context(recomputed(self.state.branch, base.denoiser, within=self._gradients.attention))

    @property
    def reason(self) -> Reason | None:
        """Why no step follows; None where one does."""
        if enough := should_stop(self.plan.recipe.evaluation, self.evaluations):
            return enough
        if self.done >= self.plan.rates.steps:
            return "steps"
        if self._out_of_time:
            return "max_minutes"
        return "interruption" if self._stopped else None

    def step(self) -> Record:
        """Make one step; evaluate and keep where it is due. ``Invalid`` where it diverges."""
        started = time.perf_counter()
        if self.ranks.first:
            (self.out / ENDING).unlink(missing_ok=True)
        if after := self.plan.learning.unfreeze_after:
            self.state.base.denoiser.requires_grad_(self.done >= after)
            if self.done == after:
                self._gradients.check_again()
        loss = self._gradients.of(self.done)
        norm = self.state.clip(self.plan.learning.max_grad_norm)
        # Where a step waits for the device, once: what is not finite must not reach the weights.
        value, slope = torch.stack([loss, norm]).tolist()
        if not np.isfinite([value, slope]).all() and not (np.isfinite(value) and self.state.skips_overflow):
            self._diverge(f"the loss is {value} and its gradient's norm {slope}", self.done + 1)
        limited = self.plan.rates.max_minutes is not None
        spent = self.ranks.broadcast(self._clock.share) if limited else 0.0
        rate = learning_rate(self.plan.rates, self.done, spent)
        self.done += 1
        self.state.step(rate, self.done)
        record = Record(self.done, value, self._clock.stepped(started))
        self._losses.append(value)
        every = self.plan.recipe.evaluation.every
        self._out_of_time = limited and self.ranks.broadcast(self._clock.over)
        due = every and (self.done % every == 0 or self.done == self.plan.rates.steps or self._out_of_time)
        record = self._measure(record) if due else record
        if words := divergence(record, self._losses):
            self._diverge(words, self.done)
        if due:
            record = self._evaluated(record)
            self._out_of_time = limited and self.ranks.broadcast(self._clock.over)
        if self.ranks.first:
            self._log_record(record, rate)
        self._stopped = self.ranks.any(self.reports.stopping())
        if self.done % self.plan.recipe.checkpoint_every == 0 or self.reason:
            self.keep()
        if self._unmetered and self.ranks.first:
            self.reports.on_stage(f"most memory held up to the first step: {format_bytes(self._unmetered.peak())}", 0)
            self._unmetered = None
        return record

    def _measure(self, record: Record) -> Record:
        """Add to a step's record what an evaluation of the control finds."""
        assert self._loss
        started, weights = time.perf_counter(), self.state.result().eval()
        record = replace(record, relative=self._loss.measure(weights), residuals=self._loss.residuals(weights))
        if self._evaluator:
            self.reports.on_stage("evaluating", self._evaluator.work)
            record = self._evaluator.measure(weights, record, self.reports.on_advance)
        weights.train()
        self._clock.evaluation = time.perf_counter() - started
        self._measured = record
        return record

    def _evaluated(self, record: Record) -> Record:
        """Add an evaluation to those before it and its verdict to the record, and keep the best control."""
        weights = self.state.result()
        summary = summary_of(json.loads(record.to_json()))  # as the log has it: a resumed run decides alike
        assert summary is not None
        self.evaluations.append(summary)
        if record.evaluation:
            record = replace(record, verdict=verdict(self.evaluations, meaningless(record.evaluation)))
        if self.ranks.first and best_of(self.evaluations) is summary:
            self._write(self.out / "best", weights)
        self.evaluations = self.ranks.broadcast(self.evaluations)
        return record

    def _diverge(self, words: str, step: int) -> NoReturn:
        """End the run at a step that diverged; what was kept before it stays."""
        rate, kept = self.plan.rates.lr, checkpoints_in(self.out)
        begin = f"from step {int(kept[-1].name.removeprefix('step-'))} on" if kept else "from the beginning"
        command = train_command(self.out, f"lr={rate / 10:g}")
        why = (
            f"Diverged at step {step}: {words}. The learning rate is too high: it is {rate:g}. A tenth of it, "
            f"{begin}: {command}"
        )
        if len(kept) > 1:
            why += "; from an earlier checkpoint with --from-step"
        if self.ranks.first:
            Ending(step - 1, "divergence", f"{why}.", None, command).write(self.out)
        raise Invalid(f"{why}.")

    def keep(self) -> None:
        """Write a checkpoint, from which a run resumes exactly."""
        state, weights = self.state.state(keep=self.ranks.first), self.state.result()
        if self.ranks.first:
            controls, facts = self._controls(weights), self._clock.facts()
            save_checkpoint(self.out, self.done, controls, self.frozen, state, self.plan.recipe.keep, facts)

    def finish(self) -> None:
        """Write the control into ``OUT/control``, unless it was interrupted; judge it, and write how the run ended."""
        reason, recipe, weights = self.reason, self.plan.recipe, self.state.result()
        assert reason
        if reason != "interruption" and self.ranks.first:
            self._write(self.out / "control", weights)
        before = self.ranks.broadcast(read_ending(self.out) if self.ranks.first else None)
        if before and (before.step, before.reason) == (self.done, reason):  # nothing was left to do
            return
        held = best_of(self.evaluations)
        best = held.step if held else None
        why = why_ended(reason, self.done, recipe, best)
        if reason == "interruption":
            ending = Ending(self.done, reason, why, None, train_command(self.out))
        else:
            found = self._verdict(weights)
            command = next_command(self.out, recipe, reason, found, best, self.done)
            ending = Ending(self.done, reason, why, found, command)
        if self.ranks.first:
            ending.write(self.out)
        self.ranks.wait()

    def _verdict(self, weights: ControlNetwork) -> Verdict:
        """Judge the control that the run ends with, on an evaluation of it and a second one with other seeds."""
        if not self._loss:
            return Verdict("cannot be measured", "evaluation.every is 0, so nothing was measured")
        if self._measured.step != self.done:  # killed after the last step
            self._measure(Record(self.done, 0.0, 0.0))
        record, evaluator = self._measured, self._evaluator
        if not (record.evaluation and evaluator):
            loss = ", ".join(f"{name} {sum(x) / len(x):.3f}".strip() for name, x in record.relative.items())
            reason = f"{self._unmeasured} The held-out loss is {loss} of that without control"
            return Verdict("cannot be measured", reason)

        def again() -> Obedience | None:
            other = replace(evaluator.plan, first_seed=len(evaluator.plan.pairs))
            second = Evaluator(self.state.base, self.frozen, other, [], None, self.ranks)
            self.reports.on_stage("evaluating with other seeds", second.work)
            return second.measure(weights.eval(), record, self.reports.on_advance).evaluation

        summary = summary_of(json.loads(record.to_json()))
        return verdict_on(record.evaluation, summary.quality_kept if summary and record.quality else None, again)

    def _advance(self, count: int) -> None:
        """Report work before the first step, which may be stopped."""
        self.reports.on_advance(count)
        if self.reports.stopping():
            raise KeyboardInterrupt

    def _take_folder(self, prepared: Prepared, opened: ExitStack) -> str:
        """Lock the folder and begin, or go on, there; returns a note, or ""."""
        self.ranks.wait()
        note = ""
        if self.ranks.first:
            self.out.mkdir(parents=True, exist_ok=True)
            opened.enter_context(sole_owner(self.out))
            check_folder(self.plan.recipe, self.out)  # again: a run of another recipe may have come in between
            folders = [part for part in (prepared.pairs, prepared.heldout) if isinstance(part, FolderPairs)]
            note = begin_folder(self.plan.recipe, self.out, self.frozen.device.type, self.ranks, folders)
        self.ranks.check_shared(self.out)
        if not self.ranks.first:
            keep_format(self.out, self.frozen.device.type)
        return note

    def _narrow(self) -> None:
        """Keep the matrices of a base that stays locked in the half precision of the run, if it computes in one.

        Not of one that is trained later, nor under a Control-LoRA: both are written as differences to whole weights.
        """
        half = HALVES.get(number_format(self.frozen.device.type))
        if half and not self.plan.learning.unfreeze_after and self.plan.recipe.control.body != "lora":
            self.frozen = narrowed(self.frozen, half)
            self.state = replace(self.state, base=self.frozen)

    def _announce(self, prepared: Prepared, note: str) -> None:
        """Report what the run is about to do and, with a meter, what it will take."""
        pairs, meter = len(prepared.pairs), prepared.meter
        sentence = describe_run(self.plan, self.frozen, self.state.branch, pairs, self.ranks.count)
        notes = [*prepared.notes, *([note] if note else [])]
        for line in (*self.ranks.notes, sentence, *(f"note: {note}" for note in notes)):
            self.reports.on_stage(line, 0)
        if meter and not self.ranks.sharded:  # all processes would have to take part
            found = estimate(self.plan, self.frozen, self.state, pairs, meter, self.ranks.count)
            for line in found.lines():
                self.reports.on_stage(line, 0)
            meter.reset()  # the memory of the trial is not the run's

    def _new_evaluator(self, prepared: Prepared) -> Evaluator | None:
        """The evaluator that measures obedience and makes pictures; None for a Union."""
        if "" not in self.plan.specs:
            return None
        recipe, spec = self.plan.recipe, self.plan.specs[""]
        control = ControlRequest(name=CONTROL, hint_cfg_scale=recipe.control.hint_cfg_scale)
        pairs = [prepared.heldout[i] for i in range(len(prepared.heldout))]
        plan = EvaluationPlan(control, spec, pairs, recipe.evaluation.steps, recipe.evaluation.guidance)
        return Evaluator(self.state.base, self.frozen, plan, prepared.shown, self.out, self.ranks)

    def _cached(
        self,
        name: str,
        pairs: Sequence[Pair],
        on_advance: Callable[[int], None] = lambda count: None,
        mirrors: bool = False,
    ) -> list[Cached]:
        """Build the cache of pairs in the run's folder, if it is not there, in the first process; read it in all."""
        path = inside(self.out, self.out / f"{name}-{self.state.base.digest}.safetensors")
        if self.ranks.first:
            if path.exists():
                _check_cache(path, len(pairs), self.state.base, len(self.plan.specs))
            with open_store() if self.plan.recipe.data.cache else nullcontext() as store:
                build_cache(self.state.base, pairs, self.plan.specs, path, on_advance, mirrors=mirrors, store=store)
        self.ranks.wait()
        return Cached.read(path)

    def _log_record(self, record: Record, rate: float) -> None:
        self._log.write(record.to_json() + "\n")
        self._log.flush()
        self._track(record, rate)

    @property
    def _unfrozen(self) -> bool:
        after = self.plan.learning.unfreeze_after
        return after is not None and self.done > after

    def _controls(self, weights: ControlNetwork) -> dict[str, SavedControl]:
        """The control of this step, with what it was trained on, under ""; of several branches each under its name."""
        recipe = self.plan.recipe
        facts = {"base": self.frozen.name, "base_digest": self.frozen.digest, "step": self.done}
        facts |= {"data": recipe.data.source}
        found = {}
        for name, branch in weights.parts().items():
            specs = own_specs(self.plan.specs, name)
            difference = {"base_difference": f"../{DIFFERENCE}" if name else DIFFERENCE} if self._unfrozen else {}
            trained = facts | difference | {"recipe": recipe.model_dump()}
            hints = specs if recipe.control.types else {}
            spec = specs.get("", HintSpec(""))
            found[name] = SavedControl(branch, spec, trained, hints, recipe.control.hint_cfg_scale).sealed()
        return found

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


def _check_cache(path: Path, pairs: int, base: Backbone, kinds: int) -> None:
    """Refuse a file in the place of a cache that is none, of so many pairs and kinds of hint, for this base."""

    def fits(one: Cached) -> bool:
        rows, (height, width) = len(one.moments), one.size
        ends = [(one.kinds, kinds), (one.prompt_rows, len(one.text))]
        ends += [] if one.mirrors is None else [(one.mirrors, rows)]
        words = {name: value.shape[1:] for name, value in one.text.tensors().items()}
        return (
            len(one.hints) == rows == len(one) * (1 if one.mirrors is None else 2)
            and one.moments.shape[1:] == (2 * base.latent_channels, height // base.stride, width // base.stride)
            and all(len(of) == len(one) and 0 <= int(of.min()) <= int(of.max()) < end for of, end in ends)
            and words == {name: value.shape[1:] for name, value in base.encode_text([""]).tensors().items()}
        )

    try:
        held = Cached.read(path)
        sound = sum(map(len, held)) == pairs and all(map(fits, held))
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError):
        sound = False  # of any other file
    if not sound:
        raise Invalid(f"{path} is damaged, or not of this run: delete it and run again.")


def _why_unmeasured(plan: Resolved, heldout: Sequence[Pair]) -> str:
    """Why a run's evaluations do not measure obedience, as a sentence; "" where they do, or there are none."""
    if not plan.recipe.evaluation.every:
        return ""
    union = "A Union's is, type by type, when it is trained."
    return unmeasurable(plan.specs[""], heldout) if "" in plan.specs else union


def _notes_on_measuring(recipe: Recipe, unmeasured: str, heldout: int) -> Iterator[str]:
    """Sentences on what the evaluations cannot show; errors for what they cannot do."""
    if unmeasured:
        yield f"obedience is not measured: {unmeasured} The best control is the one with the least relative loss"
        if recipe.evaluation.target is not None:
            raise Unsupported(f"evaluation.target is an obedience, and none is measured: {unmeasured}")
    if recipe.evaluation.every and heldout < min(recipe.evaluation.num, _FEW):
        yield f"{heldout} pairs are held out to measure on: too few to say much"


def _check_timesteps(recipe: Recipe, base: Backbone) -> None:
    """Refuse more sampling steps, or noises of a pair, than the base has timesteps."""
    for key, value in (("evaluation.steps", recipe.evaluation.steps), ("noises_per_pair", recipe.noises_per_pair)):
        if value > base.noise.count:
            raise Invalid(f'{key} is {value}, and "{base.name}" has {base.noise.count} timesteps: use fewer.')


def _check_processes(plan: Resolved, ranks: Ranks) -> None:
    """Refuse what several processes, or sharded weights, cannot do."""
    learning, batch = plan.learning, plan.batches
    if ranks.sharded and learning.precision == "fp16":
        raise Unsupported("precision: fp16 scales its loss, which sharded weights cannot: use bf16.")
    for what, works, instead in (
        (f"optimizer: {learning.optimizer}", learning.optimizer == "adamw", "use adamw"),
        ("unfreeze_after", not learning.unfreeze_after, "leave it out"),
    ):
        if ranks.sharded and not works:
            raise Unsupported(
                f"{what} does not work with sharded weights (--use_fsdp): {instead}, or launch without it."
            )
    if batch.batch % (batch.noises_per_pair * plan.compute.gradient_accumulation * ranks.count):
        raise Mismatch(
            f"A batch of {batch.batch} rows cannot be split into pairs of {batch.noises_per_pair} noises, "
            f"{plan.compute.gradient_accumulation} equal parts and {ranks.count} processes: use another batch."
        )
