"""Mutated files of every kind through every reader: each is read, or refused in one sentence, and nothing else happens.

`pytest -m fuzz` runs the campaign. Its settings are environment variables: FUZZ_SEED, FUZZ_FILES, FUZZ_WORKERS,
FUZZ_KINDS (names, with commas), FUZZ_CASE (one case alone, as the report names it), FUZZ_OUT (a folder for findings).
"""

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import corpus
import cv2
import guards
import pytest
import readers
import workers

from controlkit.errors import Invalid

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # what a reading warns of is looked at where it is read
    pytest.mark.skipif(sys.platform != "linux", reason="the guards read /proc"),
]
KINDS, READERS = corpus.KINDS, readers.READERS

SEED, FILES = int(os.environ.get("FUZZ_SEED", 1)), int(os.environ.get("FUZZ_FILES", 21_000))
MINUTES = 30
QUICK = ("png", "webp", "npy", "pth", "recipe", "request", "metadata.jsonl", "tar", "store")
"""Kinds whose right files are made and read in no time."""


def run(toy, folder, cases, kinds=KINDS, **options):
    """The report on cases, and the campaign."""
    campaign = workers.Campaign(folder, toy, options.pop("out", folder / "found"), SEED, **options)
    campaign.prepare([kind for kind in kinds if kind.name in {case.kind for case in cases}])
    return campaign.run(cases), campaign


@pytest.mark.fuzz
@pytest.mark.timeout(60 * MINUTES + 600)
def test_the_campaign(toy_folder, tmp_path):
    named, case = os.environ.get("FUZZ_KINDS", ""), os.environ.get("FUZZ_CASE", "")
    kinds = [kind for kind in KINDS if not named or kind.name in named.split(",")]
    cases = [workers.Case.of(case)] if case else [*right(kinds), *workers.shared(FILES, kinds)]
    out = Path(os.environ.get("FUZZ_OUT", "out/fuzz")).absolute()
    processes = int(os.environ.get("FUZZ_WORKERS", 2))
    report, _ = run(toy_folder, tmp_path, cases, out=out, workers=processes, minutes=MINUTES)
    words = report.words(SEED)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.txt").write_text(words)
    print(words)
    assert not report.findings, words
    assert sum(report.files.values()) == len(cases), "not all were run in the time"


def right(kinds):
    """A case for each kind's last right sample, and those before it, as far as every kind has them."""
    return [workers.Case(kind.name, -1) for kind in kinds]


def test_some_mutated_files_of_every_quick_kind_are_read_or_refused(toy_folder, tmp_path):
    cases = [workers.Case(kind, number) for number in range(1, 12) for kind in QUICK]
    cases += [workers.Case("recipe", -1), workers.Case("store", -1)]  # whose mutated files are all refused, as may be
    report, _ = run(toy_folder, tmp_path, cases, workers=1)
    assert not report.findings, report.words(SEED)
    assert sum(report.files.values()) == len(cases) > 100
    assert {kind for kind, outcome in report.outcomes if outcome == "value"} == set(QUICK)  # not all is refused


# --- the guards -------------------------------------------------------------------------------------------------------


def read_in_c(path, setting):
    cv2.imread(str(setting.folder / "outside" / "photo.png"))


def loop(path, setting):
    while True:
        pass


def warn_raw(path, setting):
    warnings.warn("of a library", DeprecationWarning, stacklevel=1)


def write_raw(path, setting):
    readers.cli.main = lambda: print("\x1b[31mx")  # in a process that ends after this
    readers.command("inspect")


def refuse(words):
    def read(path, setting):
        raise Invalid(words)

    return read


