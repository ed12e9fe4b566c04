"""A recipe: the settings of a training run, read from YAML, every key and range checked.

A range stands in a setting's ``Field``. ``docs/data.md`` explains the settings; docstrings here say what it does not.
"""

from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from controlkit.errors import Invalid, NotFound, nearest, one_line
from controlkit.files import LONGEST_YAML, parse_yaml_as_written, read_text
from controlkit.train.optimizers import OptimizerName

ScheduleName = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
POLYNOMIAL_END = 1e-7
"""The rate at which ``schedule: polynomial`` ends, as diffusers has it."""

FORMATS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""A recipe's names of number formats -> torch's names."""


def _expanded(place: str) -> str:
    """``~`` and ``~name`` at the beginning as that home, where there is one, as a shell would."""
    try:
        return str(Path(place).expanduser()) if place.startswith("~") else place
    except RuntimeError:
        return place


Place = Annotated[str, Field(min_length=1), AfterValidator(_expanded)]
"""A file or folder, or a name in its place."""
Count = Annotated[int, Field(gt=0, le=10**9)]
Steps = Annotated[int, Field(ge=0, le=10**9)]
Level = Annotated[float, Field(ge=-1e6, le=1e6)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


def usual_rate(base: str, optimizer: str) -> float:
    """The learning rate by default: the paper's for Stable Diffusion; ``mini``, which is small, learns faster.

    Prodigy multiplies its own estimate by it.
    """
    if optimizer == "prodigy":
        return 1.0
    return 2e-4 if base == "mini" else 1e-5


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ControlRecipe(_Strict):
    """The control to train: its hints, and the network."""

    annotator: str = "canny"
    """Makes the hints, unless the data has its own; obedience is measured with it."""
    types: list[str] = []
    """Types of hint of a Union, which is then trained (instead of ``annotator``)."""
    options: dict[str, float] = {}
    """The annotator's options; those left out keep their defaults. Ranges: each annotator's own."""
    annotators: list[str] = []
    """Several hints at once, three channels each (instead of ``annotator``). Obedience is measured to the first."""
    hints_as: Literal["channels", "branches"] = "channels"
    channels: int | None = Field(None, gt=0, le=4096)
    """Channels of the hint; null for three of each annotator."""
    low: Level = 0.0
    """The value that 0 is read as in hints of whole numbers; below ``high``."""
    high: Level = 1.0
    """The value that the largest number of the type (255 of uint8) is read as."""
    body: Literal["copy", "conv", "lora", "xs", "adapter"] = "copy"
    rank: int = Field(16, gt=0, le=4096)
    size_ratio: float | None = Field(None, gt=0, le=1)
    """Channels of an ``xs`` body as a share of the base's; null for 32 at the finest level, at most half the base's."""
    join: Literal["zero", "gaussian"] = "zero"
    taps: Literal["all", "mid"] = "all"
    start_from: Place | None = None
    hint_cfg_scale: float = Field(1.0, ge=0, le=100)


class DataRecipe(_Strict):
    """The data to train on."""

    source: Place = "emoji"
    """``setup.DRAWN``, a folder in any of the layouts of ``data.layouts``, or a hub's data set (``owner/name``)."""
    columns: dict[str, str] = {}
    """Names of a folder's ``image``, ``hint`` or ``caption`` columns, where they are none of the usual names; without a
    listing, of its folders of pictures and hints."""
    count: Count | None = None
    """Pictures to train on; null for all."""
    variants: Count = 2
    scenes: Count = 6000
    visits: Count = 1
    buckets: bool = False
    cache: bool = True
    flip: Share = 0.0


