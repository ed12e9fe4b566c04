"""A recipe: the settings of a training run, read from YAML, every key and range checked.

A range stands in a setting's ``Field``, or in its docstring where it depends on other settings.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from controlkit.errors import Invalid, NotFound, nearest
from controlkit.train.optimizers import OptimizerName

ScheduleName = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
]  # fmt: skip
POLYNOMIAL_END = 1e-7
"""The rate at which ``schedule: polynomial`` ends, as diffusers has it."""


FORMATS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""A recipe's names of number formats -> torch's names."""

Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ControlRecipe(_Strict):
    """The control to train: its hints, and the network."""

    annotator: str = "canny"
    """Makes the hints, unless the data has its own; obedience is measured with it."""
    types: list[str] = []
    """Types of hint of a Union, which is then trained (instead of ``annotator``). A type named twice comes twice as
    often."""
    options: dict[str, float] = {}
    """The annotator's options; those left out keep their defaults. Ranges: each annotator's own."""
    annotators: list[str] = []
    """Several hints at once, three channels each, in this order (instead of ``annotator``): made by annotators, or as
    many hints of the data's own. Obedience is measured to the first."""
    hints_as: Literal["channels", "branches"] = "channels"
    """``channels``: the ``annotators`` are channels of one control. ``branches``: one branch each, trained together as
    they are combined in use (Section 3.4); each is then a control in a folder of its annotator's name."""
    channels: int | None = Field(None, gt=0)
    """Channels of the hint, where not three: 1 for grey, any number for arrays (``.npy``)."""
    low: Finite = 0.0
    """The value that 0 is read as in hints of whole numbers. Any finite number below ``high``."""
    high: Finite = 1.0
    """The value that the largest number of the type (255 of uint8) is read as. Hints of floats are used as they are,
    and must lie between ``low`` and ``high``."""
    body: Literal["copy", "conv", "lora", "xs", "adapter"] = "copy"
    """``copy``: the paper's trainable copy; ``conv``: ControlNet-lite; ``lora``: the copy, trained through differences
    of low rank (a Control-LoRA, also written as one); ``xs``: ControlNet-XS, a thin encoder that runs beside the
    base's; ``adapter``: a T2I-Adapter."""
    rank: int = Field(16, gt=0)
    """Rank of the differences that ``body: lora`` trains."""
    size_ratio: float | None = Field(None, gt=0, le=1)
    """Channels of an ``xs`` body as a share of the base's, in (0, 1]. Left out: 32 channels at the finest level (a
    tenth of Stable Diffusion's), at most half of a small base's."""
    join: Literal["zero", "gaussian"] = "zero"
    """How the convolutions that connect the branch start: at zero (the paper's), or drawn (its ablation, Figure 8)."""
    taps: Literal["all", "mid"] = "all"
    """Where the branch is connected: at every skip and the middle, or at the middle alone (Section 3.3)."""
    start_from: str | None = None
    """A trained control to start from, by name or folder (the paper starts scribbles from Canny; its small-scale
    recipe trains ``taps: mid`` first and then reconnects: start from that control with ``taps: all``)."""
    hint_cfg_scale: float = Field(1.0, ge=0)
    """Weight of the hint in classifier-free guidance, at least 0, when the control is measured and, by default, used:
    1 as released; equal to the guidance scale, the hint counts as much as the prompt."""


class DataRecipe(_Strict):
    """The data to train on."""

    source: str = "emoji"
    """``emoji`` (without the held-out concepts), ``scenes`` (without the held-out combinations), ``world`` (both),
    ``fill50k`` (drawn on the fly), a folder in any of the layouts of ``data.layouts``, or a hub's data set
    (``owner/name``)."""
    columns: dict[str, str] = {}
    """Names of a folder's ``image``, ``hint`` or ``caption`` columns, where they are none of the usual names."""
    count: int | None = Field(None, gt=0)
    """Pictures to train on; null for all."""
    variants: int = Field(2, gt=0)
    """Backgrounds each emoji is drawn on: as many pairs a picture. Other sources have one."""
    scenes: int = Field(6000, gt=0)
    """Scenes drawn; those without anything held out are trained on."""
    visits: int = Field(1, gt=0)
    """How often each scene comes in an epoch; in a Union each time with another type of hint."""
    buckets: bool = False
    """Keep the shapes of a folder's pictures: each is resized to the nearest size (``data.bucket_sizes``), and a batch
    has one size. Otherwise they are cut square, as the held-out pictures always are."""
    cache: bool = True
    """Look up latents, text embeddings and annotations in this machine's store, and keep new ones there
    (``data.store``)."""
    flip: float = Field(0.0, ge=0, le=1)
    """Share of visits, in [0, 1], at which a pair is mirrored: the picture, and the hint as of the mirrored picture
    (left and right limbs change colours, normals the sign of x). Pairs whose prompt names left or right are not."""


