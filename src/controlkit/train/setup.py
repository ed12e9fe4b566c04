"""What a recipe asks for: pairs, hints, the branch to train, and the plan in words."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from controlkit.annotators import ANNOTATORS, contract
from controlkit.backbones import UNetBase
from controlkit.branch import ControlBranch, ControlSpec
from controlkit.data import (
    CirclePairs,
    EmojiPairs,
    Pair,
    ScenePairs,
    TypedPairs,
    split_folder,
)
from controlkit.errors import UserError, nearest
from controlkit.formats import load_control
from controlkit.images import Hint
from controlkit.precision import number_format
from controlkit.recipe import ControlRecipe, Recipe
from controlkit.union import TYPES


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


def new_branch(
    recipe: Recipe,
    base: UNetBase,
    contracts: Mapping[str, Hint],
    begin: bool = True,
    on_note: Callable[[str], None] = lambda note: None,
) -> ControlBranch:
    """The branch a recipe asks for, with the weights it starts from; without them where ``begin`` is False.

    ``on_note`` is told where those were trained on another base or on other hints.
    """
    torch.manual_seed(recipe.seed)
    control = recipe.control
    spec = ControlSpec(control.body, control.join, control.taps)
    branch = base.new_union() if control.types else base.new_branch(spec, contracts[""].channels)
    if control.start_from and begin:
        _begin_with(branch, control.start_from, base, contracts, on_note)
    return branch.train()


def _begin_with(
    branch: ControlBranch,
    name: str,
    base: UNetBase,
    contracts: Mapping[str, Hint],
    on_note: Callable[[str], None],
) -> None:
    """Begin with the weights of a control of the same kind.

    One of the middle alone is reconnected (the paper's small-scale recipe): the joins it lacks stay zero.
    """
    saved = load_control(name, base)
    neighbour = saved.branch
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
    trained_on = saved.trained.get("base_digest")
    if trained_on and base.dtype != torch.bfloat16 and trained_on != base.digest:  # bfloat16's rounding gives another
        on_note(
            f'the control "{name}" was trained on other weights ({trained_on}) than those of "{base.name}" '
            f"({base.digest})"
        )
    for kind, ours in contracts.items():
        theirs = saved.hints.get(kind, ours) if kind else saved.hint
        if (before := _told(theirs)) != (now := _told(ours)):
            on_note(f'the control "{name}" was trained on hints of {before}; this run trains on hints of {now}')


def _told(contract: Hint) -> str:
    """What a contract's hints are, in words: their annotator and range, and their colours where those are not usual."""
    colours = f" {contract.colour_order}" if contract.colour_order != "RGB" else ""
    return f"{contract.annotator or 'no name'} [{contract.low:g}, {contract.high:g}]{colours}"


def plan_of(recipe: Recipe, base: UNetBase, branch: ControlBranch, contracts: Mapping[str, Hint], pairs: int) -> str:
    """What a run is about to do, in one sentence: to be read before it is waited for."""
    learning = sum(p.numel() for p in branch.parameters() if p.requires_grad)
    hints = ", ".join(
        _told(replace(contract, annotator=kind or contract.annotator)) for kind, contract in contracts.items()
    )
    often = recipe.steps * (recipe.batch // recipe.draws) / max(pairs, 1)
    return (
        f"{learning / 1e6:.2f}M parameters learn hints of {hints} for {base.name}: {pairs:,} pairs, {often:.1f} times "
        f"each, in {recipe.steps:,} steps of {recipe.batch} rows; {recipe.prompt_dropout:.0%} of prompts dropped; "
        f"{number_format(base.device.type)}, {recipe.optimizer}, rate {recipe.lr:g}"
    )
