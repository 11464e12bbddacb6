"""One thread per test process: the tensors are tiny, and two processes run side by side. Random examples by the tier."""

import os

os.environ["NUMBA_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# the same for every property test; `scripts/test` chooses the first with --hypothesis-profile
settings.register_profile("fast", max_examples=15, deadline=None)
settings.register_profile("all", max_examples=60, deadline=None)
settings.load_profile("all")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
