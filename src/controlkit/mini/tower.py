"""An image-text tower in the manner of CLIP, small: the text half conditions ``mini``, a second one referees.

Two towers of this class are trained by ``recipes/mini.py``, with different seeds. One gives its text
half to the base and is then thrown away; the other never meets the base and scores its pictures (prompt
adherence, and the features of FID).
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, ResNetConfig, ResNetModel

from controlkit.mini.stored import Stored, resized

WINDOW = 32  # tokens, start and end marks included
_MARKS = ["<|startoftext|>", "<|endoftext|>"]


def train_tokenizer(texts: list[str], vocabulary: int, folder: Path) -> CLIPTokenizer:
    """A byte-pair tokenizer in CLIP's format, learnt from ``texts`` and written to ``folder``.

    Every byte is a word of its own as well, inside and at the end of a word, so that no prompt is unknown
    (CLIP's unknown mark is its end mark, which would cut the prompt there).
    """
    host = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = host.normalizer, host.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(_MARKS), initial_alphabet=sorted(alphabet), end_of_word_suffix="</w>"
    )
    learner.train_from_iterator(texts, trainer)
    bpe = json.loads(learner.to_str())["model"]
    words = dict(bpe["vocab"])
    for mark in [*(f"{c}</w>" for c in sorted(alphabet)), *_MARKS]:
        words.setdefault(mark, len(words))
    merges = [tuple(pair) for pair in bpe["merges"]]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(words, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]), encoding="utf-8")
    tokenizer = CLIPTokenizer(vocab=words, merges=merges, model_max_length=WINDOW)
    tokenizer.save_pretrained(folder)
    return tokenizer


class ImageTextTower(Stored):
    """A small ResNet and a CLIP text transformer with a shared space of unit vectors.

    The tokenizer's files lie beside its own.
    """

    def __init__(self, config: dict) -> None:
        super().__init__(config)
        self.text = CLIPTextModel(CLIPTextConfig(**config["text"]))
        self.image = ResNetModel(ResNetConfig(**config["image"]))
        self.text_projection = nn.Linear(config["text"]["hidden_size"], config["space"], bias=False)
        self.image_projection = nn.Linear(config["image"]["hidden_sizes"][-1], config["space"], bias=False)
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def features(self, pixels: Tensor) -> Tensor:
        """Pooled features (B, C) of pictures (B, 3, H, W) in [-1, 1], resized to the tower's size."""
        return self.image(resized(pixels, self.config["pixels"])).pooler_output.flatten(1)

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Unit vectors (B, space) of pictures (B, 3, H, W) in [-1, 1]."""
        return F.normalize(self.image_projection(self.features(pixels)), dim=-1)

    def embed_texts(self, tokens: Tensor) -> Tensor:
        """Unit vectors (B, space) of token rows (B, WINDOW)."""
        return F.normalize(self.text_projection(self.text(tokens).pooler_output), dim=-1)

    def contrast(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """CLIP's symmetric loss over a batch of pairs; rows with equal tokens count as one class."""
        logits = self.log_scale.exp().clamp(max=100) * self.embed_images(pixels) @ self.embed_texts(tokens).T
        same = (tokens[:, None] == tokens[None]).all(-1).float()
        target = same / same.sum(-1, keepdim=True)
        return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
