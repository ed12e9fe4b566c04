"""Entries of a store, and a process that writes them: it imports the store alone, so that it starts soon.

python store_writer.py FOLDER FIRST
"""

import sys
from pathlib import Path

import torch

from controlkit.data.store import Store, key_of


def entries(count, start=0):
    return {key_of("x", str(i)): {"value": torch.full((8,), float(i))} for i in range(start, start + count)}


def write_many(folder, start):
    with Store(folder) as store:
        for first in range(0, 200, 10):
            store.put(entries(10, start + first))


if __name__ == "__main__":
    write_many(Path(sys.argv[1]), int(sys.argv[2]))
