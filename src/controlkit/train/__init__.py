"""Training a control: what a recipe asks for, the objective, measuring on the way, checkpoints, the run."""

from controlkit.train.records import EvaluationSummary, Record, best_of, found_step, should_stop, summary_of, verdict
from controlkit.train.run import train_control
from controlkit.train.schedule import learning_rate
from controlkit.train.setup import hints_of, plan_of, training_pairs
from controlkit.train.step import Batch, controlled, draw_batch, objective

__all__ = [
    "Batch",
    "Record",
    "EvaluationSummary",
    "best_of",
    "controlled",
    "draw_batch",
    "should_stop",
    "found_step",
    "hints_of",
    "learning_rate",
    "objective",
    "plan_of",
    "summary_of",
    "train_control",
    "training_pairs",
    "verdict",
]
