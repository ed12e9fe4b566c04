"""Evaluation of a control: its figures, its verdict, and tests of it beside a prompt or another control."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from controlkit.cli.shared import (
    BaseOption,
    ColumnOption,
    DeviceOption,
    GuidanceOption,
    LoraOption,
    StepsOption,
    VaeOption,
    loaded_base,
    loaded_control,
    parse_columns,
    progress_bars,
    say,
    say_table,
    split_lora,
    warn,
)
from controlkit.errors import Invalid, Unsupported

if TYPE_CHECKING:
    from controlkit.backbones import Backbone
    from controlkit.formats import SavedControl
    from controlkit.measure import EvaluationPlan, Maker, QualityReferee

app = typer.Typer()
PUBLIC = "public"
"""The referee of ``measure.public``, as ``--referee`` names them."""


@app.command(
    epilog="Examples:\n\n    controlkit evaluate canny --num 64 --json canny.json\n\n"
    "    controlkit evaluate runs/canny --report canny.html --against-prompt --silent depth\n\n"
    "    controlkit evaluate control.safetensors --base sd15 --data pictures --annotator canny --referee public "
    "--protocol controlnet++ --size 512"
)
def evaluate(
    control: Annotated[str, typer.Argument(help="A shipped control, a control folder, or a run's folder.")],
    base: BaseOption = "mini",
    num: Annotated[int, typer.Option(help="Pictures to measure on.", min=2)] = 64,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
    report_file: Annotated[
        Path | None,
        typer.Option("--report", help="Write a page here: figures, verdict and pictures, as one HTML file."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="`emoji`, `scenes`, `fill50k` or a folder; by default what the control was trained on, if it was here."
        ),
    ] = None,
    column: ColumnOption = None,
    size: Annotated[
        int | None,
        typer.Option(
            help="Side of the pictures in pixels; by default what the control was trained on, if it was here, or the "
            "base's.",
            min=1,
            max=16_384,
        ),
    ] = None,
    annotator: Annotated[
        str | None, typer.Option(help="What makes the hints of a control that does not say it itself.")
    ] = None,
    scale: Annotated[float, typer.Option(help="Scale of the control: what its residuals are multiplied by.")] = 1.0,
    lora: LoraOption = None,
    vae: VaeOption = None,
    steps: StepsOption = 20,
    guidance: GuidanceOption = 4.0,
    hint_cfg: Annotated[
        float | None,
        typer.Option(help="How many times guidance counts the hint; by default what the control says, or 1."),
    ] = None,
    referee: Annotated[
        str | None,
        typer.Option(
            help="`public`: CLIP ViT-L/14 and B/16, Inception and LAION's aesthetic heads judge quality, by their "
            "public files on this machine; by default the referee of the base's world, if it has one."
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="`controlnet++`: sample as its authors did, 4 pictures each, and give its raw values with floors and "
            "ceiling, too."
        ),
    ] = None,
    quirks: Annotated[
        bool, typer.Option("--quirks", help="Of --protocol: with the faults of the released scorer, as published.")
    ] = False,
    against_prompt: Annotated[
        bool,
        typer.Option("--against-prompt", help="Measure, too, at which scale the hint wins against another's prompt."),
    ] = False,
    silent: Annotated[
        str | None,
        typer.Option(metavar="CONTROL", help="Measure, too, what a second control costs whose hint says nothing."),
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Measure whether a control is obeyed: fidelity, floors, ceiling, obedience; and CLIP-score and FID beside it.

    Held-out pairs, seeds 0..N-1; 95% intervals by a paired bootstrap. Obedience 0 is no control, 1 is all the VAE
    lets through. Ends with a verdict in words; control that is found is measured once more, with other seeds.
    CLIP-score and FID are measured on `mini` and bases tuned from it alone, as the referee knows no others, and where
    it tells the true pictures' captions apart; on others by the public one (`--referee public`).
    """
    from controlkit.files import write_atomic
    from controlkit.measure import (
        EvaluationPlan,
        Recorded,
        ceiling_of,
        evaluate_base,
        evaluation_page,
        heldout_for,
        judge,
        metric_of,
    )
    from controlkit.measure import (
        protocol as protocols,
    )
    from controlkit.precision import settle_threads
    from controlkit.sample import ControlRequest, maker

    for option, file in (("--json", json_file), ("--report", report_file)):
        if file and file.is_dir():
            raise Invalid(f"{option} is {file}, which is a folder; expected a file to write.")
    if protocol not in (None, protocols.NAME) or (quirks and not protocol):
        raise Invalid(f'--protocol is "{protocol}"; expected {protocols.NAME}, alone or with --quirks.')
    model = loaded_base(base, device, loras=[split_lora(text) for text in lora or []], vae=vae)
    settle_threads(model.networks().values())
    saved = loaded_control(control, model, annotator)
    if saved.branch.hint_types:
        raise Unsupported(f'"{control}" is a Union: measure one of its types, as {control}:TYPE.')
    metric_of(saved.hint)
    model = _sized(model, saved, size, control)
    loaded = {control: saved} | ({silent: loaded_control(silent, model)} if silent else {})
    pairs, real = heldout_for(saved, model.size, num, data, parse_columns(column))
    counted = saved.hint_cfg_scale if hint_cfg is None else hint_cfg
    asked = ControlRequest(name=control, scale=scale, hint_cfg_scale=counted)
    plan = EvaluationPlan(asked, saved.hint, pairs, steps, guidance)
    plan = protocols.planned(plan) if protocol else plan
    chosen = _referee(referee, model.device.type)
    with progress_bars() as progress:
        work = 3 * len(plan.pairs) * plan.steps
        task = progress.add_task("measuring", total=work, figures="")

        def advance(count: int) -> None:
            progress.update(task, advance=count, visible=True)

        make = Recorded(maker(model, loaded, on_step=advance))
        report = evaluate_base(model, make, plan, real, referee=chosen)
        task = progress.add_task("with other seeds", total=work, figures="", visible=False)
        judge(make, plan, report, ceiling_of(model))
        if protocol:
            shown = make.by_way(plan) | {"ceiling": ceiling_of(model)([pair.picture for pair in plan.pairs])}
            report["protocol"] = protocols.raw_figures(plan, shown, quirks)
        task = progress.add_task("contests", total=None, figures="", visible=False)
        report |= _contests(make, plan, model, chosen, against_prompt, (silent, loaded[silent]) if silent else None)
    if json_file:
        write_atomic(json_file, (json.dumps(report, indent=2) + "\n").encode())
    if report_file:
        page = evaluation_page(report, plan, make.by_way(plan), ceiling_of(model), f"{control} on {base}")
        write_atomic(report_file, page.encode())
    _show(report, f"{control} on {base}")


