"""Set up what a recipe describes: hints, pairs, the branch to train; and the run in words."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from controlkit.annotators import contract, grounds_of, joined, kind_of, kind_or_bare, names_of, parts_of
from controlkit.backbones import Backbone
from controlkit.branch import ControlBranch, ControlNetwork, ControlSpec
from controlkit.controls import TYPES, MultiBranch, new_control, new_union, start_from
from controlkit.data import (
    Cached,
    CirclePairs,
    EmojiPairs,
    Pair,
    ScenePairs,
    TypedPairs,
    bucket_sizes,
    folder_of,
    split_folder,
)
from controlkit.errors import Invalid, Mismatch, NotFound, Unsupported, nearest
from controlkit.formats import SavedControl
from controlkit.images import HintSpec
from controlkit.precision import number_format
from controlkit.sample import load
from controlkit.train.parts import DataPlan, Resolved
from controlkit.train.recipe import ControlRecipe, Recipe

DRAWN = ("emoji", "scenes", "world", "fill50k")
"""Sources that are made here, not read from a folder."""


def resolve(recipe: Recipe) -> Resolved:
    """Take a recipe apart. Raises ``Invalid`` or ``Unsupported`` for hints that cannot be made."""
    return Resolved.of(recipe, hint_specs(recipe.control))


def training_pairs(plan: DataPlan, base: Backbone) -> tuple[Sequence[Pair], Sequence[Pair]]:
    """Find or draw the pairs to train on, and the held-out pairs to measure on.

    Raises ``NotFound`` without such a source; ``Invalid``, ``Mismatch`` or ``Unsupported`` where its hints or sizes do
    not fit.
    """
    data, source = plan.data, plan.data.source
    if source in DRAWN and Path(source).is_dir():
        warnings.warn(f'"{source}" was taken for what is drawn here; write ./{source} for that folder', stacklevel=2)
    if data.buckets and source in DRAWN:
        raise Unsupported(f"data.buckets is for pictures of many shapes in a folder; those of {source} are square.")
    if data.columns and source in DRAWN:
        raise Invalid(f"data.columns names a folder's columns; {source} has none.")
    if source in ("emoji", "scenes", "world"):
        return _world_pairs(plan, base.size)
    if plan.control.types:
        raise Mismatch(f'A Union learns from data.source emoji, scenes or world; "{source}" has hints of one type.')
    if source == "fill50k":
        count = data.count or 50_000
        return CirclePairs(base.size, count, plan.seed), CirclePairs(base.size, plan.heldout, plan.seed, first=count)
    return _folder_pairs(plan, base)


def _world_pairs(plan: DataPlan, size: int) -> tuple[Sequence[Pair], Sequence[Pair]]:
    data, num, seed = plan.data, plan.heldout, plan.seed
    seen: list[Sequence[Pair]] = []
    heldout: list[Sequence[Pair]] = []
    visits = []
    if data.source in ("emoji", "world"):
        seen.append(EmojiPairs(size, "control", data.variants, seed, data.count))
        heldout.append(EmojiPairs(size, "heldout_concepts", seed=seed, count=num))
        visits.append(1)
    if data.source in ("scenes", "world"):
        seen.append(ScenePairs(size, data.scenes, seed, count=data.count))
        heldout.append(ScenePairs(size, data.scenes, seed, heldout=True, count=num))
        visits.append(data.visits)
    types = plan.control.types
    return TypedPairs(seen, types or [""], visits), TypedPairs(heldout, types, [4] * 2) if types else heldout[0]


def _folder_pairs(plan: DataPlan, base: Backbone) -> tuple[Sequence[Pair], Sequence[Pair]]:
    data, spec = plan.data, plan.specs[""]
    if not (place := folder_of(data.source)).is_dir():
        raise NotFound(f'data.source is "{data.source}", which is no folder: {nearest(data.source, DRAWN)}')
    folder, held = split_folder(place, base.size, grounds_of(spec), data.columns)
    names = plan.control.annotators or [plan.control.annotator]
    if folder.hints > 1 and folder.hints != len(names):
        raise Mismatch(
            f"{data.source} has {folder.hints} hints a row, and the recipe names {', '.join(names)}: list as many in "
            "control.annotators, in their order, or take the others out."
        )
    if not folder.hints and (unmade := [name for name in names if not kind_or_bare(name).is_made_here]):
        reason = f'nothing here makes hints of "{unmade[0]}"' if unmade[0] else "nobody says which hints to make"
        raise Unsupported(
            f"{data.source} has pictures and no hints, and {reason}: set control.annotator (--annotator, beside flags "
            f"of train_controlnet.py) to one of {', '.join(names_of(lambda kind: kind.is_made_here))}."
        )
    folder = folder.part(slice(data.count))
    folder.check_hints(spec)
    if data.buckets:
        folder = folder.bucketed(bucket_sizes(base.size, base.multiple))
    return folder, held.part(slice(-plan.heldout, None))  # farthest from the trained ones, should the folder grow


def hint_specs(control: ControlRecipe) -> dict[str, HintSpec]:
    """Make the contracts of the hints to train on: by type for a Union, else one under "".

    Raises ``Unsupported`` for options of hints that nothing here makes, ``Invalid`` for what a Union does not have.
    """
    if not control.types:
        if control.options and (control.annotators or not kind_or_bare(control.annotator).is_made_here):
            names = "+".join(control.annotators) or control.annotator
            raise Unsupported(f"Nothing here makes hints of {names} with options: leave out control.options.")
        if control.annotators:
            hint = joined(control.annotators)
        else:
            name, options = control.annotator, control.options
            hint = kind_of(name).spec(**options) if options else contract(name)
        return {"": replace(hint, channels=control.channels or hint.channels, low=control.low, high=control.high)}
    plain = ControlRecipe()
    words = {"annotator", "annotators", "options", "channels", "low", "high"}
    words |= {"body", "rank", "size_ratio", "join", "taps"}
    if changed := [word for word in sorted(words) if getattr(control, word) != getattr(plain, word)]:
        raise Invalid(f"A Union has no control.{changed[0]}: with control.types it is the paper's copy, all of it.")
    if unknown := [kind for kind in control.types if kind not in TYPES]:
        raise Invalid(f'control.types has "{unknown[0]}": {nearest(unknown[0], TYPES)}')
    return {kind: contract(kind) for kind in control.types}


def new_branch(
    control: ControlRecipe,
    specs: Mapping[str, HintSpec],
    base: Backbone,
    seed: int = 0,
    begin: bool = True,
    on_note: Callable[[str], None] = lambda note: None,
) -> ControlNetwork:
    """Make the branch to train, with the weights it starts from; without them where ``begin`` is False.

    ``on_note`` gets a sentence where those were trained on another base or on other hints. Raises ``NotFound`` and
    ``Mismatch`` for a control that cannot be started from.
    """
    torch.manual_seed(seed)
    spec = ControlSpec(control.body, control.join, control.taps, rank=control.rank if control.body == "lora" else 0)
    fresh: ControlNetwork
    if control.types:
        fresh = new_union(base)
    elif control.hints_as == "branches":
        each = {part.annotator: new_control(base, spec, part.channels) for part in parts_of(specs[""])}
        fresh = MultiBranch(cast("dict[str, ControlBranch]", each))  # the recipe allows no other body
    else:
        fresh = new_control(base, spec, specs[""].channels, control.size_ratio)
    if control.start_from and begin:
        for name, branch in fresh.parts().items():
            neighbour = str(Path(control.start_from) / name) if name else control.start_from
            saved, notes = load(neighbour, base)
            start_from(branch, saved.branch, neighbour)
            for note in (*notes, *_other_hints(neighbour, saved, own_specs(specs, name))):
                on_note(note)
    return fresh.train()


def own_specs(specs: Mapping[str, HintSpec], name: str) -> Mapping[str, HintSpec]:
    """The contracts of one of a run's controls (``ControlNetwork.parts``)."""
    if not name:
        return specs
    [own] = [part for part in parts_of(specs[""]) if part.annotator == name]
    return {"": own}


