"""Lets a checkout that is not installed be imported from its folder: equimoe.moe is ./moe, and so on.

An installed equimoe is a namespace package and does not contain this file.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parent)]
