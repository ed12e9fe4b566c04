"""The studio of a worker: a base with its controls, and the orders of jobs carried out on it."""

import hashlib
import json
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from controlkit.annotators import all_kinds, annotate_all, annotator
from controlkit.backbones import Backbone
from controlkit.backbones.schedulers import SCHEDULERS, SPACINGS, has_spacing, own_name
from controlkit.controls import TYPES
from controlkit.errors import NotFound, Unsupported, UserError, nearest
from controlkit.formats import SavedControl, describe, shipped_controls
from controlkit.formats.convert import dtype_name
from controlkit.formats.metadata import json_object, metadata_entry, weights_file
from controlkit.images import HintSpec, png_bytes, stretch, write_png
from controlkit.precision import number_format, settle_threads
from controlkit.sample import Picture, Prepared, Step, generate, load, maker, prepare
from controlkit.sample.embedded import embedded
from controlkit.sample.jobs import BATCH
from controlkit.serve.loras import Merged, add_embeddings
from controlkit.serve.orders import Annotation, Evaluation, Order, Pictures
from controlkit.serve.settings import Folders
from controlkit.serve.worker import Tell
from controlkit.tensors import PICKLES, open_tensors

_KEPT = 4
"""Controls that are kept in memory."""
_PREVIEWS = 0.7
"""Seconds between two previews."""

Result = dict[str, Any]
Outcomes = dict[str, Result]
"""By a job's id: ``result``, what came of it; or ``fault``, the kind of error, and ``error``, its sentence; or
``cancelled``."""

log = logging.getLogger(__name__)


class _Stopped(Exception):  # noqa: N818  # no error
    pass


@dataclass(frozen=True)
class ControlEntry:
    """A control that can be asked for."""

    name: str
    hash: str
    """Eight hex digits, as A1111 computes them of a file."""
    annotator: str
    """The kind of its hints; "" where nobody knows."""
    types: tuple[str, ...] = ()
    """Of a Union: the types of hint it reads."""
    source: str = ""
    """As ``load_control`` takes it; never told to clients."""
    is_guessed: bool = False
    """Whether the annotator was read off the file's name."""


def old_hash(path: Path) -> str:
    """A1111's short hash of a file: of the 64 KiB after its first MiB, or of a smaller file as a whole."""
    with path.open("rb") as file:
        file.seek(1 << 20)
        part = file.read(1 << 16)
        if not part:
            file.seek(0)
            part = file.read(1 << 20)
    return hashlib.sha256(part).hexdigest()[:8]


def controls_for(base: Backbone, folder: Path | None) -> list[ControlEntry]:
    """The controls that can be asked for: those that are shipped for this base, and those in a folder."""
    found = dict[str, ControlEntry]()
    for path in sorted(folder.iterdir()) if folder else ():
        if path.name.startswith(".") or not (path.is_dir() or path.suffix.lower() in (".safetensors", *PICKLES)):
            continue
        try:
            entry = _entry(path)
        except UserError as error:
            log.warning("%s is left out: %s", path, error)
            continue
        if entry:
            found[entry.name] = entry
    for name, (path, kind) in shipped_controls().items():
        metadata = open_tensors(weights_file(path)).metadata
        if metadata_entry(metadata, path, "controlkit.signature", json_object, None) != _as_json(base.signature):
            continue
        entry = _entry(path, name)
        if entry and name not in found:
            found[name] = replace(entry, annotator=kind, types=(), source=name) if kind else replace(entry, source=name)
    return list(found.values())


def _as_json(value: Any) -> Any:
    """A value as it comes back from JSON."""
    return json.loads(json.dumps(value))


def _entry(path: Path, name: str = "") -> ControlEntry | None:
    """The entry of a file or folder of weights; None where it is no control that runs."""
    described = describe(path)
    if described.kind is None:
        return None
    file = weights_file(path)
    metadata = open_tensors(file).metadata
    hint = metadata_entry(metadata, path, "controlkit.hint", HintSpec.from_json, None)
    types = tuple(metadata_entry(metadata, path, "controlkit.hints", json_object, {}))
    if described.kind == "union" and not types:
        types = tuple(kind for kind, number in TYPES.items() if number < described.config["num_control_type"])
    guess = "" if types or (hint and hint.annotator) else _guessed(path.stem)
    known = hint.annotator if hint else ""
    return ControlEntry(name or path.stem, old_hash(file), known or guess, types, str(path), bool(guess))


