"""Which ranks a layer works on, which of them owns which expert, and which hold replicas of it in a step."""

from .file import read_owners, write_owners
from .owners import Owners
from .placement import Placement
from .plan import Forecast, calibrate, materialize, reshard, rows_by_rank
from .replicas import Destinations, Replicas

__all__ = [
    "Destinations",
    "Forecast",
    "Owners",
    "Placement",
    "Replicas",
    "calibrate",
    "materialize",
    "read_owners",
    "reshard",
    "rows_by_rank",
    "write_owners",
]
