"""Training a control: what a recipe asks for, the objective, measuring on the way, checkpoints, the run."""

from controlkit.train.records import Record, Seen, best_of, enough, found_step, seen_in, verdict
from controlkit.train.run import train_control
from controlkit.train.schedule import learning_rate
from controlkit.train.setup import hints_of, plan_of, training_pairs
from controlkit.train.step import Batch, controlled, draw_batch, objective, target_of

__all__ = [
    "Batch",
    "Record",
    "Seen",
    "best_of",
    "controlled",
    "draw_batch",
    "enough",
    "found_step",
    "hints_of",
    "learning_rate",
    "objective",
    "plan_of",
    "seen_in",
    "target_of",
    "train_control",
    "training_pairs",
    "verdict",
]
