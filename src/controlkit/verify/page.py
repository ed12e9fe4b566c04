"""A verification as one HTML file: checks, figures, obedience, and the facts they depend on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from controlkit.files import mark_output, write_atomic
from controlkit.measure import obedience_tables, picture_rows, shown
from controlkit.pages import Figure, Section, Table, render
from controlkit.verify.checks import Compared
from controlkit.verify.run import Verification

_PROMPTS = ("no prompt", "insufficient", "conflicting", "perfect")
_TITLE = "ControlKit: verification of a base and a control"


def page_of(done: Verification) -> str:
    """The page."""
    checks = [[one.state, one.name, one.measured, one.expected] for one in done.checks]
    body: list[str | Table | Section] = [done.subject.note] if done.subject.note else []
    body.append(Section("The four prompts of the paper's Figure 8, and no prompt in guess mode", _prompts(done)))
    if done.subject.spec:
        body.append(Section("Scales of the control", _scales(done)))
    if done.report and done.evaluation and done.recorded:
        body += obedience_tables(done.report)
        made = done.recorded.by_way(done.evaluation)
        body.append(picture_rows(done.evaluation, made, done.reconstruct))
    body.append(Table(["result", "check", "measured", "expected"], checks))
    body.append(Table(["fact", "value"], [*_flat(done.facts)]))
    return render(_TITLE, done.sentence(), body)


def _rows(done: Verification, roles: Sequence[str]) -> list[list[Figure | None]]:
    """For each pair a row: its hint and truth, then its shots of these roles."""
    rows = []
    pairs = sorted({one.shot.pair for one in done.compared})
    for pair in pairs:
        own = {one.shot.role: one for one in done.compared if one.shot.pair == pair}
        row: list[Figure | None] = []
        asked = next((one.shot.request.controls[0] for one in own.values() if one.shot.request.controls), None)
        if asked and done.subject.spec:
            row.append(shown(done.subject.spec.picture(asked.images[""]), "hint"))  # type: ignore[arg-type]  # an array
        row += [shown(done.subject.pairs[pair].picture, f"truth: {done.subject.pairs[pair].prompt}"), None]
        rows.append([*row, *(_figure(own[role]) for role in roles if role in own)])
    return rows


def _figure(one: Compared) -> Figure | None:
    if one.pixels is None:
        return None
    distance = f"{one.distance:.0e} from diffusers" if one.distance is not None else ""
    return shown(one.pixels, f"{one.shot.role} {distance}".strip())


def _prompts(done: Verification) -> list[list[Figure | None]]:
    return _rows(done, [*_PROMPTS, "guess mode"])


def _scales(done: Verification) -> list[list[Figure | None]]:
    return _rows(done, ["no control", "scale 0", "scale 0.5", "perfect", "scale 1.5"])


def _flat(facts: Mapping[str, Any], above: str = "") -> Sequence[list[str]]:
    """Facts within facts as rows, their names joined."""
    rows: list[list[str]] = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{above}{name}, ")
        elif name != "taps":
            rows.append([f"{above}{name}".replace("_", " "), str(value)])
    return rows


def write_verification(out: Path, done: Verification) -> None:
    """Write ``OUT/verify.html`` and ``OUT/verify.json``."""
    mark_output(out, "verify")
    write_atomic(out / "verify.json", done.to_json().encode())
    write_atomic(out / "verify.html", page_of(done).encode())