class EvaluationRecipe(_Strict):
    """Evaluations on held-out pairs while the run goes on: the loss relative to the base without control and, except
    for a Union, obedience."""

    every: int = Field(250, ge=0)
    """Steps between evaluations; 0 for none."""
    num: int = Field(16, ge=2)
    """Held-out pairs to measure on, at least 2."""
    steps: int = Field(10, gt=0)
    """Sampling steps of each picture."""
    guidance: Finite = 4.0
    """Scale of classifier-free guidance; 1 for none."""
    prompts: list[str] = []
    """Prompts of ``hints``: one for each, or one for all."""
    hints: list[str] = []
    """Files of hints to make pictures of besides, four of each, into ``OUT/samples/own-step-N.png``."""
    patience: int = Field(0, ge=0)
    """End the run after this many evaluations in a row without a better obedience; 0 for never."""
    target: Finite | None = None
    """End the run when the lower bound of obedience reaches this (0: no control, 1: the ceiling); on ``mini`` only
    while the CLIP-score is kept."""

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

    base: str = "mini"
    vae: str | None = None
    """A VAE instead of the base's own: a diffusers folder, a file or a hub's name."""
    size: int | None = Field(None, gt=0)
    """Side of the training pictures in pixels; null for the base's own."""
    control: ControlRecipe = ControlRecipe()
    data: DataRecipe = DataRecipe()
    steps: int = Field(3000, gt=0)
    max_minutes: float | None = Field(None, gt=0)
    """Minutes after which the run ends, with the last step that fits, if ``steps`` have not ended it before. Counted by
    the wall clock from caching on, with evaluations and the time before interruptions, without work that a kill undid.
    The learning rate then comes down in time (``train.learning_rate``): a cooldown of a fifth of the steps is one of a
    fifth of the minutes. The number of steps differs from run to run: not for exact repeats."""
    batch: int = Field(32, gt=0)
    """Rows of a batch; a multiple of ``noises_per_pair`` times ``gradient_accumulation``."""
    noises_per_pair: int = Field(1, gt=0)
    """Rows of a batch that share a pair, each with its own noise, timestep and prompt dropout: the hint is encoded once
    for all of them, which is most of the work on a small base."""
    gradient_accumulation: int = Field(1, gt=0)
    """Parts a batch is computed in, one after the other, to save memory: the gradients are the whole batch's."""
    gradient_checkpointing: bool = False
    """Compute features again in the backward pass instead of keeping them: less memory, slower."""
    optimizer: OptimizerName = "adamw"
    """``muon``: Muon for weight matrices, AdamW for the rest; ``adamw8bit``, ``adafactor``: less memory; ``prodigy``:
    finds the learning rate itself (set ``lr: 1``). Details: ``optimizers.Optimizer``."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay of the means of gradients and of their squares, each in [0, 1); of AdamW and Prodigy."""
    epsilon: float = Field(1e-8, gt=0)
    """Added to the root of the mean square, above 0; of AdamW and Prodigy."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Largest L2 norm of the gradients, over all weights; larger ones are scaled down to it."""
    lr: float = Field(1e-5, gt=0)
    """The learning rate at its highest (the paper: AdamW's, 1e-5 for SD, constant throughout)."""
    schedule: ScheduleName = "constant"
    """The learning rate after ``warmup``: constant until ``cooldown``, or one of diffusers' schedules."""
    warmup: int = Field(0, ge=0)
    """Steps at the start over which the learning rate rises linearly."""
    cooldown: int = Field(0, ge=0)
    """Steps at the end over which it falls linearly, nearly to zero; of ``schedule: constant``."""
    cycles: int = Field(1, gt=0)
    """Number of falls of ``schedule: cosine_with_restarts``."""
    power: float = Field(1.0, gt=0)
    """Exponent of ``schedule: polynomial``, which ends at a rate of 1e-7."""
    weight_decay: float = Field(0.01, ge=0)
    ema: float = Field(0.0, ge=0, lt=1)
    """Decay, in [0, 1), of an exponential average of the weights, which is then measured and saved; 0 for none."""
    unfreeze_after: int | None = Field(None, gt=0)
    """Steps after which the base's denoiser is trained too, at the same rate (Section 3.3, large-scale training: after
    at least 50,000). A copy is trained: its difference from the base is written into the control's folder,
    ``base-difference.safetensors``, which ``--lora`` merges into the base again."""
    prompt_dropout: float = Field(0.5, ge=0, le=1)
    """Share of prompts, in [0, 1], replaced by the empty one, drawn anew each step (Section 3.3)."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Number format the networks are computed in; trained weights stay in fp32. ``auto``: bf16 where it is faster,
    else fp32. With ``fp16`` the loss is scaled, and steps whose gradients overflow are left out."""
    compile: bool = False
    """Compile the denoiser (torch.compile): faster steps, after a minute or two."""
    seed: int = 0
    checkpoint_every: int = Field(500, gt=0)
    """Steps between checkpoints."""
    keep: int | None = Field(2, gt=0)
    """Newest checkpoints to keep; null for all."""
    evaluation: EvaluationRecipe = EvaluationRecipe()
    tracking: TrackingRecipe = TrackingRecipe()

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        if self.batch % (self.noises_per_pair * self.gradient_accumulation):
            raise ValueError(
                f"a batch of {self.batch} rows cannot be split into pairs of {self.noises_per_pair} noises and "
                f"{self.gradient_accumulation} equal parts"
            )
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
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Invalid(f"{path} is not YAML ({error}).") from error
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
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise Invalid(f'"{change}": the value is not YAML ({error}).') from error
    for part in path:
        inner = content.setdefault(part, {})
        if not isinstance(inner, dict):
            raise Invalid(f'"{change}": {part} is {inner!r} and has no {key}.')
        content = inner
    content[key] = value


def parse_recipe(content: dict[str, Any], origin: str = "The recipe") -> Recipe:
    """Make a recipe from plain values; ``origin`` names them in errors, which are ``Invalid``."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # several keys contradict each other
            raise Invalid(f"{origin}: {first['ctx']['error']}.") from None
        *path, key = first["loc"]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise Invalid(
                f'{origin} has an unknown key "{name}": {nearest(str(key), _known_keys(Recipe, path))}'
            ) from None
        raise Invalid(
            f'{origin}: "{name}" is {first["input"]!r}; {first["msg"][0].lower()}{first["msg"][1:]}.'
        ) from None
