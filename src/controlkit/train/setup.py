"""What a recipe asks for: pairs, hints, the branch to train, and the plan in words."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from controlkit.annotators import contract, joined, kind_of, kind_or_bare, names_of, parts_of
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
from controlkit.errors import UserError, nearest
from controlkit.formats import SavedControl, load_control
from controlkit.images import HintSpec
from controlkit.precision import number_format
from controlkit.train.recipe import ControlRecipe, Recipe

DRAWN = ("emoji", "scenes", "world", "fill50k")
"""Sources that are no folders."""


def training_pairs(recipe: Recipe, base: Backbone) -> tuple[Sequence[Pair], Sequence[Pair]]:
    """(pairs to train on, held-out pairs to measure obedience on)."""
    data, num = recipe.data, recipe.evaluation.num
    if data.buckets and data.source in DRAWN:
        raise UserError(f"data.buckets is for pictures of many shapes in a folder; those of {data.source} are square.")
    if data.columns and data.source in DRAWN:
        raise UserError(f"data.columns names a folder's columns; {data.source} has none.")
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
    if not (place := folder_of(data.source)).is_dir():
        raise UserError(f'data.source is "{data.source}", which is no folder: {nearest(data.source, DRAWN)}')
    masked = hints_of(recipe)[""].mask_value is not None
    folder, held = split_folder(place, base.size, masked, data.columns)
    names = recipe.control.annotators or [recipe.control.annotator]
    if folder.hints > 1 and folder.hints != len(names):
        raise UserError(
            f"{data.source} has {folder.hints} hints a row, and the recipe names {', '.join(names)}: list as many in "
            "control.annotators, in their order, or take the others out."
        )
    if not folder.hinted and (unmade := [name for name in names if not kind_or_bare(name).makes]):
        raise UserError(
            f"{data.source} has pictures and no hints, and nothing here makes hints of "
            f'"{unmade[0]}": set control.annotator to one of {", ".join(names_of(lambda kind: kind.makes))}.'
        )
    folder = folder.part(slice(data.count))
    folder.check_hints(hints_of(recipe)[""])
    if data.buckets:
        folder = folder.bucketed(bucket_sizes(base.size, base.multiple))
    return folder, held.part(slice(-num, None))  # farthest from what is trained on, should the folder grow


def hints_of(recipe: Recipe) -> dict[str, HintSpec]:
    """The contracts of a recipe's hints: by type for a Union, else one under ""."""
    control = recipe.control
    if not control.types:
        if control.options and (control.annotators or not kind_or_bare(control.annotator).makes):
            names = "+".join(control.annotators) or control.annotator
            raise UserError(f"Nothing here makes hints of {names} with options: leave out control.options.")
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
        raise UserError(f"A Union has no control.{changed[0]}: with control.types it is the paper's copy, all of it.")
    if unknown := [kind for kind in control.types if kind not in TYPES]:
        raise UserError(f'control.types has "{unknown[0]}": {nearest(unknown[0], TYPES)}')
    return {kind: contract(kind) for kind in control.types}


def new_branch(
    recipe: Recipe,
    base: Backbone,
    contracts: Mapping[str, HintSpec],
    begin: bool = True,
    on_note: Callable[[str], None] = lambda note: None,
) -> ControlNetwork:
    """The branch a recipe asks for, with the weights it starts from; without them where ``begin`` is False.

    ``on_note`` is told where those were trained on another base or on other hints.
    """
    torch.manual_seed(recipe.seed)
    control = recipe.control
    spec = ControlSpec(control.body, control.join, control.taps, rank=control.rank if control.body == "lora" else 0)
    fresh: ControlNetwork
    if control.types:
        fresh = new_union(base)
    elif control.hints_as == "branches":
        each = {part.annotator: new_control(base, spec, part.channels) for part in parts_of(contracts[""])}
        fresh = MultiBranch(cast("dict[str, ControlBranch]", each))  # the recipe has seen to it that all are such
    else:
        fresh = new_control(base, spec, contracts[""].channels, control.size_ratio)
    if control.start_from and begin:
        for name, branch in fresh.parts().items():
            neighbour = str(Path(control.start_from) / name) if name else control.start_from
            saved = load_control(neighbour, base)
            start_from(branch, saved.branch, neighbour)
            rules = own_contracts(contracts, name)
            for note in _differences(neighbour, saved, base, rules):
                on_note(note)
    return fresh.train()


def own_contracts(contracts: Mapping[str, HintSpec], name: str) -> Mapping[str, HintSpec]:
    """The contracts of one of a run's controls (``ControlNetwork.parts``)."""
    if not name:
        return contracts
    [own] = [part for part in parts_of(contracts[""]) if part.annotator == name]
    return {"": own}


def _differences(name: str, saved: SavedControl, base: Backbone, contracts: Mapping[str, HintSpec]) -> Iterator[str]:
    """Where a control that a run starts from was trained on another base, or on other hints, than the run."""
    trained_on = saved.trained.get("base_digest")
    if trained_on and base.dtype != torch.bfloat16 and trained_on != base.digest:  # bfloat16's rounding gives another
        yield f'the control "{name}" was trained on other weights ({trained_on}) than "{base.name}" ({base.digest})'
    for kind, ours in contracts.items():
        theirs = saved.hints.get(kind, ours) if kind else saved.hint
        if (before := _describe_spec(theirs)) != (now := _describe_spec(ours)):
            yield f'the control "{name}" was trained on hints of {before}; this run trains on hints of {now}'


def _describe_spec(contract: HintSpec) -> str:
    """What a contract's hints are, in words: their annotator and range, and their colours where those are not usual."""
    colours = f" {contract.colour_order}" if contract.colour_order != "RGB" else ""
    return f"{contract.annotator or 'no name'} [{contract.low:g}, {contract.high:g}]{colours}"


def buckets_in_words(cached: Sequence[Cached], recipe: Recipe) -> str:
    """How many pictures are of which size, and which are too few to fill a batch each time round."""
    batch = recipe.batch // recipe.noises_per_pair
    sizes = ", ".join(f"{one.size[1]}x{one.size[0]} {len(one):,}" for one in cached)
    thin = sum(len(one) < batch for one in cached)
    often = f"; {thin} of them with fewer than a batch, which wait until one is full" if thin else ""
    return f"pictures in {len(cached)} sizes: {sizes}{often}"


def plan_of(
    recipe: Recipe, base: Backbone, branch: ControlNetwork, contracts: Mapping[str, HintSpec], pairs: int
) -> str:
    """What a run is about to do, in one sentence: to be read before it is waited for."""
    learning = sum(p.numel() for p in branch.parameters() if p.requires_grad)
    hints = ", ".join(
        _describe_spec(replace(contract, annotator=kind or contract.annotator)) for kind, contract in contracts.items()
    )
    often = recipe.steps * (recipe.batch // recipe.noises_per_pair) / max(pairs, 1)
    return (
        f"{learning / 1e6:.2f}M parameters learn hints of {hints} for {base.name}: {pairs:,} pairs, {often:.1f} times "
        f"each, in {recipe.steps:,} steps of {recipe.batch} rows; {recipe.prompt_dropout:.0%} of prompts dropped; "
        f"{number_format(base.device.type)}, {recipe.optimizer}, rate {recipe.lr:g}"
    )
