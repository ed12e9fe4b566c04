"""The flags of diffusers' script: each has its place, its reason, or its refusal."""

import pytest

from controlkit.errors import Unsupported, UserError
from controlkit.train import flags as scripts
from controlkit.train.flags import NEEDLESS, PLACES, parser, read_flags
from controlkit.train.recipe import parse_recipe

# `train_controlnet.py --help`, diffusers 0.35
SCRIPT = """pretrained_model_name_or_path controlnet_model_name_or_path revision variant tokenizer_name output_dir
cache_dir seed resolution train_batch_size num_train_epochs max_train_steps checkpointing_steps checkpoints_total_limit
resume_from_checkpoint gradient_accumulation_steps gradient_checkpointing learning_rate scale_lr lr_scheduler
lr_warmup_steps lr_num_cycles lr_power use_8bit_adam dataloader_num_workers adam_beta1 adam_beta2 adam_weight_decay
adam_epsilon max_grad_norm push_to_hub hub_token hub_model_id logging_dir allow_tf32 report_to mixed_precision
enable_xformers_memory_efficient_attention set_grads_to_none dataset_name dataset_config_name train_data_dir
image_column conditioning_image_column caption_column max_train_samples proportion_empty_prompts validation_prompt
validation_image num_validation_images validation_steps tracker_project_name"""
SDXL = """pretrained_vae_model_name_or_path crops_coords_top_left_h crops_coords_top_left_w image_interpolation_mode
enable_npu_flash_attention"""  # what train_controlnet_sdxl.py has besides
SD3 = """num_extra_conditioning_channels upcast_vae weighting_scheme logit_mean logit_std mode_scale
precondition_outputs max_sequence_length dataset_preprocess_batch_size"""  # train_controlnet_sd3.py, diffusers 0.37
FLUX = """use_adafactor num_double_layers num_single_layers jsonl_for_train guidance_scale save_weight_dtype
weighting_scheme logit_mean logit_std mode_scale enable_model_cpu_offload"""  # train_controlnet_flux.py, diffusers 0.31
MANY = """--train_batch_size 2 --gradient_accumulation_steps=3 --num_train_epochs 2 --learning_rate 1e-5
--gradient_checkpointing --seed 7 --proportion_empty_prompts 0.5 --checkpointing_steps 100 --resolution 128
--checkpoints_total_limit 3 --max_train_samples 60 --adam_weight_decay 0 --output_dir o --annotator canny
--validation_steps 50 --validation_image a.png b.png --validation_prompt x
--num_validation_images 4 --report_to wandb --mixed_precision fp16
--tracker_project_name 7"""


@pytest.fixture(autouse=True)
def _pairs(monkeypatch):
    monkeypatch.setattr(scripts, "_pairs_in", lambda folder, columns: 103)


@pytest.fixture
def asked(tmp_path):
    """Read flags beside the two that are needed."""

    def read(*more, processes=1):
        needed = ["--pretrained_model_name_or_path", "mini", "--train_data_dir", str(tmp_path)]
        return read_flags([*needed, *map(str, more)], processes)

    return read


def test_every_flag_of_the_script_is_known_and_in_one_place():
    known = {action.dest for action in parser()._actions}
    refused = {*scripts._ELSEWHERE}
    assert known | refused == {*SCRIPT.split(), *SDXL.split(), *SD3.split(), *FLUX.split(), "annotator"}
    assert not known & refused and {*PLACES, *NEEDLESS} <= known and not {*PLACES} & {*NEEDLESS}


