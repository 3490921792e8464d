"""Load balancing: counts the load of an optimizer step, and computes the balance losses from it."""

from .auto import AutoStep
from .balancer import Balancer, loss_terms
from .bias import initial_bias
from .hooks import register_while_alive
from .losses import SCOPES, loss_value
from .own_step import OwnStep, counting_pass
from .recompute import recompute
from .scaler import use_gradient_scaler
from .step import LayerStep, Step, StepTotals, random_state_kept
from .visit import Visit

__all__ = [
    "SCOPES",
    "AutoStep",
    "Balancer",
    "LayerStep",
    "OwnStep",
    "Step",
    "StepTotals",
    "Visit",
    "counting_pass",
    "initial_bias",
    "loss_terms",
    "loss_value",
    "random_state_kept",
    "recompute",
    "register_while_alive",
    "use_gradient_scaler",
]
