"""The figures of ``generation_figures.py`` as tables in Markdown, and as a curve."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from controlkit.files import write_atomic

Report = Mapping[str, Any]
COLOURS = ("#24527a", "#c0392b", "#2e8b57", "#b8860b")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def obeyed(one: Report) -> str:
    """A condition's obedience with its interval; "" without control."""
    if "obedience" not in one:
        return ""
    mean, low, high = (one["obedience"][end] for end in ("mean", "low", "high"))
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]" + ("" if one["is_meaningful"] else " (does not count)")


def share(one: Report) -> str:
    """A condition's share of the first condition's, in percent, with its interval; "" of the first itself."""
    if "share" not in one or one["share"]["low"] == one["share"]["high"]:
        return ""
    return "{mean:.0%} [{low:.0%}, {high:.0%}]".format(**one["share"])


def quality(one: Report) -> list[str]:
    """CLIP-score, FID, and whether quality was kept; "" for what is compared with."""
    kept = {True: "yes", False: "no", None: ""}[one.get("quality_kept")]
    return [f"{one['clip_score']['mean']:.2f}", f"{one['fid']['mean']:.1f}", kept]


def _together(report: Report) -> str:
    rows = [
        [name, used, obeyed(one), share(one), *quality(one)]
        for name, found in report["pose, depth"].items()
        for used, one in found.items()
    ]
    return table(("control", "used", "obedience", "of alone", "CLIP-score", "FID", "quality kept"), rows)


def _unprompted(report: Report) -> str:
    rows = [
        [name, used, obeyed(one), share(one), *quality(one)]
        for name, found in report.items()
        for used, one in found.items()
    ]
    return table(("control", "hint counted", "obedience", "of both halves", "CLIP-score", "FID", "quality kept"), rows)


def _half_silent(report: Report) -> str:
    names = list(next(iter(report.values())))
    rows = [
        [*pair.split(", "), obeyed(found[names[0]]), *(share(found[name]) for name in names[1:])]
        for pair, found in report.items()
    ]
    return table(("control", "the other", f"obedience {names[0]}", *names[1:]), rows)


def _in_a_hole(report: Report) -> str:
    ways = ("with all of it", "in a hole")
    rows = [
        [name, *(obeyed(found[way]) for way in ways), f"{found['outside']['share_of_values_changed']:.2%}"]
        for name, found in report.items()
    ]
    return table(("control", *(f"obedience {way}" for way in ways), "values changed outside"), rows)


def _by_steps(report: Report) -> str:
    steps = [name for name in next(iter(report.values())) if name.isdigit()]

    def cell(one: Report) -> str:
        fell = "" if one["quality_kept"] else " (fell)"
        return f"{one['obedience']['mean']:.2f}, {one['fid']['mean']:.1f}{fell}"

    rows = [[scheduler, *(cell(found[n]) for n in steps)] for scheduler, found in report.items()]
    return table(("obedience, FID (quality)", *(f"{n} steps" for n in steps)), rows)


def _by_speed(report: Report) -> str:
    rows = [
        [name, used, obeyed(one), share(one), *quality(one), f"{one['seconds']:.2f}" if "seconds" in one else ""]
        for name, found in report.items()
        for used, one in found.items()
    ]
    head = ("control", "speed", "obedience", "of exact", "CLIP-score", "FID", "quality kept", "seconds a picture")
    return table(head, rows)


def _seams(report: Report) -> str:
    conditions = ("tiles", "tiles cut hard")
    rows = [
        [name, *("{mean:.2f} [{low:.2f}, {high:.2f}]".format(**found[condition]) for condition in conditions)]
        for name, found in report.items()
    ]
    return table(("control", *conditions), rows)


TABLES: dict[str, Callable[[Report], str]] = {
    "together": _together,
    "unprompted": _unprompted,
    "half_silent": _half_silent,
    "in_a_hole": _in_a_hole,
    "by_steps": _by_steps,
    "by_speed": _by_speed,
    "seams": _seams,
}


def tables(report: Report) -> str:
    """All figures that a report has, as tables in Markdown, an empty line between them."""
    return "\n\n".join(write(report[name]) for name, write in TABLES.items() if report.get(name))


def curve(report: Report, path: Path) -> None:
    """Write obedience and FID of each scheduler over steps, as an SVG file: the same bytes of the same figures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.hashsalt": "steps", "svg.fonttype": "none"}):
        figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
        for axis, key in zip(axes, ("obedience", "fid"), strict=True):
            for colour, (scheduler, found) in zip(COLOURS, report.items(), strict=False):
                steps = [int(name) for name in found if name.isdigit()]
                mean, low, high = ([found[str(n)][key][end] for n in steps] for end in ("mean", "low", "high"))
                axis.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
                axis.plot(steps, mean, "o-", color=colour, markersize=3, label=scheduler)
            axis.set(xscale="log", xlabel="steps", ylabel=key if key == "obedience" else "FID")
            axis.set_xticks(steps, [str(n) for n in steps])
            axis.minorticks_off()
        axes[0].legend(frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        plt.close(figure)
    write_atomic(path, buffer.getvalue())