def test_what_is_left_out_has_the_script_s_defaults(asked, tmp_path):
    found = asked()
    recipe = parse_recipe(found.recipe)
    assert (recipe.base, recipe.data.source, str(found.out)) == ("mini", str(tmp_path), "controlnet-model")
    assert (recipe.batch, recipe.lr, recipe.prompt_dropout, recipe.warmup, recipe.cooldown) == (4, 2e-4, 0.0, 0, 0)
    assert recipe.steps == 26, "one epoch of 103 pairs, four a step"
    assert (recipe.size, recipe.keep, recipe.control.annotator, recipe.data.columns) == (512, None, "", {})
    assert (recipe.tracking.to, recipe.tracking.project) == (["tensorboard"], "train_controlnet")
    assert recipe.evaluation.every == 26 and any("--annotator" in note for note in found.notes)
    assert any("proportion_empty_prompts 0.5" in note for note in found.notes)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--weighting_scheme=logit_normal", "train_controlnet_sd3.py and train_controlnet_flux.py; .* flow matching"),
        ("--precondition_outputs 1", "a flag of diffusers' train_controlnet_sd3.py; there is no such setting here"),
        ("--max_sequence_length 77", "T5 text encoder, which no base here has. Leave it out"),
        ("--num_double_layers 4", "train_controlnet_flux.py; .* U-Nets"),
        ("--jsonl_for_train rows.jsonl", "name the file metadata.jsonl, and give --train_data_dir"),
    ],
)
def test_flags_of_scripts_for_other_bases_are_named_as_theirs(flag, words, asked):
    with pytest.raises(Unsupported, match=words):
        asked(*flag.split())


def test_flags_of_scripts_for_other_bases_that_have_a_place_go_there(asked):
    found = asked("--use_adafactor", "--upcast_vae", "--dataset_preprocess_batch_size", 100)
    assert parse_recipe(found.recipe).optimizer == "adafactor"
    assert sum(f"--{name} is not needed" in note for note in found.notes for name in NEEDLESS) == 2


def test_the_script_s_rate_is_for_stable_diffusion_and_mini_has_its_own(asked, tmp_path):
    assert any("rate of 5e-06 is for Stable Diffusion, mini's is 0.0002" in note for note in asked().notes)
    for given, base, rate in (
        ([], "mini", 2e-4),
        ([], "sd15", 5e-6),
        (["--learning_rate", "1e-6"], "mini", 1e-6),
        (["--scale_lr"], "mini", 2e-5),
    ):
        flags = ["--pretrained_model_name_or_path", base, "--train_data_dir", str(tmp_path), *given]
        found = read_flags(flags)
        assert parse_recipe(found.recipe).lr == pytest.approx(rate)
        assert any("mini's is" in note for note in found.notes) is (rate == 2e-4)


def test_flags_go_where_they_belong(asked):
    found = asked(*MANY.split())
    recipe = parse_recipe(found.recipe)
    assert (recipe.batch, recipe.gradient_accumulation, recipe.steps, recipe.lr) == (6, 3, 20, 1e-5)
    assert (recipe.gradient_checkpointing, recipe.seed, recipe.prompt_dropout, recipe.checkpoint_every) == (
        True,
        7,
        0.5,
        100,
    )
    assert (recipe.keep, recipe.data.count, recipe.weight_decay, recipe.control.annotator) == (3, 60, 0, "canny")
    assert (str(found.out), recipe.size) == ("o", 128)
    said = "\n".join(found.notes)
    assert all(f"--{name} is not needed" in said for name in ("num_validation_images",))
    assert recipe.evaluation.own() == [("x", "a.png"), ("x", "b.png")]
    assert "paper" not in said and recipe.evaluation.every == 50
    assert (recipe.tracking.to, recipe.tracking.project) == (["wandb"], "7")
    assert "tensorboard" in parse_recipe(asked("--report_to", "all").recipe).tracking.to
    assert parse_recipe(asked("--report_to", "none").recipe).tracking.to == []
    assert parse_recipe(asked("--annotator", "canny", "--max_train_steps", 20).recipe).evaluation.every == 20
    assert parse_recipe(asked("--validation_steps", 50).recipe).evaluation.every == 50, "loss and pictures at least"


