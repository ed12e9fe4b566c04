from controlkit.tensors.reader import *  # noqa
from controlkit.tensors.reader import TensorWriter, read_filled, open_tensors, TensorFile, PICKLES, Shape
