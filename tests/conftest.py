"""One thread per test process: the tensors are tiny, and two processes run side by side."""

import os

os.environ["NUMBA_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)