class EvaluationRecipe(_Strict):
    """Evaluations on held-out pairs while the run goes on: the loss relative to the base without control and, except
    for a Union, obedience."""

    every: Steps = 250
    num: int = Field(16, ge=2, le=10**6)
    steps: int = Field(10, gt=0, le=1000)
    guidance: float = Field(4.0, ge=0, le=1000)
    prompts: list[str] = []
    """Prompts of ``hints``: one for each, or one for all."""
    hints: list[Place] = []
    patience: Steps = 0
    target: Share | None = None
    """0: no control, 1: the ceiling."""

    def own(self) -> list[tuple[str, str]]:
        """List (prompt, file of a hint) of the user's own hints; a single prompt or hint goes with all others."""
        prompts = self.prompts or [""]
        most = max(len(prompts), len(self.hints)) if self.hints else 0
        return [(prompts[i % len(prompts)], self.hints[i % len(self.hints)]) for i in range(most)]

    @model_validator(mode="after")
    def _hints_for_prompts(self) -> "EvaluationRecipe":
        counts = {len(self.prompts), len(self.hints)}
        if (self.prompts and len(counts - {1}) > 1) or (self.prompts and not self.hints):
            raise ValueError(
                f"evaluation.prompts are {len(self.prompts)} and evaluation.hints {len(self.hints)}: give as many of "
                "both, or one of either"
            )
        return self


TrackerName = Literal["tensorboard", "wandb", "trackio"]


class TrackingRecipe(_Strict):
    """Where figures and sample sheets are sent besides the log; each tracker is an extra of its name."""

    to: list[TrackerName] = []
    project: str = "controlkit"
    """The project's name at ``wandb`` and ``trackio``; ``tensorboard`` writes to ``OUT/tensorboard``."""