def _guessed(name: str) -> str:
    """The kind of hints that a file's name speaks of, as ``control_v11p_sd15_canny`` does; "" where it names none."""
    kinds = {known: kind.name for kind in all_kinds() for known in (kind.name, *kind.aliases)}
    words = name.lower().replace("-", "_").split("_")
    return next((kinds[word] for word in reversed(words) if word in kinds), "")


class Studio:
    """A base and its controls; the files that jobs leave lie in ``folder``, one folder a job."""

    def __init__(self, base: Backbone, folder: Path, folders: Folders = Folders()) -> None:  # noqa: B008  # frozen
        """``folders``: those of files that may be asked for by name."""
        self.base, self.folder = base, folder
        self.entries = {entry.name: entry for entry in controls_for(base, folders.controls)}
        self._digest = base.digest  # of its own weights: before words are added
        self._embeddings = add_embeddings(base, folders.embeddings)
        self._loras = Merged(base, folders.loras)
        self._threads = settle_threads(base.networks().values())
        self._loaded: OrderedDict[str, tuple[SavedControl, list[str]]] = OrderedDict()

    def facts(self) -> dict[str, Any]:
        """All that requests are checked by, and that is told of the server, in plain values."""
        base = self.base
        told = [{key: value for key, value in asdict(one).items() if key != "source"} for one in self.entries.values()]
        spacings = {kind: [one for one in SPACINGS if has_spacing(kind, one)] for kind in SCHEDULERS}
        return {
            "base": base.name,
            "digest": self._digest,
            "size": base.size,
            "multiple": base.multiple,
            "most_steps": base.noise.count,
            "samplers": spacings,
            "controls": told,
            "embeddings": self._embeddings,
            **self._facts(),
        }

    def _facts(self) -> dict[str, Any]:
        device = self.base.device.type
        return {
            "format": number_format(device),
            "dtype": dtype_name(self.base.dtype),
            "threads": self._threads,
            "sampler": own_name(self.base.noise),
            "device": str(self.base.device),
        }

    def carry_out(self, orders: Mapping[str, Order], tell: Tell) -> Outcomes:
        """Carry out the orders of jobs, those of pictures that name the same LoRAs in one batch; what came of each."""
        pictures = {name: order for name, order in orders.items() if isinstance(order, Pictures)}
        found = Outcomes()
        for loras in dict.fromkeys(order.loras for order in pictures.values()):
            self._make({name: order for name, order in pictures.items() if order.loras == loras}, tell, found)
        for name, order in orders.items():
            if isinstance(order, Annotation):
                found[name] = _outcome(self._annotate, name, order)
            elif isinstance(order, Evaluation):
                found[name] = _outcome(self._evaluate, name, order, tell)
        return found

    # --- pictures -------------------------------------------------------------------------------------------------

    def _make(self, orders: Mapping[str, Pictures], tell: Tell, found: Outcomes) -> None:
        """Make the pictures of orders with the same LoRAs together, and add what came of each to ``found``."""
        prepared = dict[str, list[Prepared]]()
        for name, order in orders.items():
            try:
                prepared[name] = self.prepared(order)
            except UserError as error:
                found[name] = _failed(error)
        try:
            self._sample({name: orders[name] for name in prepared}, prepared, tell, found)
        except UserError as error:
            if len(orders) == 1:
                found |= dict.fromkeys(orders, _failed(error))
                return
            for name in [one for one in prepared if one not in found]:  # one of them is at fault: each by itself
                self._make({name: orders[name]}, tell, found)

    def prepared(self, order: Pictures) -> list[Prepared]:
        """An order's pictures, ready to be sampled; raises as ``prepare`` does."""
        used = {asked.name: self.control(asked.name) for asked in order.request.controls}
        ready = prepare(self.base, order.requests(), {name: saved for name, (saved, _) in used.items()})
        told = [note for _, notes in used.values() for note in notes]
        notes = tuple(dict.fromkeys([*told, *(note for one in ready for note in one.notes)]))
        return [replace(one, notes=notes) for one in ready]

    def control(self, name: str) -> tuple[SavedControl, list[str]]:
        """A control by the name it is listed under, and notes on it; the last few stay in memory."""
        if name not in self.entries:
            raise NotFound(f'There is no control "{name}": {nearest(name, self.entries)}')
        if name not in self._loaded:
            self._loras.take(())  # some controls take over weights of the base
            entry = self.entries[name]
            while len(self._loaded) >= _KEPT:
                self._loaded.popitem(last=False)
            self._loaded[name] = load(entry.source, self.base, entry.annotator if entry.is_guessed else None)
        self._loaded.move_to_end(name)
        return self._loaded[name]

    def _sample(
        self, orders: Mapping[str, Pictures], prepared: Mapping[str, list[Prepared]], tell: Tell, found: Outcomes
    ) -> None:
        """Sample what is prepared. A job is told of as soon as it ends, whether by itself or because it is given up."""
        began = time.perf_counter()
        ready = [one for name in orders for one in prepared[name]]
        owners = [name for name, order in orders.items() for _ in range(order.count)]
        if not ready:
            return
        self._loras.take(orders[owners[0]].loras)
        following = _Following(ready, owners, tell)
        for name, pictures in following.ended(generate(self.base, ready, BATCH, mixed=True)):
            whole = all(one is not None for one in pictures)
            if whole or orders[name].takes_parts:
                rough = following.unfinished(name)
                made = [rough[i] if one is None else one for i, one in enumerate(pictures)]
                own = list(zip(prepared[name], made, strict=True))
                result = self._write(name, orders[name], own, following.together)
                result |= {"is_whole": whole, "seconds": round(time.perf_counter() - began, 3)}
                found[name] = {"result": result}
            else:
                found[name] = {"cancelled": True}
            following.tell({"ended": {name: found[name]}})

    def _write(
        self, name: str, order: Pictures, made: Sequence[tuple[Prepared, np.ndarray | None]], together: int
    ) -> Result:
        """Write a job's pictures and hints; their files' names, and what is told of them."""
        folder, texts = self.folder / name, list[str]()
        files = list[str]()
        for number, (one, pixels) in enumerate(made):
            if pixels is None:
                continue
            facts = {"base": self.base.name} | self._facts() | {"annotators": one.annotators(), "batch": together}
            asked = one.settled().model_copy(update={"prompt": order.request.prompt})  # with the names of LoRAs
            text = embedded(asked, facts, pixels)
            write_png(folder / f"{number}.png", pixels, **text)
            files.append(f"{number}.png")
            texts.append(text["infotext"])
        first, hints = made[0][0], list[str]()
        for number, control in enumerate(first.controls if order.shows_hints else ()):
            for kind, hint in control.pictures().items():
                write_png(folder / f"hint-{number}{kind and '-'}{kind}.png", hint)
                hints.append(f"hint-{number}{kind and '-'}{kind}.png")
        height, width = first.settings.size or (0, 0)
        told = {"pictures": files, "hints": hints, "texts": texts, "notes": list(first.notes)}
        return told | {"width": width, "height": height}

    # --- hints and figures ----------------------------------------------------------------------------------------

    def _annotate(self, name: str, order: Annotation) -> Result:
        spec = annotator(order.annotator).spec(**order.options)
        assert isinstance(order.picture, np.ndarray)
        size = order.picture.shape[:2]
        if order.side:
            scale = order.side / min(size)
            size = (max(round(size[0] * scale), 1), max(round(size[1] * scale), 1))
        [hint] = annotate_all([order.picture], spec, size, self.base.device.type)
        write_png(self.folder / name / "0.png", hint)
        return {"pictures": ["0.png"], "width": size[1], "height": size[0]}

    def _evaluate(self, name: str, order: Evaluation, tell: Tell) -> Result:
        from controlkit.measure import EvaluationPlan, ceiling_of, evaluate_base, heldout_for, judge, metric_of
        from controlkit.sample import ControlRequest

        self._loras.take(())
        saved, notes = self.control(order.control)
        if saved.branch.hint_types:
            raise Unsupported(f'"{order.control}" is a Union: measure one of its types.')
        metric_of(saved.hint)
        told = saved.trained_on["size"]
        base = self.base.of_size(told) if told and saved.is_own else self.base
        pairs, real = heldout_for(saved, base.size, order.num)
        control = ControlRequest(name=order.control, scale=order.scale, hint_cfg_scale=saved.hint_cfg_scale)
        plan = EvaluationPlan(control, saved.hint, pairs, order.steps, order.guidance)
        total, done = 2 * 3 * len(pairs) * order.steps, 0  # the second half where control is found alone: see judge

        def advanced(count: int) -> None:
            nonlocal done
            done += count
            if name in tell({"step": done, "steps": total, "shares": {name: min(done / total, 1.0)}}):
                raise _Stopped

        make = maker(base, {order.control: saved}, on_step=advanced)
        report = evaluate_base(base, make, plan, real)
        judge(make, plan, report, ceiling_of(base))
        return {"report": report, "notes": notes}


