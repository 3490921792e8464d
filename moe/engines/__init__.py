"""Who owns data parallelism and the optimizer's step."""

from .data_parallel import DataParallel

__all__ = ["DataParallel"]
