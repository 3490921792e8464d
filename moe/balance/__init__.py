"""Load balancing: counts of the step, losses of every scope, and how they reach the router."""

from .bias import initial_bias
from .global_batch import Balancer, Pass, counting_pass
from .losses import SCOPES, loss_value
from .recompute import recompute

__all__ = ["SCOPES", "Balancer", "Pass", "counting_pass", "initial_bias", "loss_value", "recompute"]
