"""A run read from its folder, as lines and as a page."""

import base64
import dataclasses
import io
import json
import os
import re
import sys
import time
from contextlib import nullcontext

import numpy as np
import pytest
from filelock import FileLock
from safetensors.numpy import save_file

from controlkit.cli import main
from controlkit.errors import UserError
from controlkit.images import decode_picture, write_png
from controlkit.measure import Verdict
from controlkit.train.ending import Ending
from controlkit.train.watch import bars, blocks, lines, page, read_run
from limits import limited


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
    assert (seen.step, seen.ended, seen.stopped) == (40, False, False) and seen.pace == pytest.approx(0.55)
    assert seen.series("relative_loss") == {
        "canny": [(20, pytest.approx(0.85), 0.7, 1), (40, pytest.approx(0.85), 0.7, 1)],
        "a<b": [(20, 1, 1, 1), (40, 1, 1, 1)],
    }
    assert seen.obedience() == [(20, 0.1, 0.0, pytest.approx(0.2)), (40, 0.5, 0.4, 0.6)]
    assert seen.loss()[0][:2] == (1, 0.99) and seen.loss()[-1][:2] == (40, pytest.approx(0.6))
    assert [sheet.name for sheet in seen.sheets] == ["step-0000040.png"]


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
    assert lines(read_run(run)) == [f"{run}: step 0 of 100, no step yet"]
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
    shown = {name: [row[:2] for row in rows] for name, rows in seen.series("residuals").items()}
    assert shown == {"skip_0": [(20, 0.5), (40, 0.5)], "middle": [(20, 0.1), (40, 0.2)]}
    drift, residuals = lines(seen)[-3:-1]
    assert drift.startswith("colour drift  -0.200  █▁") and "saturation" in drift
    assert residuals.startswith("residuals      0.500  █▁")
    assert page(seen).count("<svg") == 8 and "Colour drift" in page(seen) and "Residuals by tap" in page(seen)