def _sized(model: "Backbone", saved: "SavedControl", size: int | None, control: str) -> "Backbone":
    """The base for pictures of a size, or of the one that the control was trained on here."""
    told = saved.trained_on["size"]
    if size or (told and saved.is_own):
        return model.of_size(size or told)
    if told and told != model.size:
        warn(f'the file of "{control}" says that it was trained on {told} pixels; --size has it measured there')
    return model


def _referee(named: str | None, device: str) -> "QualityReferee | None":
    """The referee that is asked for; None for the world's own."""
    if named is None:
        return None
    if named != PUBLIC:
        raise Invalid(f'--referee is "{named}"; expected {PUBLIC}, or nothing.')
    from controlkit.measure.public import PublicReferee

    return PublicReferee(device)


def _contests(
    make: "Maker",
    plan: "EvaluationPlan",
    model: "Backbone",
    chosen: "QualityReferee | None",
    against: bool,
    silent: "tuple[str, SavedControl] | None",
) -> dict[str, Any]:
    """The reports of the contests that are asked for."""
    from controlkit.measure import ceiling_of, unjudgeable, world_of
    from controlkit.measure.contests import Companion, against_prompt, beside_silent
    from controlkit.sample import ControlRequest

    found: dict[str, Any] = {}
    if against:
        world = world_of(model)
        known = chosen or (world.referee(model.device.type) if world else None)
        referee = None if unjudgeable(known, plan.pairs) else known
        found["against_prompt"] = against_prompt(make, plan, ceiling_of(model), referee)
    if silent:
        name, other = silent
        companion = Companion(ControlRequest(name=name, hint_cfg_scale=other.hint_cfg_scale), other.hint)
        found["beside_silent"] = beside_silent(make, plan, ceiling_of(model), companion) | {"silent": name}
    return found


def _show(report: Mapping[str, Any], title: str) -> None:
    """Print a report: a table of its figures; notes and the verdict below it."""
    from controlkit.measure import contest_rows, obedience_tables, protocol_rows

    used = ", ".join(f"{key} {value}" for key, value in report["settings"].items() if value is not None)
    figures = {name: one for name, one in report.items() if isinstance(one, dict) and "mean" in one}
    say_table(
        f"{title}: {report['metric']}, {report['num']} pictures, {report['seconds']:.0f} s",
        ("figure", "mean", "95% interval"),
        ((name, f"{one['mean']:.3f}", f"{one['low']:.3f} to {one['high']:.3f}") for name, one in figures.items()),
        used,
    )
    for table in obedience_tables(report)[1:]:
        say_table(f"beside it: {table.head[0]}", ("figure", *table.head[1:]), table.rows, "")
    for head, rows, caption in (*protocol_rows(report), *contest_rows(report)):
        say_table(head[0], head[1:], rows, caption)
    if report.get("observer"):
        accuracy = ", ".join(f"{name} {value:.3f}" for name, value in report["observer"].items())
        say(f"Read off the pictures by the observer, whose own figures on held-out scenes are: {accuracy}.")
    for note in report.get("notes", []):
        say(note)
    if not report.get("quality_kept", True):
        warn("CLIP-score is under 95% of the lesser of no control and the truth, or FID over 110% of no control")
    say(report["verdict"])