BAD = {
    "hang": loop,
    "growth": lambda path, setting: bytearray(100 * 2**20),
    "crash (SIGSEGV)": lambda path, setting: ctypes.string_at(0),
    "crash (SIGKILL)": lambda path, setting: os.kill(os.getpid(), signal.SIGKILL),
    "waits": lambda path, setting: (os.mkfifo("pipe"), Path("pipe").read_bytes()),
    "KeyError": lambda path, setting: {}["x"],
    "foreign file": lambda path, setting: Path("/etc/passwd").read_text(),
    "foreign file (native)": read_in_c,
    "foreign write": lambda path, setting: (setting.toy / "x").touch(),
    "process": lambda path, setting: subprocess.run(["true"]),
    "network": lambda path, setting: socket.create_connection(("127.0.0.1", 9)),
    "pickle": lambda path, setting: __import__("pickle").loads(b"cos\nsystem\n."),
    "warning": warn_raw,
    "printed": lambda path, setting: os.write(2, b"libpng: \x1b[2J"),
    "long or strange sentence": refuse("x " * 2500),
    "terminal": write_raw,
}
GOOD = {
    "value": lambda path, setting: path.read_bytes(),
    "refused": refuse("A file is no picture."),
    "writes": lambda path, setting: (setting.folder / "out" / "x").write_text("x"),
    "links": lambda path, setting: (Path("a").symlink_to(path.name), Path("a").read_bytes()),
}


def test_each_guard_tells_what_happened_and_goes_on(toy_folder, tmp_path, monkeypatch):
    for name, value in {"CPU_SECONDS": 0.3, "WAIT": 8, "GROWTH": 60 * 2**20}.items():
        monkeypatch.setattr(guards, name, value)
    for name, read in (BAD | GOOD).items():
        monkeypatch.setitem(READERS, name, readers.Reader(read, ()))
    [kind] = [replace(kind, readers=(*BAD, *GOOD)) for kind in KINDS if kind.name == "png"]
    monkeypatch.setattr(workers, "KINDS", [kind])
    report, campaign = run(toy_folder, tmp_path, [workers.Case("png", -1, name) for name in (*BAD, *GOOD)], [kind])
    found = {case.reader: (kind, case) for (kind, _), cases in report.findings.items() for case, _ in cases}
    assert {name: kind for name, (kind, _) in found.items()} == {name: name for name in BAD}
    words = report.words(SEED)
    assert all(f"FUZZ_SEED={SEED} FUZZ_CASE='png:-1:{name}'" in words for name in BAD)
    assert (campaign.out / "png--1" / "case" / "photo.png").is_file()  # kept, to look at


def test_a_case_is_the_same_each_time_and_another_with_another_seed(toy_folder, tmp_path):
    made = {}
    for name, kind in (("png", "png"), ("again", "png"), ("pth", "pth"), ("again pth", "pth")):
        [row] = [row for row in KINDS if row.name == kind]
        samples = corpus.samples_of(row, tmp_path / kind, toy_folder)
        for seed in (1, 2):
            for number in range(6):
                workers.make_case(row, number, seed, samples, target := tmp_path / "cases" / f"{name}{seed}{number}")
                made[name, seed, number] = {
                    path.name: path.read_bytes() for path in target.rglob("*") if path.is_file()
                }
    for name in ("png", "pth"):
        again = {"png": "again", "pth": "again pth"}[name]
        assert all(made[name, seed, i] == made[again, seed, i] for seed in (1, 2) for i in range(6))
        assert sum(made[name, 1, i] != made[name, 2, i] for i in range(6)) > 3


# --- all readers are listed -------------------------------------------------------------------------------------------


def test_every_function_that_takes_a_file_has_a_reader_or_a_reason():
    covered = {name for reader in READERS.values() for name in reader.covers if " " not in name}
    assert not covered & readers.EXCUSED.keys()
    assert readers.taking_files() == covered | readers.EXCUSED.keys()


def test_every_command_and_option_that_takes_a_file_has_a_reader_or_a_reason():
    covered = {name for reader in READERS.values() for name in reader.covers if " " in name}
    assert readers.options_for_files() == covered | readers.EXCUSED_OPTIONS.keys()


def test_every_reader_reads_some_kind_and_every_kind_enough_files():
    assert {name for kind in KINDS for name in kind.readers} == READERS.keys()
    counts = dict.fromkeys((kind.name for kind in KINDS), 0)
    for case in workers.shared(21_000):
        counts[case.kind] += 1
    assert min(counts.values()) >= 500 and sum(counts.values()) >= 21_000
    assert re.fullmatch(r"[\w .]+", "".join(counts))  # they are names of folders
    page = (Path(__file__).parents[2] / "docs" / "safety.md").read_text(encoding="utf-8")
    assert f"{len(KINDS)} kinds through {len(READERS)} readers" in page