def measured(run, **more):
    """Add to the evaluations of the run's log."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()[:-1]]
    for record in records:
        if "obedience" in record:
            record |= more
    (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_run(run)


def axis(text, title):
    """The numbers at the axis of the first chart whose title begins so."""
    chart = text[text.index(f'aria-label="{title}') :].partition("</svg>")[0]
    return [float(word) for word in re.findall(r'<text x="0" y="[-\d.]+">([-\d.e]+)</text>', chart)]


def test_a_measure_with_a_scale_has_the_same_axis_in_every_run(run):
    for mean, low, high in ((0.02, -0.01, 0.05), (0.9, 0.8, 0.95)):
        more = {"obedience": mean, "obedience_interval": [low, high], "fidelity": mean, "floor": 0.1, "ceiling": 0.95}
        more |= {"quality": {"clip_score": 0.7, "clip_score_no_control": 0.71, "clip_score_truth": 0.69}}
        more |= {"residuals": {"middle": mean}, "colour_drift": {"red": mean / 50}}
        seen = measured(run, **more)
        text = page(seen)
        for title, wanted in (
            ("obedience", [0, 1]),
            ("fidelity", [0, 1]),
            ("under control", [0, 1]),
            ("of the true pictures", [0, 1]),
            ("middle", [0, 1]),
            ("red", [-0.1, 0, 0.1]),
        ):
            assert axis(text, title) == wanted, title
        bar = next(line for line in lines(seen) if line.startswith("obedience"))
        assert ("▁" if mean < 0.1 else "▇") in bar
    far = page(measured(run, obedience=-0.6, obedience_interval=[-0.7, -0.5], fidelity=25.0, ceiling=40.0))
    assert axis(far, "obedience") == [0, 1, -0.7] and axis(far, "fidelity") == [40, 0.1][::-1]


def test_quality_and_one_s_own_hints_are_shown(run):
    for step in (20, 40):
        write_png(run / "samples" / f"own-step-{step:07d}.png", np.full((4, 4, 3), step, np.uint8))
    seen = measured(run, quality={"clip_score": 0.7, "clip_score_no_control": 0.71, "clip_score_truth": 0.69})
    assert [sheet.name for sheet in seen.sheets] == ["step-0000040.png", "own-step-0000040.png"]
    assert "CLIP-score     0.700  ▆▆  0.710 without control, 0.690 of the true pictures" in lines(seen)
    text = page(seen)
    assert text.count("data:image/png") == 2 and "Your own hints: the hint, and four seeds; step 40" in text


def test_a_page_shows_the_settings_that_tell_the_run_from_others(run):
    (run / "recipe.yaml").write_text("steps: 100\nlr: 0.5\nseed: 0\ndata: {source: '<mine>'}\nema: 0.9\n")
    text = page(read_run(run))
    rows = re.findall(r"<td>([^<]*)</td><td>([^<]*)</td>", text)
    assert dict(rows) == {"steps": "100", "lr": "0.5", "data.source": "&lt;mine&gt;", "ema": "0.9"}


@pytest.mark.parametrize(("quiet", "holds", "stopped"), [(30, False, False), (90, False, True), (90, True, False)])
def test_a_run_that_no_process_writes_any_more_is_called_stopped(run, quiet, holds, stopped):
    at = time.time() - quiet
    for file in (run, *run.rglob("*")):
        os.utime(file, (at, at))
    with FileLock(run / ".lock") if holds else nullcontext():
        seen = read_run(run)
        assert seen.stopped is stopped
        assert ("no process has trained in it for 2 min; run it again" in lines(seen)[0]) is stopped
        assert ('http-equiv="refresh" content="5"' in page(seen, 5)) is not stopped


def test_looking_leaves_the_lock_free_and_makes_none(run):
    os.utime(run / "log.jsonl", (0, 0))
    assert not (run / ".lock").exists() and read_run(run).stopped is not None
    assert not (run / ".lock").exists()
    (run / ".lock").touch()
    assert read_run(run).stopped is not None
    with FileLock(run / ".lock", timeout=0):
        pass


def test_the_reason_for_the_end_is_shown_and_that_of_an_earlier_end_is_not(run):
    ending = Ending(40, "max_minutes", "It took too long.", Verdict("found", "<so>", True), "controlkit generate")
    ending.write(run)
    seen = read_run(run)
    assert seen.ended and lines(seen)[0].endswith("ended (max_minutes)") and lines(seen)[-3:] == ending.lines()
    assert "<p>Control found: &lt;so&gt;; quality kept.</p>" in page(seen, 5) and "refresh" not in page(seen, 5)
    dataclasses.replace(ending, reason="interruption", verdict=None).write(run)
    assert not read_run(run).ended and read_run(run).stopped
    dataclasses.replace(ending, step=20).write(run)
    assert not read_run(run).ended and "news at 40" in lines(read_run(run))


def test_the_time_left_heeds_the_minutes_a_run_may_take(run):
    (run / "recipe.yaml").write_text("steps: 100000\nmax_minutes: 10\n")
    (run / "machine.json").write_text("{}")
    now = (run / "log.jsonl").stat().st_mtime
    os.utime(run / "machine.json", (now - 240, now - 240))
    assert "6 min left" in lines(read_run(run))[0], "four have passed since the run began"
    save_file({"x": np.zeros(1)}, checkpoint := run / "state.safetensors", {"seconds": "480.0"})
    (run / "checkpoints" / "step-0000040").mkdir(parents=True)
    checkpoint = checkpoint.rename(run / "checkpoints" / "step-0000040" / "state.safetensors")
    os.utime(checkpoint, (now - 60, now - 60))
    assert "1 min left" in lines(read_run(run))[0], "eight by the checkpoint's clock, and one since"


def test_a_log_with_numbers_that_are_not_finite_is_drawn_without_them(run):
    seen = measured(run, relative_loss={"canny": [float("inf")]}, residuals={"middle": float("nan")})
    assert seen.series("relative_loss") == seen.series("residuals") == {}
    assert "nan" not in page(seen) and "inf" not in page(seen)


def test_without_a_terminal_lines_come_one_by_one_as_they_change(run, monkeypatch):
    held, told = io.BytesIO(), []

    def between(seconds):
        """The run goes on between two looks; told is what was flushed until then."""
        told.append(held.getvalue().decode())
        if len(told) == 1:
            text = (run / "log.jsonl").read_text().splitlines()[:-1]
            more = {"step": 41, "loss": 0.5, "seconds": 0.5}
            (run / "log.jsonl").write_text("\n".join([*text, json.dumps(more)]) + "\n")
        else:
            Ending(41, "steps", "That was it.", None, "generate").write(run)

    monkeypatch.setattr(time, "sleep", between)
    monkeypatch.setattr(sys, "argv", ["controlkit", "watch", str(run)])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(held, "utf-8"))
    with pytest.raises(SystemExit) as ended:
        main()
    told.append(held.getvalue().decode())
    first, then, rest = told[0], told[1].removeprefix(told[0]), told[2].removeprefix(told[1])
    assert not ended.value.code and first.splitlines()[0].endswith("1 min left") and "\nobedience" in first
    assert first.endswith("news at 40\n") and "step 41 of 100" in then and "news at 40" not in then
    assert rest.endswith("That was it.\nNext: generate\n") and "ended (steps)" in rest


@pytest.mark.parametrize("every", ["nan", "inf", "0.1", "1e300"])
def test_seconds_between_two_looks_are_some(every, run, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["controlkit", "watch", str(run), "--every", every])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "--every" in capsys.readouterr().err


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


def test_its_page_embeds_pictures_of_the_run_alone(run, tmp_path_factory):
    """What lies in ``samples`` may be a link to any file, or a file of another kind under a picture's name."""
    sheet = run / "samples" / "own-step-0000040.png"
    outside = tmp_path_factory.mktemp("outside") / "secret.png"
    write_png(outside, np.full((4, 4, 3), 77, np.uint8))
    for target in ("/etc/passwd", outside, "/dev/zero"):
        sheet.unlink(missing_ok=True)
        sheet.symlink_to(target)
        with limited(), pytest.raises(UserError, match=r"own-step-0000040\.png"):
            page(read_run(run))
    sheet.unlink()
    for data in (b"<script>alert(1)</script>", b"%!PS\n{} loop\n", b"", b"root:x:0:0"):
        sheet.write_bytes(data)
        with limited(), pytest.raises(UserError, match=r"own-step-0000040\.png"):
            page(read_run(run))
    write_png(sheet, np.full((4, 4, 3), 5, np.uint8))
    sheet.write_bytes(sheet.read_bytes() + b"<script>of a stranger's</script>")
    with limited():
        embedded = re.findall(r"data:image/png;base64,([\w+/=]+)", page(read_run(run)))
    shown = [decode_picture(base64.b64decode(one), "embedded") for one in embedded]
    assert [picture[0, 0, 0] for picture in shown] == [9, 5]
    assert not any(b"script" in base64.b64decode(one) for one in embedded)


@pytest.mark.parametrize("text", ["a: &a [x]\nsteps: *a\n", "steps: 1\n" * 10**6, "steps: !!python/name:os.system 1\n"])
def test_a_recipe_made_to_harm_is_refused(run, text):
    (run / "recipe.yaml").write_text(text)
    with limited(), pytest.raises(UserError, match=r"recipe\.yaml"):
        read_run(run)
