"""Orders carried out on a base: what is made is what the library makes, and one order's fault is no other's."""

import json

import numpy as np
import pytest

from controlkit.annotators import annotate, contract
from controlkit.backbones import load_base
from controlkit.branch import ControlSpec
from controlkit.controls.registry import new_control
from controlkit.formats import SavedControl, save_control
from controlkit.images import read_picture, read_settings
from controlkit.sample import ControlRequest, Request, maker
from controlkit.serve.orders import Annotation, Evaluation, Pictures
from controlkit.serve.settings import Folders
from controlkit.serve.studio import Studio, controls_for


def no_news(news):
    return ()


def noting(told):
    """A ``Tell`` that keeps the news of steps."""
    return lambda news: () if "ended" in news else told.append(news) or ()


@pytest.fixture(scope="module")
def controls(toy_base, drawn_joins, union_folder, tmp_path_factory):
    """A folder with a control of canny, a Union, one whose name alone says what it reads, and what is no control."""
    folder = tmp_path_factory.mktemp("controls")
    branch = drawn_joins(new_control(toy_base, ControlSpec()))
    save_control(folder / "edges", SavedControl(branch, contract("canny")), toy_base)
    save_control(folder / "control_v11_toy_scribble", SavedControl(branch, contract("")), toy_base)
    (folder / "union").symlink_to(union_folder)
    (folder / "notes.safetensors").write_bytes(b"no weights")
    (folder / "readme.txt").write_text("x")
    return folder


@pytest.fixture
def studio(toy_base, controls, tmp_path):
    return Studio(toy_base, tmp_path / "pictures", Folders(controls))


@pytest.fixture
def drawn():
    picture = np.full((48, 48, 3), 230, np.uint8)
    picture[10:30, 12:36] = (200, 30, 30)
    return picture


def order(seed, steps=2, **values):
    return Pictures(request=Request(**{"prompt": "a red apple", "steps": steps} | values), seeds=((seed, 0),))


def test_controls_of_a_folder_are_listed_and_those_shipped_for_another_base_are_not(toy_base, controls, caplog):
    found = {one.name: one for one in controls_for(toy_base, controls)}
    assert {*found} == {"edges", "union", "control_v11_toy_scribble"} and "notes.safetensors is left out" in caplog.text
    assert found["edges"].annotator == "canny" and not found["edges"].is_guessed
    assert found["control_v11_toy_scribble"].annotator == "scribble" and found["control_v11_toy_scribble"].is_guessed
    assert {"canny", "depth"} <= {*found["union"].types} and len(found["edges"].hash) == 8


def test_pictures_are_those_of_the_library_and_say_how_they_were_made(studio, toy_base, drawn, controls):
    control = ControlRequest(name="edges", images=drawn, scale=0.7)
    asked = Pictures(
        request=Request(prompt="a red apple", steps=2, controls=(control,)), seeds=((3, 0), (4, 0)), shows_hints=True
    )
    told = []
    found = studio.carry_out({"job": asked}, noting(told))
    result = found["job"]["result"]
    [want] = maker(toy_base, {"edges": studio.control("edges")[0]})([asked.requests()[1]])
    made = read_picture(studio.folder / "job" / "1.png")
    assert abs(made.astype(int) - want.pixels).max() <= 1, "a batch rounds otherwise"
    settings = read_settings(studio.folder / "job" / "1.png")
    assert settings["seed"] == 4 and settings["controls"][0]["name"] == "edges" and settings["batch"] == 2
    assert str(controls) not in json.dumps(settings), "no place of the server's is told"
    assert "ControlNet 0" in result["texts"][0] and result["pictures"] == ["0.png", "1.png"]
    hint = read_picture(studio.folder / "job" / result["hints"][0])
    assert (hint == annotate(drawn, contract("canny"), (32, 32))).all()
    assert told[-1]["shares"] == {"job": 1.0} and told[0]["previews"]["job"][:4] == b"\x89PNG"


def test_orders_of_other_steps_are_made_together_and_told_of_apart(studio, toy_base):
    orders = {"short": order(1, steps=2), "long": order(2, steps=3, guidance=7.0)}
    assert orders["short"].alike == orders["long"].alike
    told = []
    found = studio.carry_out(orders, noting(told))
    assert [(news["step"], news["steps"], *news["shares"]) for news in told] == [
        (1, 2, "short"), (1, 3, "long"), (2, 2, "short"), (2, 3, "long"), (3, 3, "long"),
    ]  # fmt: skip
    assert [news["shares"][name] for news in told for name in news["shares"]][-1] == 1.0
    assert all(read_settings(studio.folder / name / "0.png")["batch"] == 2 for name in orders)
    [want] = maker(toy_base)(orders["long"].requests())
    made = read_picture(studio.folder / "long" / "0.png")
    assert abs(made.astype(int) - want.pixels).max() <= 1 and found["short"]["result"]["is_whole"]


def test_one_order_s_fault_is_no_other_s(studio, drawn):
    orders = {
        "good": order(1),
        "odd": order(2, size=(30, 32)),
        "none": order(3, controls=(ControlRequest(name="edgy", images=drawn),)),
        "also": order(4),
    }
    found = studio.carry_out(orders, no_news)
    assert found["good"]["result"]["is_whole"] and found["also"]["result"]["is_whole"]
    assert found["odd"]["fault"] == "Invalid" and "divides" in found["odd"]["error"]
    assert found["none"]["fault"] == "NotFound" and 'did you mean "edges"' in found["none"]["error"]


