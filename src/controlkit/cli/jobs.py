"""Many pictures by one command: ``generate --jobs``."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from controlkit.cli.shared import progress_bars, say, say_beside, warn
from controlkit.cli.stopping import Stopping
from controlkit.errors import Invalid
from controlkit.files import held, home_path

if TYPE_CHECKING:
    from controlkit.backbones import Backbone
    from controlkit.sample import Request
    from controlkit.sample.journal import Plan
    from controlkit.sample.makers import Crew, JobMaker

_STOPPED = "stopped: run again to go on"


def with_places(given: Sequence[str], keys: Mapping[str, str]) -> list[str]:
    """``--control`` options, those without a picture with the place of each job's own: NAME[:TYPE][,KEY=VALUE...].

    ``keys``: the settings that a control may have.
    """
    from controlkit.formats import shipped_controls
    from controlkit.sample.jobs import EACH

    found = []
    for text in given:
        name, settings = text, ""
        while "," in name and name.rpartition(",")[2].partition("=")[0] in keys:
            name, _, last = name.rpartition(",")
            settings = f",{last}{settings}"
        bare = "=" not in name or name in shipped_controls() or home_path(name).exists()
        found.append(f"{name}={EACH}{settings}" if bare else text)
    return found


def run_jobs(
    jobs: Path,
    template: "Request",
    out: Path,
    facts: Mapping[str, Any],
    load: Callable[[str], "Backbone"],
    device: str,
    workers: int,
) -> None:
    """Make the pictures of jobs that are not there yet, on the base that ``load`` gives for a device.

    ``facts``: on the base and so on, which stand in the pictures' files.
    """
    from controlkit.sample.jobs import BATCH, read_jobs
    from controlkit.sample.journal import begin

    if os.path.realpath(jobs) == os.path.realpath(out):
        raise Invalid(f"--out is the folder of --jobs, {jobs}, whose pictures are read: give another.")
    found = read_jobs(jobs, template)
    most = max(min(BATCH, len(found) // (4 * workers)), 1) if workers > 1 else BATCH
    out.mkdir(parents=True, exist_ok=True)
    with held(out):
        with Stopping("", _STOPPED):  # thousands of pictures take their time to be looked at
            plan = begin(out, found, facts, most)
        if plan.done:
            say(f"{plan.done} of {len(found)} pictures are in {out} already.")
        if plan.left:
            with _makers(load, device, min(workers, len(plan.groups))) as maker:
                _check(plan, maker)
                _make(plan, maker)
    say(f"{len(found)} picture{'s' if len(found) > 1 else ''} in {out}")


@contextmanager
def _makers(load: Callable[[str], "Backbone"], device: str, workers: int) -> "Iterator[JobMaker | Crew]":
    """Whoever makes the pictures: this process, or several through Ray."""
    from controlkit.sample.makers import JobMaker, hired

    with ExitStack() as stack:
        with Stopping("", _STOPPED):
            maker = stack.enter_context(hired(load, device, workers)) if workers > 1 else JobMaker(load(device))
        yield maker


def _check(plan: "Plan", maker: "JobMaker | Crew") -> None:
    """Have all jobs checked before the first is made, and say what is to be known of them."""
    notes: Counter[str] = Counter()
    first: dict[str, str] = {}
    with Stopping("", _STOPPED), progress_bars() as progress:
        task = progress.add_task("checking", total=len(plan.groups), figures="")
        for found in maker.check(plan.groups):
            if found is None:
                progress.advance(task)
                continue
            note, name = found
            notes[note] += 1
            first.setdefault(note, name)
    for note, count in notes.items():
        warn(f"{first[note]}{f' and {count - 1} more' if count > 1 else ''}: {note}")


def _make(plan: "Plan", maker: "JobMaker | Crew") -> None:
    """Make and write the pictures, a line for each; Ctrl-C stops between two steps."""
    from controlkit.sample import Step
    from controlkit.sample.journal import Finished, written

    began, done = time.perf_counter(), 0
    records = written(plan, maker.make(plan.groups))
    stopping = Stopping("stopping after this step; again, to end at once", _STOPPED)
    with stopping, progress_bars() as progress:
        task = progress.add_task("generating", total=plan.left, figures="")
        for record in records:
            if isinstance(record, Step):
                progress.update(task, figures=f"step {record.step} of {record.steps}")
            elif isinstance(record, Finished):
                done += 1
                rate = 60 * done / (time.perf_counter() - began)
                progress.advance(task)
                say_beside(progress, f"{record.name}.png  {record.seconds:.2f} s  {rate:.1f} pictures a minute")
            if stopping.is_asked() and done < plan.left:
                records.close()
                break
    if done < plan.left:
        warn(f"stopped with {done} of {plan.left} pictures made: run again to go on")
        raise typer.Exit(stopping.code)
