"""Pages of pictures with the package's template: what the demo and the gallery share."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from controlkit.files import mark_output, write_atomic
from controlkit.images import write_png
from controlkit.pages import Figure, Section, Table, render

Labelled = tuple[str, np.ndarray]
"""A picture, uint8 (H, W, 3), under its label."""


class Page:
    """One HTML page in a folder, with its pictures beside it; ``write`` writes it whole. Words are plain text."""

    def __init__(self, folder: Path, title: str, heading: str) -> None:
        mark_output(folder, "a page")
        self.folder, self.title, self.heading = folder, title, heading
        self._body: list[str | Table | Section] = []
        self._pictures = 0

    def text(self, words: str) -> None:
        """Add a paragraph."""
        self._body.append(words)

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table."""
        self._body.append(Table(head, rows))

    def section(self, title: str, rows: Sequence[Sequence[Labelled | None]], below: str = "") -> None:
        """Add rows of pictures under a heading (None is a gap), and a paragraph below them."""
        figures = [[picture and self._figure(*picture) for picture in row] for row in rows]
        self._body.append(Section(title, figures, text=below))

    def _figure(self, label: str, picture: np.ndarray) -> Figure:
        name = f"{self._pictures}.png"
        self._pictures += 1
        write_png(self.folder / name, picture)
        return Figure(name, label)

    def write(self) -> Path:
        """Write ``index.html``; its path."""
        path = self.folder / "index.html"
        write_atomic(path, render(self.title, self.heading, self._body).encode())
        return path
