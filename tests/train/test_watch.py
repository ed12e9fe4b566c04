"""A run read from its folder, as lines and as a page."""

import json
import os
import re

import numpy as np
import pytest

from controlkit.errors import UserError
from controlkit.images import write_png
from controlkit.train.watch import bars, blocks, lines, page, read_run


@pytest.fixture
def run(tmp_path):
    """A folder as a run leaves it after 40 of 100 steps, a line half written."""
    (tmp_path / "recipe.yaml").write_text("steps: 100\n")
    records = [{"step": i, "loss": 1.0 - 0.01 * i, "seconds": 0.6 if i % 2 else 0.5} for i in range(1, 41)]
    for step, mean in ((20, 0.1), (40, 0.5)):
        records[step - 1] |= {"obedience": mean, "obedience_interval": [mean - 0.1, mean + 0.1], "is_meaningful": True}
        records[step - 1] |= {"verdict": f"news at {step}", "relative_loss": {"canny": [1, 0.9, 0.8, 0.7], "a<b": [1]}}
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "log.jsonl").write_text(text + '{"step": 41, "lo')
    write_png(tmp_path / "samples" / "step-0000020.png", np.zeros((4, 4, 3), np.uint8))
    write_png(tmp_path / "samples" / "step-0000040.png", np.full((4, 4, 3), 9, np.uint8))
    return tmp_path


def test_a_run_is_read_as_far_as_it_is_written(run):
    seen = read_run(run)
    assert (seen.step, seen.steps, seen.ended) == (40, 100, False) and seen.pace == pytest.approx(0.55)
    assert seen.series("relative_loss") == {
        "canny": [(20, pytest.approx(0.85)), (40, pytest.approx(0.85))],
        "a<b": [(20, 1), (40, 1)],
    }
    assert seen.obedience() == [(20, 0.1, 0.0, pytest.approx(0.2)), (40, 0.5, 0.4, 0.6)]
    assert seen.loss()[0] == (1, 0.99) and seen.loss()[-1] == (40, pytest.approx(0.6))
    assert seen.sheet.name == "step-0000040.png"


def test_its_lines_say_where_it_stands(run):
    text = lines(read_run(run))
    assert "step 40 of 100, 0.55 s a step, 1 min left" in text[0]
    assert text[1].startswith("loss          0.6000  █") and text[1].endswith("▁")
    assert any(line.startswith(f"{'canny':12} {0.85:7.3f}") for line in text)
    assert "[0.400, 0.600]" in text[-2] and text[-1] == "news at 40"
    (run / "control").mkdir()
    assert "step 40 of 100, ended" in lines(read_run(run))[0]
    os.utime(run / "control", (0, 0))
    assert not read_run(run).ended, "the result is of an earlier end"
    (run / "log.jsonl").unlink()
    assert lines(read_run(run)) == [f"{run}: no step yet"]
    assert "<h1>" in page(read_run(run))


def test_its_page_stands_alone_and_what_it_quotes_is_no_markup(run):
    text = page(read_run(run))
    assert text.count("<svg") == 4 and "a&lt;b" in text and "a<b" not in text
    assert "data:image/png;base64," in text and not re.search(r'(src|href)="(?!data:)', text)
    for x, y in re.findall(r"([-\d.]+),([-\d.]+)(?=[ \"])", " ".join(re.findall(r'points="[^"]*"', text))):
        assert 0 <= float(x) <= 720 and 0 <= float(y) <= 200


def test_colours_and_residuals_are_shown_where_they_are_in_the_log(run):
    lines_of = (run / "log.jsonl").read_text().splitlines()[:-1]
    for at, size in ((19, 0.1), (39, 0.2)):
        more = {"colour_drift": {"red": 0.01, "saturation": -size}, "residuals": {"skip_0": 0.5, "middle": size}}
        lines_of[at] = json.dumps(json.loads(lines_of[at]) | more)
    (run / "log.jsonl").write_text("\n".join(lines_of))
    seen = read_run(run)
    assert seen.series("residuals") == {"skip_0": [(20, 0.5), (40, 0.5)], "middle": [(20, 0.1), (40, 0.2)]}
    drift, residuals = lines(seen)[-3:-1]
    assert drift.startswith("colour drift  -0.200  █▁") and "saturation" in drift
    assert residuals.startswith("residuals      0.500  █▁")
    assert page(seen).count("<svg") == 8 and "Colour drift" in page(seen) and "Residuals by tap" in page(seen)


def test_bars_reach_from_the_least_to_the_greatest():
    assert bars([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█" and bars([2, 2]) == "▁▁"
    assert len(bars(list(range(1000)))) == 40


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        read_run(tmp_path)


def test_a_picture_becomes_half_blocks_of_its_colours():
    picture = np.zeros((8, 4, 3), np.uint8)
    picture[0::2] = (255, 0, 0)
    picture[1::2] = (0, 0, 255)
    text = blocks(picture, 80, 3)
    assert text.plain == "▀▀▀▀\n" * 3, "as wide as it is, and cut below"
    assert {(str(s.style.color.triplet.hex), str(s.style.bgcolor.triplet.hex)) for s in text.spans} == {
        ("#ff0000", "#0000ff")
    }
    assert blocks(np.zeros((100, 200, 3), np.uint8), 40, 50).plain.count("\n") == 10