class Recipe(_Strict):
    """The settings of a training run. Unknown keys are refused, with the nearest known one."""

    base: Place = "mini"
    vae: Place | None = None
    size: int | None = Field(None, gt=0, le=16_384)
    control: ControlRecipe = ControlRecipe()
    data: DataRecipe = DataRecipe()
    steps: Count = 3000
    max_minutes: float | None = Field(None, gt=0, le=1e7)
    batch: int = Field(32, gt=0, le=10**6)
    """Rows of a batch; a multiple of ``noises_per_pair`` times ``gradient_accumulation``."""
    noises_per_pair: int = Field(1, gt=0, le=1000)
    gradient_accumulation: int = Field(1, gt=0, le=10**6)
    gradient_checkpointing: bool = False
    optimizer: OptimizerName = "adamw"
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the means of gradients and of their squares; of AdamW and Prodigy."""
    epsilon: float = Field(1e-8, gt=0, le=1)
    """Added to the root of the mean square; of AdamW and Prodigy."""
    max_grad_norm: float = Field(1.0, gt=0, le=1e9)
    """Largest L2 norm of the gradients, over all weights; larger ones are scaled down to it."""
    lr: float = Field(1e-5, gt=0, le=100)
    """The learning rate at its highest; by default ``usual_rate``."""
    schedule: ScheduleName = "constant"
    warmup: Steps = 0
    """Steps at the start over which the learning rate rises linearly."""
    cooldown: Steps = 0
    """Steps at the end over which it falls linearly, nearly to zero; of ``schedule: constant``."""
    cycles: Count = 1
    power: float = Field(1.0, gt=0, le=100)
    weight_decay: float = Field(0.01, ge=0, le=100)
    ema: Decay = 0.0
    unfreeze_after: Count | None = None
    prompt_dropout: Share = 0.5
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """The format that networks are computed in; trained weights stay in fp32."""
    compile: bool = False
    seed: int = Field(0, ge=0, lt=2**64)
    checkpoint_every: Count = 500
    keep: Count | None = 2
    evaluation: EvaluationRecipe = EvaluationRecipe()
    tracking: TrackingRecipe = TrackingRecipe()

    @model_validator(mode="after")
    def _rate_follows_the_base(self) -> "Recipe":
        if "lr" not in self.model_fields_set:
            object.__setattr__(self, "lr", usual_rate(self.base, self.optimizer))  # which leaves it out of the set
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        if self.batch % (self.noises_per_pair * self.gradient_accumulation):
            raise ValueError(
                f"a batch of {self.batch} rows cannot be split into pairs of {self.noises_per_pair} noises and "
                f"{self.gradient_accumulation} equal parts"
            )
        if self.control.low >= self.control.high:
            low, high = self.control.low, self.control.high
            raise ValueError(f"control.low is {low:g} and control.high {high:g}; expected low below high")
        if self.unfreeze_after and self.ema:
            raise ValueError("ema averages a control's weights alone, and with unfreeze_after the base's change too")
        return self

    @model_validator(mode="after")
    def _every_setting_is_read(self) -> "Recipe":
        several = self.control.annotators
        for key, read, reason in (
            ("betas", self.optimizer != "adafactor", "adafactor has none"),
            ("epsilon", self.optimizer != "adafactor", "adafactor has its own"),
            ("cooldown", self.schedule == "constant", "it is of schedule: constant"),
            ("cycles", self.schedule == "cosine_with_restarts", "they are of schedule: cosine_with_restarts"),
            ("power", self.schedule == "polynomial", "it is of schedule: polynomial"),
            ("control.rank", self.control.body == "lora", "it is of control.body: lora"),
            ("control.annotator", not (several and self.control.annotator), "control.annotators stands in its place"),
            ("data.variants", self.data.source in ("emoji", "world"), "it is of data.source: emoji or world"),
            ("data.scenes", self.data.source in ("scenes", "world"), "it is of data.source: scenes or world"),
            ("data.visits", self.data.source in ("scenes", "world"), "it is of data.source: scenes or world"),
            ("evaluation.patience", self.evaluation.every > 0, "evaluation.every is 0"),
            ("evaluation.target", self.evaluation.every > 0, "evaluation.every is 0"),
            ("evaluation.hints", self.evaluation.every > 0, "evaluation.every is 0"),
            ("evaluation.hints", not self.control.types, "of a Union no pictures are made while it trains"),
        ):
            *section, name = key.split(".")
            holder = getattr(self, section[0]) if section else self
            if not read and getattr(holder, name) != type(holder).model_fields[name].default:
                raise ValueError(f'"{key}" is set, and nothing reads it: {reason}')
        if self.schedule == "polynomial" and self.lr <= POLYNOMIAL_END:
            raise ValueError(f"schedule: polynomial ends at a rate of {POLYNOMIAL_END}, and lr is {self.lr}")
        return self

    @model_validator(mode="after")
    def _settings_fit_the_body(self) -> "Recipe":
        control = self.control
        if control.body != "xs" and control.size_ratio is not None:
            raise ValueError(f"control.size_ratio is the width of body xs; body {control.body} has the base's width")
        whole = {"xs": "joins every layer", "adapter": "adds inside the base's encoder"}
        for name in ("join", "taps"):
            word, plain = getattr(control, name), ControlRecipe.model_fields[name].default
            if control.body in whole and word != plain:
                reason = f"with body {control.body}, which {whole[control.body]}, only {plain}"
                raise ValueError(f"control.{name} is {word}; {reason}")
        return self

    @model_validator(mode="after")
    def _one_branch_per_hint(self) -> "Recipe":
        control, names = self.control, self.control.annotators
        if control.hints_as == "channels":
            return self
        if len(set(names)) < max(len(names), 2):
            raise ValueError(f"control.hints_as is branches: control.annotators names two or more; it is {names}")
        if unfit := [name for name in names if name in ("", ".", "..") or {"/", "\\"} & set(name)]:
            raise ValueError(f'control.hints_as is branches: "{unfit[0]}" cannot be the name of a branch\'s folder')
        if control.body in ("xs", "adapter"):
            raise ValueError(f"control.hints_as is branches: of body copy, conv or lora, and not {control.body}")
        if control.channels:
            raise ValueError("control.hints_as is branches: each hint has three channels; leave out control.channels")
        return self


def _known_keys(model: type[BaseModel], path: Sequence[Any]) -> list[str]:
    for part in path:
        annotation = model.model_fields[str(part)].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        model = annotation
    return list(model.model_fields)


def read_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a YAML file.

    ``changes``: values to use instead of the file's, such as ``data.source=scenes``.

    Raises ``NotFound`` without such a file, ``Invalid`` for a wrong key or value, with the nearest right one.
    """
    if not path.is_file():
        raise NotFound(f"There is no recipe at {path}: expected a YAML file such as recipes/smoke.yaml.")
    content = _read_yaml(read_text(path, 4 * LONGEST_YAML), str(path), Recipe)
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise Invalid(f"{path} holds a {type(content).__name__}; expected keys and values, such as `steps: 1000`.")
    for change in changes:
        put(content, change)
    return parse_recipe(content, str(path))