def _other_hints(name: str, saved: SavedControl, specs: Mapping[str, HintSpec]) -> Iterator[str]:
    """Sentences on how the hints of a control to start from differ from the run's."""
    for kind, ours in specs.items():
        theirs = saved.hints.get(kind, ours) if kind else saved.hint
        if (before := _describe_spec(theirs)) != (now := _describe_spec(ours)):
            yield f'the control "{name}" was trained on hints of {before}; this run trains on hints of {now}'


def _describe_spec(spec: HintSpec) -> str:
    """A contract's annotator, range and, where not RGB, order of colours in words."""
    colours = f" {spec.colour_order}" if spec.colour_order != "RGB" else ""
    return f"{spec.annotator or 'no name'} [{spec.low:g}, {spec.high:g}]{colours}"


def describe_buckets(cached: Sequence[Cached], batch: int) -> str:
    """A sentence on how many pictures have which size, and which sizes have fewer than a ``batch`` of pairs."""
    sizes = ", ".join(f"{one.size[1]}x{one.size[0]} {len(one):,}" for one in cached)
    thin = sum(len(one) < batch for one in cached)
    often = f"; {thin} of them with fewer than a batch, which wait until one is full" if thin else ""
    return f"pictures in {len(cached)} sizes: {sizes}{often}"


def describe_run(plan: Resolved, base: Backbone, branch: ControlNetwork, pairs: int, processes: int = 1) -> str:
    """A sentence on what a run is about to do; ``pairs``: how many it trains on."""
    learning = sum(p.numel() for p in branch.parameters() if p.requires_grad)
    specs = [replace(spec, annotator=kind or spec.annotator) for kind, spec in plan.specs.items()]
    hints = ", ".join(map(_describe_spec, specs))
    batches, rates = plan.batches, plan.rates
    limit = f" (or {rates.max_minutes:g} minutes)" if rates.max_minutes else ""
    visits = rates.steps * batches.pairs / max(pairs, 1)
    usual = "" if "lr" in plan.recipe.model_fields_set else f" (the default for {plan.recipe.base}; `lr` sets it)"
    return (
        f"{learning / 1e6:.2f}M parameters learn hints of {hints} for {base.name}: {pairs:,} pairs, "
        f"{visits:.1f} times each, in {rates.steps:,} steps{limit} of {batches.batch} rows; "
        f"{batches.prompt_dropout:.0%} of prompts dropped; {number_format(base.device.type)}, "
        f"{plan.learning.optimizer}, rate {rates.lr:g}{usual}; {processes} process{'es' if processes > 1 else ''}"
    )