def test_a_fault_while_pictures_are_made_is_looked_for_in_each(studio, monkeypatch):
    from controlkit.errors import Invalid
    from controlkit.serve import studio as module

    real = module.generate

    def errs(base, prepared, batch, **more):
        if any(one.request.seed == 2 for one in prepared):
            raise Invalid("not finite")
        return real(base, prepared, batch, **more)

    monkeypatch.setattr(module, "generate", errs)
    found = studio.carry_out({str(seed): order(seed) for seed in (1, 2, 3)}, no_news)
    assert ["result" in found[name] for name in ("1", "2", "3")] == [True, False, True]


def test_a_batch_that_is_given_up_gives_what_there_is_to_whom_that_is_of_use(studio):
    whole, parts = order(1, 9), order(1, 9).model_copy(update={"takes_parts": True})
    steps = []

    def tell(news):
        steps.append("step" in news)
        return {"a", "b"} if sum(steps) == 2 else ()

    found = studio.carry_out({"a": whole, "b": parts}, tell)
    assert sum(steps) == 2 and found["a"] == {"cancelled": True}
    assert not found["b"]["result"]["is_whole"]
    assert read_picture(studio.folder / "b" / "0.png").shape == (32, 32, 3)


def test_a_job_that_is_given_up_ends_at_once_and_what_is_made_beside_it_is_as_ever(studio, toy_base):
    orders = {"left": order(1, 5).model_copy(update={"takes_parts": True}), "stays": order(2, 5), "longer": order(3, 6)}
    told = []

    def tell(news):
        told.append([*news["ended"]] if "ended" in news else {*news["shares"]})
        return {"left"} if len(told) == 4 else ()

    found = studio.carry_out(orders, tell)
    assert told[4] == ["left"] and not found["left"]["result"]["is_whole"]
    assert not any("left" in names for names in told[5:]), "and no more is told of it"
    for name in ("stays", "longer"):
        [want] = maker(toy_base)(orders[name].requests())
        made = read_picture(studio.folder / name / "0.png")
        assert found[name]["result"]["is_whole"] and abs(made.astype(int) - want.pixels).max() <= 1


def test_jobs_of_other_sizes_are_told_of_as_each_ends(studio):
    ended = []
    orders = {"first": order(1), "second": order(2, size=(64, 32))}
    found = studio.carry_out(orders, lambda news: ended.append((*news.get("ended", ()), news.get("step"))) or ())
    assert ended == [(1,), (2,), ("first", None), (1,), (2,), ("second", None)]
    assert found["second"]["result"]["height"] == 64


def test_a_union_s_type_and_another_maker(studio, drawn):
    control = ControlRequest(name="union", images={"canny": drawn}, options={"low": 10, "high": 20})
    asked = order(1, controls=(control,)).model_copy(update={"shows_hints": True})
    result = studio.carry_out({"job": asked}, no_news)["job"]["result"]
    hint = read_picture(studio.folder / "job" / result["hints"][0])
    assert result["hints"] == ["hint-0-canny.png"] and hint.any()


def test_hints_are_made_at_the_side_that_is_asked_for(studio, drawn):
    found = studio.carry_out({"job": Annotation(annotator="canny", picture=drawn, side=24)}, no_news)
    assert found["job"]["result"]["pictures"] == ["0.png"]
    hint = read_picture(studio.folder / "job" / "0.png")
    assert (hint == annotate(drawn, contract("canny"), (24, 24))).all()


def test_what_cannot_be_measured_is_said(studio):
    found = studio.carry_out({"job": Evaluation(control="union")}, no_news)
    assert found["job"]["fault"] == "Unsupported" and "measure one of its types" in found["job"]["error"]


def test_few_controls_stay_in_memory(studio, monkeypatch):
    monkeypatch.setattr("controlkit.serve.studio._KEPT", 1)
    first = studio.control("edges")
    assert studio.control("edges")[0] is first[0]
    studio.control("control_v11_toy_scribble")
    assert studio.control("edges")[0] is not first[0]


def test_facts_are_plain_values(studio):
    facts = json.loads(json.dumps(studio.facts()))
    assert (
        facts["size"] == 32 and "Karras" in facts["samplers"]["DPM++ 2M"] and "Karras" not in facts["samplers"]["DDIM"]
    )
    assert all("source" not in one for one in facts["controls"])


@pytest.mark.slow
def test_a_control_is_measured(tmp_path):
    """A whole evaluation of a shipped control, small: its figures, and its share of the work on the way."""
    told = []
    studio = Studio(load_base("mini"), tmp_path / "pictures")
    found = studio.carry_out({"job": Evaluation(control="depth", num=2, steps=1)}, noting(told))
    report = found["job"]["result"]["report"]
    assert report["metric"] == "depth_rmse" and report["num"] == 2 and report["settings"]["steps"] == 1
    assert report["ceiling"]["mean"] < report["floor"]["mean"], "of an error"
    shares = [news["shares"]["job"] for news in told]
    assert shares == sorted(shares) and 0 < shares[0] < shares[-1] <= 1
    stopped = studio.carry_out({"job": Evaluation(control="depth", num=2, steps=1)}, lambda news: {"job"})
    assert stopped["job"] == {"cancelled": True}