def test_pictures_of_one_s_own_are_looked_at_as_often_as_the_script_does(asked):
    recipe = parse_recipe(asked(*["--validation_prompt", "a", "b", "--validation_image", "c.png"]).recipe)
    assert recipe.evaluation.own() == [("a", "c.png"), ("b", "c.png")] and recipe.evaluation.every == 100
    equals = asked("--validation_prompt=a: b", "--validation_image=c.png")
    assert parse_recipe(equals.recipe).evaluation.own() == [("a: b", "c.png")]
    equals.recipe["control"]["annotators"] = ["canny", "depth"]
    assert parse_recipe(equals.recipe), "what --set puts beside flags"
    for flags in ("--validation_prompt a", "--validation_prompt a b --validation_image c d e"):
        with pytest.raises(UserError, match="as many"):
            parse_recipe(asked(*flags.split()).recipe)


def test_a_batch_is_each_process_s_own(asked):
    given = ["--train_batch_size", "2", "--gradient_accumulation_steps", "3", "--scale_lr", "--learning_rate", "1e-6"]
    one, four = (parse_recipe(asked(*given, processes=count).recipe) for count in (1, 4))
    assert (one.batch, one.steps, four.batch, four.steps) == (6, 18, 24, 5)
    assert four.lr == pytest.approx(24e-6) and four.gradient_accumulation == 3
    assert any("each of 4 processes" in note for note in asked(processes=4).notes)


def test_the_launcher_s_number_format_is_taken_where_the_script_s_is_left_out(asked, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert parse_recipe(asked().recipe).precision == "fp16"
    told = asked("--mixed_precision", "no")
    assert parse_recipe(told.recipe).precision == "fp32" and not any("float32" in note for note in told.notes)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    left = asked()
    assert parse_recipe(left.recipe).precision == "auto" and any("float32" in note for note in left.notes)
    assert any("tenth of the pairs" in note for note in left.notes)


def test_trackers_that_nobody_asked_for_may_be_missing(asked, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert parse_recipe(asked().recipe).tracking.to == []
    assert parse_recipe(asked("--report_to", "tensorboard").recipe).tracking.to == ["tensorboard"]


def test_columns_have_the_names_they_are_given(asked):
    given = "--image_column photo --conditioning_image_column conditioning_image --caption_column said"
    assert parse_recipe(asked(*given.split()).recipe).data.columns == {"image": "photo", "caption": "said"}


def test_names_of_folders_are_never_read_as_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "2024").mkdir()
    found = read_flags(["--pretrained_model_name_or_path", "15", "--train_data_dir", "2024"])
    assert (found.recipe["base"], found.recipe["data"]["source"]) == ("15", "2024")


@pytest.mark.parametrize(
    ("flags", "schedule", "warmup", "lr"),
    [
        ("--lr_warmup_steps 10", "constant", 0, 2e-4),
        ("--lr_scheduler constant_with_warmup --lr_warmup_steps 10", "constant_with_warmup", 10, 2e-4),
        ("--lr_scheduler linear --lr_warmup_steps 10 --scale_lr", "linear", 10, 2e-5),
        ("--lr_scheduler cosine", "cosine", 500, 2e-4),
    ],
)
def test_schedules_are_diffusers(flags, schedule, warmup, lr, asked):
    recipe = parse_recipe(asked("--max_train_steps", 1000, *flags.split()).recipe)
    assert (recipe.schedule, recipe.warmup, recipe.cooldown) == (schedule, warmup, 0)
    assert recipe.lr == pytest.approx(lr)


def test_a_scheduler_s_own_flags_go_with_it_and_are_said_to_be_needless_elsewhere(asked):
    for name, flag, key, value in (
        ("cosine_with_restarts", "lr_num_cycles", "cycles", 3),
        ("polynomial", "lr_power", "power", 2.5),
    ):
        assert getattr(parse_recipe(asked("--lr_scheduler", name, f"--{flag}", value).recipe), key) == value
        unread = asked(f"--{flag}", value)
        assert parse_recipe(unread.recipe) and any(f"--{flag} is not needed" in note for note in unread.notes)


def test_adam_s_flags_are_the_optimizer_s_settings(asked):
    assert parse_recipe(asked().recipe).optimizer == "adamw"
    given = "--use_8bit_adam --adam_beta1 0.8 --adam_beta2 0.99 --adam_epsilon 1e-6 --max_grad_norm 0.5"
    recipe = parse_recipe(asked(*given.split()).recipe)
    assert (recipe.optimizer, recipe.betas, recipe.epsilon) == ("adamw8bit", (0.8, 0.99), 1e-6)
    assert recipe.max_grad_norm == 0.5


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--lr_scheduler cosin", '--lr_scheduler: "cosin" was given; did you mean "cosine"'),
        ("--revision fp16", '--revision: "fp16" was given, which training here cannot do; leave it out'),
        ("--resume_from_checkpoint checkpoint-10", 'give "latest", or leave it out'),
        ("--push_to_hub", "--push_to_hub: .* cannot do; leave it out"),
        ("--learning_rat 1", 'did you mean "learning_rate"'),
        ("--seed", "--seed: expected one argument"),
        ("--report_to comet_ml", '--report_to is "comet_ml": .*Known: all, none, tensorboard, trackio, wandb'),
        ("--train_batch_size two", '--train_batch_size: "two" was given; expected a whole number'),
        ("--resolution 0.5", '--resolution: "0.5" was given; expected a whole number'),
        ("--learning_rate fast", '--learning_rate: "fast" was given; expected a number'),
        ("--mixed_precision fp8", '--mixed_precision: "fp8" was given; did you mean "fp16"'),
        ("--lr_schedul cosine", 'no flag of train_controlnet.py: did you mean "lr_scheduler"'),
        ("--train_batch_size 0", '"batch" is 0; input should be greater than 0'),
        ("--gradient_accumulation_steps 0", '"batch" is 0; input should be greater than 0'),
        ("--num_train_epochs 0", '"steps" is 0; input should be greater'),
        ("seed 5", '"seed" stands where a flag was expected'),
        ("--dataset_name fusing/fill50k", "one of --train_data_dir and --dataset_name"),
    ],
)
def test_what_cannot_be_done_is_refused_with_what_to_do(flags, words, asked):
    with pytest.raises(UserError, match=words):
        parse_recipe(asked(*flags.split()).recipe)


