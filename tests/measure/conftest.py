"""What several of these tests measure with."""

import numpy as np
import pytest
import torch

from controlkit.measure import Referee
from controlkit.mini.tower import ImageTextTower


@pytest.fixture
def holed():
    """(a smooth picture, the same with a hole)."""
    y, x = np.mgrid[:64, :64]
    picture = np.stack([60 + x, 60 + y, 120 + 0 * x], -1).astype(np.uint8)
    hint = np.dstack([picture, np.full((64, 64), 255, np.uint8)])
    hint[20:40, 20:40] = 0
    return picture, hint


@pytest.fixture(scope="session")
def referee(toy_base, tmp_path_factory):
    """A referee with random weights, in the form the recipe saves."""
    folder = tmp_path_factory.mktemp("referee")
    tokens = toy_base.towers[0].tokenizer
    text = {name: getattr(tokens, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text |= {"vocab_size": len(tokens), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 1, "max_position_embeddings": toy_base.window}
    image = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    torch.manual_seed(0)
    ImageTextTower({"pixels": 32, "space": 8, "text": text, "image": image}).save(folder)
    tokens.save_pretrained(folder)
    return Referee(folder)
