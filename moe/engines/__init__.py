"""Who owns data parallelism and the optimizer's step."""

from .build import build_engine
from .data_parallel import DataParallel
from .pipelined import Pipelined

__all__ = ["DataParallel", "Pipelined", "build_engine"]