class _Following:
    """A run of several jobs' pictures, followed: news for each step, and each job's pictures when it ends."""

    def __init__(self, ready: Sequence[Prepared], owners: Sequence[str], tell: Tell) -> None:
        """``owners``: the id of each picture's job."""
        self._ready, self._owners, self._tell = ready, owners, tell
        self._totals = Counter[str]()
        for one, owner in zip(ready, owners, strict=True):
            self._totals[owner] += one.steps
        self._done = Counter[str]()
        self._left = list(dict.fromkeys(owners))
        """Jobs that have not ended."""
        self._given_up: set[str] = set()
        self._last = dict[tuple[int, ...], Step]()
        """The last step of each batch, by its pictures' places."""
        self._shown = dict[tuple[int, ...], float]()
        self.together = 1
        """How many pictures were made at once."""

    def tell(self, news: Mapping[str, Any]) -> None:
        """Tell news, and note the jobs of which nobody wants the rest."""
        self._given_up.update(self._tell(dict(news)))

    def ended(self, records: Generator[Step | Picture, None, None]) -> Iterator[tuple[str, list[np.ndarray | None]]]:
        """Each job as it ends, with its pictures: None for one that is not finished, as nobody wants the rest.

        Where nobody wants the rest of any job, nothing more is computed.
        """
        made = list[np.ndarray | None]()
        for record in records:
            if isinstance(record, Picture):
                made.append(record.pixels)
            else:
                self._advanced(record, tuple(len(made) + place for place in record.places))
            for name in list(self._left):
                places = [place for place, owner in enumerate(self._owners) if owner == name]
                if len(made) > places[-1] or name in self._given_up:
                    self._left.remove(name)
                    yield name, [made[place] if place < len(made) else None for place in places]
            if not self._left:
                records.close()

    def _advanced(self, step: Step, places: tuple[int, ...]) -> None:
        """Tell of a step, to those whose jobs have not ended."""
        owners = [self._owners[place] for place in places]
        self._done.update(owners)
        self.together, self._last[places] = step.together, step
        shares = {owner: self._done[owner] / self._totals[owner] for owner in owners if owner in self._left}
        news: dict[str, Any] = {"step": step.step, "steps": step.steps, "shares": shares}
        if shares and time.perf_counter() - self._shown.get(places, 0.0) > _PREVIEWS:
            firsts = dict(reversed([*zip(owners, step.preview(), strict=True)]))
            news["previews"] = {owner: png_bytes(firsts[owner]) for owner in shares}
            self._shown[places] = time.perf_counter()
        self.tell(news)

    def unfinished(self, name: str) -> list[np.ndarray | None]:
        """The pictures of a job as they are after the last step, at their full size; None where there was no step."""
        rough = dict[int, np.ndarray]()
        for places, step in self._last.items():
            if any(self._owners[place] == name for place in places):
                rough |= zip(places, step.preview(), strict=True)
        found = [(rough.get(i), self._ready[i].settings.size) for i, owner in enumerate(self._owners) if owner == name]
        return [pixels if pixels is None or size is None else stretch(pixels, size) for pixels, size in found]


def _failed(error: UserError) -> Result:
    return {"fault": type(error).__name__, "error": str(error)}


def _outcome(work: Callable[..., Result], *values: Any) -> Result:
    try:
        return {"result": work(*values)}
    except _Stopped:
        return {"cancelled": True}
    except UserError as error:
        return _failed(error)
