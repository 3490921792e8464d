"""Inference: text generation with a key/value cache, and the losses of given texts."""

from .generate import generate
from .sample import Sampling
from .score import Window, score, windows

__all__ = ["Sampling", "Window", "generate", "score", "windows"]
