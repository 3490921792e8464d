"""Commands: each is ``python -m equimoe.launch.<name>``. ``train`` can be a rank of torchrun, too."""

import os

# torch's C++ warnings would come between the lines of a run's progress
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
