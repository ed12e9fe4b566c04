"""The sentence on the paper's order: pairs that come the other way are named, rows without figures left out."""

from controlkit.measure import Figure
from controlkit.reproduce import table2
from controlkit.reproduce.order import Rank, order_words, ranks
from controlkit.reproduce.rows import Kept


def rank(title, paper, mean):
    return Rank(title, paper, mean, mean - 0.05, mean + 0.05)


def test_the_order_holds_or_each_pair_against_it_is_named():
    holds = [rank("lite", 0.3, 0.3), rank("full", 0.4, 0.5), rank("old", 0.2, 0.1)]
    assert order_words("IoU", holds, higher_is_better=True) == (
        "The paper's order by IoU, best first: full, lite, old. It holds here."
    )
    turned = [rank("full", 0.4, 0.3), rank("lite", 0.3, 0.35), rank("old", 0.2, 0.6)]
    words = order_words("IoU", turned, higher_is_better=True)
    assert words.endswith(
        "Here it does not hold: lite before full (0.35, 0.30; their intervals overlap); old before full (0.60, 0.30); "
        "old before lite (0.60, 0.35)."
    )
    assert "It holds" in order_words("FID", [rank("full", 15, 2.0), rank("lite", 17, 3.0)], higher_is_better=False)
    assert "lite before full" in order_words("FID", [rank("full", 15, 3.0), rank("lite", 17, 2.0)], False)
    assert order_words("IoU", holds[:1], higher_is_better=True) == ""


def test_rows_of_now_and_of_before_are_ranked_and_those_without_figures_are_not():
    ours = {"mean": 0.5, "low": 0.4, "high": 0.6}
    made = {"date": "today", "controlkit": "0"}
    kept = Kept("piti", "PITI", ["PITI"], {"paper": [0.26, 0.16], "ours": ours, "made": made})
    edited = Kept("taming", "VQGAN", ["VQGAN"], {"paper": None, "ours": ours, "made": made})
    rows = [
        table2.Row("truth", "Truth", ours=Figure(0.9, 0.9, 0.9), spread=0.1, paper=(0.58, 0.1)),
        table2.Row("lite", "lite", ours=Figure(0.3, 0.2, 0.35), spread=0.1, paper=(0.32, 0.12)),
        table2.Row("ldm-scratch", "LDM", paper=(0.31, 0.09), note="no weights"),
        table2.Row("shipped", "seg, as shipped", ours=Figure(0.5, 0.4, 0.6), spread=0.1),
        kept,
        edited,
    ]
    found = ranks(rows, lambda facts: (facts["paper"][0], facts["ours"]), leave_out=("truth",))
    assert [one.title for one in found] == ["lite", "PITI"]
    table = table2.Table2(rows, {}, "", floor={}, ceiling=Figure(0.9, 0.9, 0.9))
    assert "PITI before lite (0.50, 0.30)" in table.caption()