def put(content: dict[str, Any], change: str) -> None:
    """Set KEY=VALUE in a recipe's values: the key's parts are joined by dots, the value is YAML.

    Raises ``Invalid`` where it is not of that form.
    """
    name, equals, text = change.partition("=")
    *path, key = name.strip().split(".")
    if not (equals and key and all(path)):
        raise Invalid(f'"{change}" changes nothing: expected KEY=VALUE, such as steps=500 or data.source=scenes.')
    kind: Any = Recipe
    for part in (*path, key):
        fields = kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else {}
        kind = fields[part].annotation if part in fields else None
    value = _read_yaml(text, f'The value of "{one_line(change)}"', kind)
    for part in path:
        inner = content.setdefault(part, {})
        if not isinstance(inner, dict):
            raise Invalid(f'"{change}": {part} is {inner!r} and has no {key}.')
        content = inner
    content[key] = value


def _read_yaml(text: str, name: str, kind: Any) -> Any:
    """The value of a YAML text for a setting, or settings, of this type. ``Invalid`` where it is no YAML."""
    return _as_declared(kind, *parse_yaml_as_written(text, name))


def _as_declared(kind: Any, value: Any, text: Any) -> Any:
    """A value of YAML, as it was written (``text``) wherever its type is a text: 2024, 007, no, 2024-01-01.

    Else YAML would make numbers, truths and dates of them. So with yes and no where the type is a number.
    """
    kinds = _kinds_of(kind)
    if isinstance(value, dict):
        model = next((one for one in kinds if isinstance(one, type) and issubclass(one, BaseModel)), None)
        of = {name: field.annotation for name, field in model.model_fields.items()} if model else {}
        every = next((get_args(one)[1] for one in kinds if get_origin(one) is dict), None)
        pairs = zip(value.values(), text.items(), strict=True)
        return {key: _as_declared(of.get(key, every), inner, written) for inner, (key, written) in pairs}
    if isinstance(value, list):
        every = next((get_args(one)[0] for one in kinds if get_args(one)), None)
        return [_as_declared(every, inner, written) for inner, written in zip(value, text, strict=True)]
    if value is None and (type(None) in kinds or not text):
        return None
    misread = isinstance(value, bool) and bool not in kinds and kind is not None
    return text if str in kinds or misread else value


def _kinds_of(kind: Any) -> list[Any]:
    """The types that a type's annotations, alternatives and literals come down to."""
    origin = get_origin(kind)
    if origin is Literal:
        return [str]
    if origin in (Union, UnionType, Annotated):
        parts = get_args(kind)[:1] if origin is Annotated else get_args(kind)
        return [one for part in parts for one in _kinds_of(part)]
    return [kind]


def parse_recipe(content: dict[str, Any], origin: str = "The recipe") -> Recipe:
    """Make a recipe from plain values; ``origin`` names them in errors, which are ``Invalid``."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # several keys contradict each other
            raise Invalid(f"{origin}: {one_line(first['ctx']['error'])}.") from None
        *path, key = first["loc"]
        name = one_line(".".join(map(str, first["loc"])))
        if first["type"] == "extra_forbidden":
            from controlkit.train.flags import key_of  # which reads recipes

            meant = f'did you mean "{other}"?' if (other := key_of(str(key)[:99])) else ""
            known = nearest(str(key)[:99], _known_keys(Recipe, path))
            raise Invalid(f'{origin} has an unknown key "{name}": {meant or known}') from None
        raise Invalid(
            f'{origin}: "{name}" is {one_line(repr(first["input"]))}; {first["msg"][0].lower()}{first["msg"][1:]}.'
        ) from None
