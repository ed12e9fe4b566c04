"""A run's log as a picture: loss and obedience over steps.

python recipes/plot.py runs/fill50k --out docs/fill50k.png
"""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from controlkit.measure import FOUND
from controlkit.train import found_step, summary_of


def main(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("run.png"),
) -> None:
    """Draw loss and obedience of a training run."""
    import matplotlib.pyplot as plt

    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    measured = [r for r in records if "obedience" in r]
    found = found_step([seen for r in records if (seen := summary_of(r))])
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(8, 4.6), layout="constrained")
    loss = np.array([r["loss"] for r in records])
    window = max(len(loss) // 50, 1)
    smooth = np.convolve(loss, np.ones(window) / window, "valid")
    steps = [r["step"] for r in records]
    top.plot(steps, loss, color="#bbb", linewidth=0.6)
    top.plot(steps[window - 1 :], smooth, color="#24527a")
    top.set(ylabel="loss", ylim=(0, np.quantile(loss, 0.99)))
    at = [r["step"] for r in measured]
    low, high = np.array([r["obedience_interval"] for r in measured]).T
    bottom.fill_between(at, low, high, color="#24527a", alpha=0.2, linewidth=0)
    bottom.plot(at, [r["obedience"] for r in measured], "o-", color="#24527a", markersize=3)
    bottom.axhline(FOUND, color="#999", linewidth=0.8, linestyle=":")
    bottom.set(ylabel="obedience", xlabel="step", ylim=(min(-0.1, float(low.min())), 1))
    if found is not None:
        for axis in (top, bottom):
            axis.axvline(found, color="#c0392b", linewidth=1)
        bottom.annotate(f" control found at step {found}", (found, 0.9), color="#c0392b")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    print(out)


if __name__ == "__main__":
    typer.run(main)
