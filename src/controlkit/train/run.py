"""Training a control: the paper's objective as an iterator of records, with exact resume.

``train_control(recipe, out)`` yields one ``Record`` a step; the command line prints them, ``OUT/log.jsonl`` keeps
them, a test takes three and stops. Run again with the same folder, it goes on from the last checkpoint and yields
what the uninterrupted run would have: every draw is keyed by (seed, step, sample), and checkpoints are whole or absent.
"""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from controlkit.backbones import UNetBase, load_base, recomputed
from controlkit.branch import ControlBranch
from controlkit.data import (
    Cached,
    Pair,
    build_cache,
)
from controlkit.errors import UserError
from controlkit.formats import SavedControl, save_control
from controlkit.images import Hint
from controlkit.measure import (
    Obedience,
)
from controlkit.optimizers import Average, Optimizer
from controlkit.precision import autocast, training_attention
from controlkit.ranks import Ranks, ranks
from controlkit.recipe import Recipe
from controlkit.train.checkpoints import (
    Learner,
    begin_folder,
    check_folder,
    checkpoints_in,
    cut_log,
    keep_format,
    load_checkpoint,
    save_checkpoint,
    sole_owner,
)
from controlkit.train.evaluation import Evaluator, Gauge
from controlkit.train.plan import Meter, foresee, told
from controlkit.train.records import Record, Seen, best_of, enough, verdict
from controlkit.train.schedule import Clock, learning_rate
from controlkit.train.setup import hints_of, new_branch, plan_of, training_pairs
from controlkit.train.step import controlled, draw_batch, objective


