"""Mutated files of every kind through every reader: each is read, or refused in one sentence, and nothing else happens."""

import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")  # what a reading warns of is looked at where it is read
workers = pytest.importorskip("workers", reason="the campaign runs on Linux")

from corpus import KINDS  # noqa: E402

SEED = int(os.environ.get("FUZZ_SEED", 1))
FILES = int(os.environ.get("FUZZ_FILES", 20_000))
CASE = os.environ.get("FUZZ_CASE", "")
ONLY = os.environ.get("FUZZ_KINDS", "")
WORKERS = int(os.environ.get("FUZZ_WORKERS", 2))
OUT = os.environ.get("FUZZ_OUT", "out/fuzz")


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
def test_the_campaign(toy_folder, tmp_path_factory):
    kinds = [kind for kind in KINDS if not ONLY or kind.name in ONLY.split(",")]
    campaign = workers.Campaign(tmp_path_factory.mktemp("fuzz"), toy_folder, Path(OUT).absolute(), SEED, WORKERS)
    cases = workers.shared(FILES, kinds)
    if CASE:
        cases = [workers.Case.of(CASE)]
        kinds = [kind for kind in KINDS if kind.name == cases[0].kind]
    campaign.prepare(kinds)
    report = campaign.run(cases)
    words = report.words(SEED)
    print(words)
    campaign.out.mkdir(parents=True, exist_ok=True)
    (campaign.out / "report.txt").write_text(words)
    assert not report.findings, words
    assert sum(report.files.values()) == len(cases), "not all were run in the time"
