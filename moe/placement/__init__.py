"""Which ranks a layer works on, which of them owns which expert, and which hold replicas of it in a step."""

from .file import read_owners, write_owners
from .moves import reshard, reshard_by_sum
from .owners import Owners
from .placement import Placement
from .plan import Forecast, busiest, calibrate, expected_rows, materialize, replicate, rows_by_rank
from .replicas import Destinations, Replicas

__all__ = [
    "Destinations",
    "Forecast",
    "Owners",
    "Placement",
    "Replicas",
    "busiest",
    "calibrate",
    "expected_rows",
    "materialize",
    "read_owners",
    "replicate",
    "reshard",
    "reshard_by_sum",
    "rows_by_rank",
    "write_owners",
]