def train_control(
    recipe: Recipe,
    out: Path,
    base: UNetBase | None = None,
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
    check_folder(recipe, out)
    base = base or load_base(recipe.base)
    meter = Meter(base) if foreseen else None
    together = ranks(cpu=base.device.type == "cpu")
    if recipe.batch % (recipe.draws * recipe.accumulate * together.count):
        raise UserError(
            f"A batch of {recipe.batch} rows cannot be shared out in {recipe.draws} draws of each pair, "
            f"{recipe.accumulate} equal parts and {together.count} processes: take another batch."
        )
    pairs, heldout = training_pairs(recipe, base)
    notes: list[str] = []
    branch = new_branch(recipe, base, contracts, not checkpoints_in(out), notes.append)
    optimizer = Optimizer(branch, recipe.optimizer, recipe.betas, recipe.weight_decay, recipe.epsilon)
    # Nothing is written before here: a recipe that cannot run leaves no folder behind.
    together.wait()
    out.mkdir(parents=True, exist_ok=True)
    with sole_owner(out) if together.first else nullcontext():
        plan = None
        if together.first:
            begin_folder(recipe, out, base.device.type)
            on_stage(plan_of(recipe, base, branch, contracts, len(pairs)), 0)
            for note in notes:
                on_stage(f"note: {note}", 0)
            if meter:
                plan = foresee(recipe, base, branch, contracts, len(pairs), meter, together.count)
                on_stage("\n".join(plan.lines()), 0)
        run = _train(recipe, out, base, branch, optimizer, contracts, pairs, heldout, together, on_stage, on_advance)
        with closing(run):
            for record in run:
                if meter and plan:
                    on_stage(f"memory held at most, until after the first step: {told(meter.peak())}", 0)
                    plan = None
                yield record


def _train(
    recipe: Recipe,
    out: Path,
    base: UNetBase,
    branch: ControlBranch,
    optimizer: Optimizer,
    contracts: Mapping[str, Hint],
    pairs: Sequence[Pair],
    heldout: Sequence[Pair],
    together: Ranks,
    on_stage: Callable[[str, int], None],
    on_advance: Callable[[int], None],
) -> Generator[Record, None, None]:
    clock = Clock(recipe.budget)
    path = out / f"pairs-{base.digest}.safetensors"
    if together.first:
        on_stage("caching", len(pairs))
        cached = build_cache(base, pairs, contracts, path, on_advance)
    together.wait()
    if not together.first:
        keep_format(out, base.device.type)
        cached = Cached.read(path)
    learner = Learner(branch, optimizer, Average(branch, recipe.ema) if recipe.ema else None)
    evaluates = recipe.evaluation.every > 0 and together.first
    evaluator = Evaluator(base, heldout, contracts[""], recipe, out) if evaluates and "" in contracts else None
    gauge = Gauge(base, heldout, contracts, recipe, out) if evaluates else None
    predict = torch.compile(controlled) if recipe.compile else controlled
    step = 0
    kept = checkpoints_in(out)
    if kept:
        facts = load_checkpoint(kept[-1], learner, base)
        step, clock = int(facts["step"]), Clock(recipe.budget, facts)
    evaluations = together.told(cut_log(out / "log.jsonl", step) if together.first else None)

    def saved(at: int) -> SavedControl:
        facts = {"base": base.name, "base_digest": base.digest, "step": at, "data": recipe.data.source}
        hints = contracts if recipe.control.types else {}
        facts |= {"recipe": recipe.model_dump()}
        return SavedControl(learner.result, contracts.get("", Hint("")), facts, hints, recipe.control.guidance)

    attention = partial(training_attention, base.device.type)

    def gradients(step: int, parts: int) -> torch.Tensor:
        """The gradients of a step's batch, added up over this process's equal parts of it; returns their loss, on the
        device: parts are queued one after the other, and nothing waits for them."""
        total = torch.zeros((), device=base.device)
        for part in range(together.index * parts, (together.index + 1) * parts):
            batch = draw_batch(base, cached, contracts, recipe, step, part, parts * together.count)
            with autocast(base.device.type), attention():
                loss = objective(base, branch, batch, predict) / parts
            loss.backward()
            total += loss.detach()
        return total

    parts = recipe.accumulate
    short = recomputed(branch, base.unet, within=attention) if recipe.checkpointing else nullcontext()
    over = bool(kept) and together.told(clock.over)  # there is always a first step, however long caching took
    with (out / "log.jsonl").open("a" if together.first else "r") as log, short:
        while step < recipe.steps and not enough(recipe.evaluation, evaluations) and not over:
            started = time.perf_counter()
            full: torch.OutOfMemoryError | None = None
            loss = torch.zeros((), device=base.device)
            try:
                loss = gradients(step, parts)
            except torch.OutOfMemoryError as error:
                full = error
            if together.any(full is not None, base.device):
                branch.zero_grad()
                parts = _more_parts(recipe.batch // recipe.draws // together.count, parts, full)
                said = f"step {step + 1} and the rest in {parts} parts, the batch is still {recipe.batch}"
                on_stage(f"out of memory: {said}", 0)
                continue
            together.mean([loss])
            together.mean_gradients(branch)
            norm = nn.utils.clip_grad_norm_(branch.parameters(), recipe.max_grad_norm)
            # Where a step waits for the device, once: what is not finite must not reach the weights.
            value, slope = torch.stack([loss, norm]).tolist()
            if not np.isfinite([value, slope]).all():
                raise UserError(
                    f"At step {step + 1} the loss is {value} and its gradient's norm {slope}. Lower the learning rate "
                    f"(it is {recipe.lr}) and give another --out."
                )
            step += 1
            spent = together.told(clock.share) if recipe.budget else 0.0
            learner.step(learning_rate(recipe, step - 1, spent), step)
            seconds = clock.last_step = time.perf_counter() - started
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
            over = bool(recipe.budget) and together.told(clock.over)
            last = step == recipe.steps or enough(recipe.evaluation, evaluations) or over
            if together.first:
                log.write(record.to_json() + "\n")
                log.flush()
                if step % recipe.checkpoint_every == 0 or last:
                    save_checkpoint(out, step, saved(step), base, learner.state(), recipe.keep, clock.facts())
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
