"""Measurements of a training run, and how they are recorded."""

from .domains import divergences, domain_record, jensen_shannon, mean_divergence
from .routers import chosen_probability, training_score, watch_routers
from .steps import Columns, estimate_quality, layer_record, observe, step_record
from .waiting import expert_fraction, possible_degrees, straggler

__all__ = [
    "Columns",
    "chosen_probability",
    "divergences",
    "domain_record",
    "estimate_quality",
    "expert_fraction",
    "jensen_shannon",
    "layer_record",
    "mean_divergence",
    "observe",
    "possible_degrees",
    "step_record",
    "straggler",
    "training_score",
    "watch_routers",
]
