"""Pages of pictures: what the demo and the gallery have in common."""

import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from controlkit.images import write_atomic, write_png

STYLE = """
body { font: 16px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1040px; padding: 0 1rem; color: #222 }
section { border-top: 1px solid #ddd; padding: 1rem 0 }
h2 { font-size: 1.05rem; margin: 0 0 .6rem }
.row { display: flex; flex-wrap: wrap; gap: 8px; align-items: flex-end; margin: .3rem 0 }
figure { margin: 0; width: 132px } figure img { width: 128px; height: 128px; display: block; border: 1px solid #ccc }
figcaption { font-size: .78rem; color: #555; text-align: center; min-height: 2.2em }
.gap { width: 14px }
table { border-collapse: collapse; margin: .6rem 0 } td, th { padding: .15rem .8rem .15rem 0; text-align: left }
"""

Labelled = tuple[str, np.ndarray]
"""A picture, uint8 (H, W, 3), under its label."""


class Page:
    """One HTML page in a folder, with its pictures beside it; written whole by ``write``."""

    def __init__(self, folder: Path, title: str) -> None:
        self.folder, self.title = folder, title
        self._body: list[str] = []
        self._pictures = 0

    def text(self, markup: str) -> None:
        """A piece of HTML as it is."""
        self._body.append(markup)

    def section(self, title: str, rows: Sequence[Sequence[Labelled | None]], below: str = "") -> None:
        """Rows of pictures under a heading; None is a gap. ``below`` is HTML."""
        shown = "".join(f'<div class="row">{"".join(map(self._figure, row))}</div>' for row in rows)
        self._body.append(f"<section><h2>{html.escape(title)}</h2>{shown}{below}</section>")

    def _figure(self, labelled: Labelled | None) -> str:
        if labelled is None:
            return '<div class="gap"></div>'
        label, picture = html.escape(labelled[0]), labelled[1]
        name = f"{self._pictures}.png"
        self._pictures += 1
        write_png(self.folder / name, picture)
        return f'<figure><img src="{name}" alt="{label}"><figcaption>{label}</figcaption></figure>'

    def write(self) -> Path:
        """Write ``index.html``; its path."""
        head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{self.title}</title><style>{STYLE}</style>'
        path = self.folder / "index.html"
        write_atomic(path, f"{head}{''.join(self._body)}</html>\n".encode())
        return path
