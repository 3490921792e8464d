"""Commands: each is ``python -m equimoe.launch.<name>``. ``train`` can be a rank of torchrun, too."""

import os

# torch's C++ warnings, above all DDP's advice on a flag that is set on purpose, would come before every first step
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