def test_a_hub_s_data_set_is_fetched_once_and_a_missing_base_or_folder_refused(tmp_path, monkeypatch):
    asked = []

    def fetched(name, repo_type, revision, local_dir):
        asked.append((name, repo_type, revision))
        if "fill50k" not in name:
            raise OSError("no network")
        local_dir.mkdir(parents=True)

    monkeypatch.setenv("CONTROLKIT_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    programs = {("fusing/fill50k", "fill50k.py")}
    monkeypatch.setattr("huggingface_hub.file_exists", lambda name, file, repo_type: (name, file) in programs)
    flags = ["--pretrained_model_name_or_path", "x", "--dataset_name"]
    for _ in range(2):
        found = read_flags([*flags, "fusing/fill50k"])
        assert found.recipe["data"]["source"] == "fusing/fill50k" and found.recipe["steps"] > 1
    assert asked == [("fusing/fill50k", "dataset", "refs/convert/parquet")], "not the program, but what it made"
    programs.clear()
    read_flags([*flags, "other/fill50k"])
    assert asked[1:] == [("other/fill50k", "dataset", None)]
    with pytest.raises(UserError, match=r"no folder photos/train, and no data set .* \(no network\)"):
        read_flags([*flags, "photos/train"])
    with pytest.raises(UserError, match="There is no folder nowhere"):
        read_flags([*flags, "nowhere"])
    with pytest.raises(UserError, match="--pretrained_model_name_or_path is missing"):
        read_flags(["--train_data_dir", str(tmp_path)])
