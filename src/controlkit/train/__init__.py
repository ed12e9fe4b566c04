"""Training a control: the recipe and its parts, the objective, evaluations on the way, checkpoints, the run."""

from controlkit.train.ending import Ending, read_ending
from controlkit.train.parts import BatchPlan, Resolved
from controlkit.train.records import EvaluationSummary, Record, best_of, found_step, should_stop, summary_of, verdict
from controlkit.train.run import Run, train_control
from controlkit.train.schedule import learning_rate
from controlkit.train.setup import hint_specs, resolve, training_pairs
from controlkit.train.step import Batch, controlled, draw_batch, objective

__all__ = [
    "Batch",
    "BatchPlan",
    "Ending",
    "EvaluationSummary",
    "Record",
    "Resolved",
    "Run",
    "best_of",
    "controlled",
    "draw_batch",
    "found_step",
    "hint_specs",
    "learning_rate",
    "objective",
    "read_ending",
    "resolve",
    "should_stop",
    "summary_of",
    "train_control",
    "training_pairs",
    "verdict",
]
