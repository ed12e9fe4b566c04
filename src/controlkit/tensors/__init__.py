"""Files of named tensors: read without trusting them, and written in place where they are larger than memory."""

from controlkit.tensors.pickles import PICKLES
from controlkit.tensors.reader import Shape, TensorFile, of_tensors, open_safetensors, open_tensors
from controlkit.tensors.writer import TensorWriter, read_filled

__all__ = [
    "PICKLES",
    "Shape",
    "TensorFile",
    "TensorWriter",
    "of_tensors",
    "open_safetensors",
    "open_tensors",
    "read_filled",
]
