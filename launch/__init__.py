"""Commands, each run as ``python -m equimoe.launch.<name>``. ``train`` can also be started by torchrun."""

import os

# torch's C++ warnings would interrupt the progress output
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
