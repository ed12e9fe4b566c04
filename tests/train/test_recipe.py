"""Recipes: what is refused, and the pairs that a recipe describes."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel
from tiny_runs import UNION

from controlkit.data import FolderPairs, make_fill50k
from controlkit.errors import UserError
from controlkit.mini import world
from controlkit.train import resolve, train_control, training_pairs
from controlkit.train.recipe import ControlRecipe, Recipe, _kinds_of, parse_recipe, read_recipe
from controlkit.train.setup import hint_specs


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"step": 5}, ['unknown key "step"', 'did you mean "steps"?']),
        ({"evaluation": {"evry": 5}}, ['unknown key "evaluation.evry"', 'did you mean "every"?']),
        ({"steps": -1}, ['"steps" is -1', "greater than 0"]),
        ({"lr": "fast"}, ["\"lr\" is 'fast'", "number"]),
        ({"prompt_dropout": 1.5}, ['"prompt_dropout" is 1.5', "less than or equal to 1"]),
        ({"control": {"body": "cnn"}}, ["\"control.body\" is 'cnn'", "'copy', 'conv', 'lora', 'xs' or 'adapter'"]),
        ({"optimizer": "adafactor", "betas": [0.5, 0.9]}, ['"betas" is set', "adafactor has none"]),
        ({"schedule": "cosine", "cooldown": 5}, ['"cooldown" is set', "schedule: constant"]),
        ({"power": 2.0}, ['"power" is set', "schedule: polynomial"]),
        ({"schedule": "polynomial", "lr": 1e-8}, ["ends at a rate of 1e-07, and lr is 1e-08"]),
        ({"control": {"options": {"low": "x"}}}, ["\"control.options.low\" is 'x'"]),
        ({"data": "emoji"}, ["\"data\" is 'emoji'"]),
    ],
)
def test_a_recipe_s_mistake_is_named_with_what_is_right(content, words, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError) as caught:
        read_recipe(path)
    for word in (str(path), *words):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "There is no recipe"),
        (b"steps: [1", "is no YAML"),
        (b"\xff\xfe\x00", "is no text in UTF-8"),
        (b"steps: 5\0", "zero bytes"),
        (b"base: &a mini\nvae: *a", "aliases"),
        (b"- steps", "holds a list; expected keys and values"),
        (b"steps", "holds a str; expected keys and values"),
    ],
)
def test_what_is_not_a_recipe_is_said_to_be_none(content, words, tmp_path):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read_recipe(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("learning_rate", "lr"),
        ("learning-rate", "lr"),
        ("max_train_steps", "steps"),
        ("resolution", "size"),
        ("batch_size", "batch"),
        ("pretrained_model_name_or_path", "base"),
        ("budget", "max_minutes"),
        ("conditioning_image_column", "data.columns"),
    ],
)
def test_another_program_s_word_for_a_setting_hints_at_ours(word, key):
    with pytest.raises(UserError, match=f'unknown key "{word}": did you mean "{key}"\\?'):
        parse_recipe({word: 1})


@pytest.mark.parametrize(
    ("values", "rate"),
    [
        ({}, 2e-4),
        ({"base": "mini"}, 2e-4),
        ({"base": "sd15"}, 1e-5),
        ({"base": "some/folder"}, 1e-5),
        ({"optimizer": "prodigy"}, 1.0),
        ({"base": "sdxl", "lr": 1e-6}, 1e-6),
        ({"lr": 1e-5}, 1e-5),
    ],
)
def test_the_rate_by_default_is_the_base_s(values, rate):
    read = parse_recipe(values)
    assert read.lr == rate and ("lr" in read.model_fields_set) is ("lr" in values)
    assert parse_recipe(read.model_dump()).lr == rate, "a run's own file says it"


def test_a_recipe_is_read_as_written_and_an_empty_one_is_the_default(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("lr: 1e-5\ncontrol: {annotator: scribble, options: {width: 0.1}}\n")
    read = read_recipe(path)
    assert (read.lr, read.control.annotator, read.control.options) == (1e-5, "scribble", {"width": 0.1})
    path.write_text("# nothing yet\n")
    assert read_recipe(path) == Recipe()


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_every_recipe_we_ship_is_valid(path):
    assert read_recipe(path).steps > 0


def test_values_of_a_recipe_can_be_put_in_place(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("steps: 5\ndata: {source: fill50k}\n")
    recipe = read_recipe(path, ["steps=7", "data.count=9", "evaluation.guidance=2.5", "control.taps=mid"])
    assert (recipe.steps, recipe.data.source, recipe.data.count) == (7, "fill50k", 9)
    assert (recipe.evaluation.guidance, recipe.control.taps) == (2.5, "mid")
    for change, words in (
        ("steps", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("steps=[", "is no YAML"),
        ("steps.more=3", "steps is 5 and has no more"),
        ("data.sorce=x", 'did you mean "source"'),
    ):
        with pytest.raises(UserError, match=words):
            read_recipe(path, [change])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", ".inf"), ("lr", ".nan"), ("lr", "1e38"), ("lr", "0"), ("weight_decay", ".inf"), ("epsilon", ".nan"),
        ("max_grad_norm", ".inf"), ("max_minutes", ".inf"), ("betas", "[.nan, 0.9]"), ("power", "1e38"),
        ("seed", "18446744073709551616"), ("seed", "-1"), ("steps", "10000000000"), ("size", "1000000"),
        ("control.low", "-.inf"), ("control.options", "{low: .nan}"), ("control.hint_cfg_scale", "1e38"),
        ("evaluation.guidance", "1e38"), ("evaluation.target", "5"), ("evaluation.steps", "1001"),
        ("steps", "yes"), ("batch", "true"), ("data.source", "''"),
    ],
)  # fmt: skip
def test_every_number_has_a_range_from_a_file_and_from_the_command_line(key, value, tmp_path):
    *section, name = key.split(".")
    line = f"{section[0]}: {{{name}: {value}}}" if section else f"{key}: {value}"
    (tmp_path / "set.yaml").write_text("")
    (tmp_path / "written.yaml").write_text(line)
    for path, changes in ((tmp_path / "written.yaml", []), (tmp_path / "set.yaml", [f"{key}={value}"])):
        with pytest.raises(UserError, match=rf'{path.name}: "{key}[.0-9a-z]*" is .*(input|string) should (be|have)'):
            read_recipe(path, changes)


@pytest.mark.parametrize(("low", "high"), [(1, 0), (0.5, 0.5), (2, 1), (0, -1)])
def test_the_least_value_of_a_hint_is_below_the_greatest(low, high):
    with pytest.raises(UserError, match=f"control.low is {low} and control.high {high}; expected low below high"):
        parse_recipe({"control": {"low": low, "high": high}})


def test_no_number_of_a_recipe_is_without_a_range():
    def numbers(model, at=""):
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                yield from numbers(field.annotation, f"{at}{name}.")
            else:
                yield f"{at}{name}", [of.__name__ for of in _kinds_of(field.annotation) if of in (int, float)]

    for name, kinds in numbers(Recipe):
        *section, last = name.split(".")
        for value in (-(10**30), 10**30) if kinds else ():
            content = {section[0]: {last: value}} if section else {last: value}
            with pytest.raises(UserError, match="input should be"):
                parse_recipe(content)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("2024", "2024"), ("007", "007"), ("no", "no"), ("2024-01-01", "2024-01-01"), ("1_000", "1_000"),
     ("1e3", "1e3"), ("1:30", "1:30"), ("'12'", "12"), ("~/photos", "HOME/photos"),
     ("~nobody-here/x", "~nobody-here/x")],
)  # fmt: skip
def test_a_setting_that_is_text_is_read_as_it_is_written(text, wanted, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    wanted = wanted.replace("HOME", str(tmp_path / "home"))
    path = tmp_path / "r.yaml"
    path.write_text(
        f"vae: {text}\ndata: {{source: {text}, columns: {{image: {text}}}}}\n"
        f"control: {{start_from: {text}}}\nevaluation: {{hints: [{text}]}}\n"
    )
    read = read_recipe(path)
    assert [read.vae, read.data.source, read.control.start_from, *read.evaluation.hints] == [wanted] * 4
    assert read.data.columns == {"image": text.strip("'")}, "a column's name is no place"
    path.write_text("")
    assert read_recipe(path, [f"data.source={text}"]).data.source == wanted
    assert read_recipe(path, [f"evaluation.hints=[{text}]"]).evaluation.hints == [wanted]
    assert read_recipe(path, ["vae=null", "data.count=null"]).vae is None


@pytest.mark.parametrize(
    "text", ["lr: 1.0\nlr: 2.0", "data: {count: 1, source: a, count: 2}", "control:\n  low: 0\n  low: 1"]
)
def test_a_key_that_is_given_twice_is_named(text, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=r'the key "(lr|count|low)" is given twice'):
        read_recipe(tmp_path / "r.yaml")


def test_a_batch_is_whole_pairs_and_equal_parts():
    for changes in (
        {"noises_per_pair": 4},
        {"gradient_accumulation": 4},
        {"noises_per_pair": 2, "gradient_accumulation": 2},
    ):
        with pytest.raises(UserError, match="a batch of 6 rows cannot be split"):
            parse_recipe({"batch": 6} | changes)


@pytest.mark.parametrize(
    "content",
    [
        {"control": {"rank": 4}},
        {"control": {"annotator": "scribble", "annotators": ["canny", "scribble"]}},
        {"data": {"source": "fill50k", "variants": 3}},
        {"data": {"scenes": 3}},
        {"data": {"visits": 3}},
        {"evaluation": {"every": 0, "patience": 2}},
        {"evaluation": {"every": 0, "target": 0.5}},
        {"evaluation": {"every": 0, "hints": ["a.png"]}},
        {"evaluation": {"hints": ["a.png"]}, "control": {"types": ["canny"]}},
    ],
)
def test_a_setting_that_nothing_would_read_is_refused(content):
    with pytest.raises(UserError, match="is set, and nothing reads it"):
        parse_recipe(content)


@pytest.mark.parametrize("source", ["fill50k", "./fill50k"])
def test_a_folder_called_like_what_is_drawn_here_is_told_from_it(source, toy_base, tmp_path, monkeypatch):
    list(make_fill50k(tmp_path / "fill50k", 12, toy_base.size))
    monkeypatch.chdir(tmp_path)
    plan = resolve(parse_recipe({"data": {"source": source, "count": 8}})).data
    said = pytest.warns(UserWarning, match="taken for what is drawn here; write ./fill50k")
    with nullcontext() if source.startswith(".") else said:
        pairs, _ = training_pairs(plan, toy_base)
    assert isinstance(pairs, FolderPairs) is source.startswith(".")


def test_hints_that_nothing_here_makes_take_no_options():
    with pytest.raises(UserError, match="Nothing here makes hints of depth"):
        hint_specs(ControlRecipe(annotator="depth", options={"low": 1.0}))


@pytest.mark.parametrize(
    ("control", "words"),
    [({"annotator": "cany"}, 'did you mean "canny"'), ({"options": {"lo": 1}}, 'did you mean "low"')],
)
def test_an_unknown_annotator_or_option_is_refused_before_anything_is_written(
    tiny_recipe, control, words, toy_base, tmp_path
):
    with pytest.raises(UserError, match=words):
        next(train_control(tiny_recipe(control=control), tmp_path / "run", toy_base))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"data": {"source": "emojis"}}, 'did you mean "emoji"'),
        ({"control": {"start_from": "nowhere"}}, "nowhere"),
    ],
)
def test_a_recipe_that_cannot_run_leaves_no_folder_to_be_in_the_way(tiny_recipe, section, words, toy_base, tmp_path):
    with pytest.raises(UserError, match=words):
        next(train_control(tiny_recipe(**section), tmp_path / "run", toy_base))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"control": {"types": ["cany"]}}, 'did you mean "canny"'),
        ({"control": {"types": ["canny"], "body": "conv"}}, r"no control\.body"),
        ({"control": {"types": ["canny"], "options": {"low": 1.0}}}, r"no control\.options"),
        ({"data": {"source": "fill50k"}}, '"fill50k" has hints of one type'),
    ],
)
def test_a_union_s_recipe_that_cannot_be_meant_is_refused(
    tiny_recipe, changes, words, toy_base, fake_packages, tmp_path
):
    with pytest.raises(UserError, match=words):
        next(train_control(tiny_recipe(**(UNION | changes)), tmp_path / "run", toy_base))
    assert not (tmp_path / "run").exists()


def test_what_is_measured_on_was_not_trained_on(tiny_recipe, toy_base, fake_packages, tmp_path):
    list(make_fill50k(tmp_path, 7, size=32))
    for source, counts in (("fill50k", (8, 2)), (str(tmp_path), (5, 2))):
        trained, heldout = training_pairs(resolve(tiny_recipe(data={"source": source})).data, toy_base)
        assert (len(trained), len(heldout)) == counts
        seen = {pair.picture.tobytes() for pair in trained}
        assert not any(pair.picture.tobytes() in seen for pair in heldout)
    trained, heldout = (
        {pair.prompt.split(", ")[0].split(" ", 1)[1] for pair in pairs}
        for pairs in training_pairs(resolve(tiny_recipe(data={"source": "emoji", "count": None})).data, toy_base)
    )
    concepts = {concept.replace("-", " ") for concept in world.heldout_concepts()}
    assert heldout <= concepts and not trained & concepts
