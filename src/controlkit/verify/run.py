"""A verification: pictures made, compared with diffusers', obedience measured; as a page and as JSON."""

import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from controlkit.backbones import Backbone
from controlkit.controls import KINDS
from controlkit.errors import Unsupported
from controlkit.formats import SavedControl
from controlkit.hub import digest
from controlkit.measure import EvaluationPlan, Reconstruct, Recorded, ceiling_of
from controlkit.measure.bench import machine
from controlkit.precision import number_format, settle_format
from controlkit.sample import ControlRequest, Request, maker
from controlkit.verify.checks import Check, Compared, Comparison, guarded, measure_obedience
from controlkit.verify.peer import Peer
from controlkit.verify.shots import shots_of
from controlkit.verify.subject import Subject, subject_of

CONTROL = "control"
"""The name of the control in requests."""
_LIBRARIES = ("controlkit", "torch", "diffusers", "transformers", "safetensors", "numpy", "opencv-python-headless")


@dataclass(frozen=True)
class VerifyPlan:
    """The settings of a verification."""

    source: str | None = None
    """``subject_of``'s."""
    num: int = 8
    """Pictures to measure obedience on; fewer than 2 measure none."""
    shown: int = 2
    """Pictures to make the figures of."""
    steps: int = 20
    guidance: float = 7.0
    """The paper's."""
    seed: int = 0


@dataclass
class Verification:
    """The results: checks, the pictures, the report on obedience, and the facts they depend on."""

    checks: list[Check]
    compared: list[Compared]
    subject: Subject
    facts: Mapping[str, Any]
    evaluation: EvaluationPlan | None = None
    recorded: Recorded | None = None
    report: dict[str, Any] = field(default_factory=dict)
    reconstruct: Reconstruct = list
    """Pictures out of the base's VAE."""

    @property
    def failed(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.state == "failed"]

    def sentence(self) -> str:
        """The result in words."""
        count = {state: sum(one.state == state for one in self.checks) for state in ("passed", "failed")}
        left = len(self.checks) - sum(count.values())
        more = f", {left} could not be made" if left else ""
        return f"{count['passed']} of {len(self.checks)} checks passed, {count['failed']} failed{more}."

    def to_json(self) -> str:
        """All but the pictures, without paths and names of the machine."""
        pictures = [
            {
                "picture": one.shot.pair + 1,
                "role": one.shot.role,
                "prompt": one.shot.request.prompt,
                "seed": one.shot.request.seed,
                "distance": one.distance,
                "note": one.note,
            }
            for one in self.compared
        ]
        found = {"result": self.sentence(), "checks": [asdict(check) for check in self.checks], "pictures": pictures}
        return json.dumps(found | {"obedience": self.report or None, **self.facts}, indent=1) + "\n"


def verify(
    base: Backbone, control: SavedControl | None, plan: VerifyPlan, on_stage: Callable[[str], None] = lambda name: None
) -> Verification:
    """Verify a base, and a control on it, against diffusers and against the hints.

    ``on_stage`` is told each picture and check that is made. The number format is that of the base's weights from here
    on in this process. Raises as ``subject_of`` does; whatever else goes wrong is a failed check.
    """
    began = time.perf_counter()
    settle_format(base.device.type, str(base.dtype).removeprefix("torch."))
    subject = subject_of(base, control.hint if control else None, plan.source, max(plan.num, plan.shown, 2))
    make = maker(base, {CONTROL: control} if control else {}, batch=1)
    comparison, checks = _comparison(base, control, make), list[Check]()
    settings = Request(steps=plan.steps, guidance=plan.guidance, seed=plan.seed)
    for shot in shots_of(subject.pairs, plan.shown, subject.spec, settings):
        on_stage(shot.name)
        checks.append(comparison.compare(shot))
    rest: dict[str, Callable[[], Check]] = {"decoding": comparison.decoded, "the same again": comparison.again}
    rest["the VAE"] = lambda: comparison.reconstructs([pair.picture for pair in subject.pairs])
    if control:
        rest |= {"a scale of 0": comparison.silent, "whether the control acts": comparison.acts}
    for name, check in rest.items():
        on_stage(name)
        checks.append(guarded(name, check))
    done = Verification(checks, comparison.compared, subject, {}, reconstruct=ceiling_of(base))
    if control and plan.num > 1:
        on_stage("obedience")
        _obedience(done, base, control, plan)
    done.facts = _facts(base, control, subject, plan) | {"seconds": round(time.perf_counter() - began, 1)}
    return done


def _comparison(base: Backbone, control: SavedControl | None, make: Any) -> Comparison:
    try:
        return Comparison(base, make, Peer(base, control))
    except Unsupported as error:
        return Comparison(base, make, None, str(error))


def _obedience(done: Verification, base: Backbone, control: SavedControl, plan: VerifyPlan) -> None:
    """Measure obedience into a verification."""
    subject = done.subject
    name, expected = "the control is obeyed", "obedience measured"
    if reason := subject.unmeasurable:
        done.checks.append(Check(name, "not measured", reason, expected))
        return
    assert subject.spec is not None
    asked = ControlRequest(name=CONTROL, hint_cfg_scale=control.hint_cfg_scale)
    pairs = list(subject.pairs)[: plan.num]
    evaluation = EvaluationPlan(asked, subject.spec, pairs, plan.steps, plan.guidance, plan.seed)
    recorded = Recorded(maker(base, {CONTROL: control}))

    def check() -> Check:
        found, done.report = measure_obedience(recorded, evaluation, base)
        return found

    done.checks.append(guarded(name, check))
    if done.report:
        done.evaluation, done.recorded = evaluation, recorded


def _facts(base: Backbone, control: SavedControl | None, subject: Subject, plan: VerifyPlan) -> dict[str, Any]:
    """The facts that results depend on; no path, and no name that somebody gave a file."""
    parameters = {name: sum(one.numel() for one in part.parameters()) for name, part in base.networks().items()}
    facts: dict[str, Any] = {
        "base": {"digest": base.digest, "parameters": parameters, "size": base.size, **base.signature},
        "control": None,
        "data": {"source": subject.source if subject.source.isidentifier() else "a folder", "note": subject.note},
        "settings": {"steps": plan.steps, "guidance": plan.guidance, "seed": plan.seed, "num": plan.num},
        "format": {"weights": str(base.dtype).removeprefix("torch."), "used": number_format(base.device.type)},
        "versions": {name: found for name in _LIBRARIES if (found := _version(name))},
        "machine": machine(base.device.type) | {"system": platform.system(), "python": platform.python_version()},
    }
    if control:
        weights = control.branch.state_dict()
        facts["control"] = {
            "kind": KINDS[control.branch.kind].title,
            "digest": digest(weights),
            "parameters": sum(one.numel() for one in weights.values()),
            "hints": json.loads(control.hint.to_json()),
            "maker": subject.spec.annotator if subject.spec else "",
        }
    return facts


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
