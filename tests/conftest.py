"""One thread per test process: the tensors are tiny, and two processes run side by side. Random examples by the tier.

What is imported stays: it is taken out of Python's search for garbage, which goes through half a million objects each time.
Nothing is waited for until it is on the disk: no test cuts the power, those that would log the calls of `os.fsync` and go by
a model of a disk. A short run makes 80 of them, most of the time that recording it takes.
"""

import gc
import os

os.environ["NUMBA_NUM_THREADS"] = "1"

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
os.fsync = lambda descriptor: None  # type: ignore[assignment]

# the same for every property test; `scripts/test` chooses the first with --hypothesis-profile
settings.register_profile("fast", max_examples=15, deadline=None)
settings.register_profile("all", max_examples=60, deadline=None)
settings.load_profile("all")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()


CHROMIUM = Path("/usr/bin/chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.exists():
        pytest.skip(f"no browser: expected {CHROMIUM}")
    with sync_api.sync_playwright() as play:
        found = play.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield found
        found.close()
