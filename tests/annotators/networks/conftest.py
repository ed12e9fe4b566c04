"""A folder of annotators' weights, empty until a test puts files into it."""

import pytest

from controlkit.annotators.networks import weights


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of annotators' weights, an empty cache, and nothing in the hub's."""
    monkeypatch.setenv(weights.FOLDER, str(tmp_path / "weights"))
    monkeypatch.setenv("CONTROLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    (tmp_path / "weights").mkdir()
    return tmp_path / "weights"
