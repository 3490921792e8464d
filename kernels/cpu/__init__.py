"""The torch backend's products on a CPU, expert by expert, which is faster there than grouped products of many rows.

Two environment variables help, set before Python starts: ``OMP_WAIT_POLICY=passive`` if PyTorch uses several threads
(those that wait then leave the cores to others), and ``THP_MEM_ALLOC_ENABLE=1``, with which PyTorch asks Linux for huge
pages (large tensors are then mapped faster). The large buffers of these products come from a pool (memory.py).
"""
