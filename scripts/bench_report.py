"""How large the report page is, how long it takes to write and to open, for 20 queries x 2000 steps x 4000 examples, and for
200 queries x 60 steps x 10 000 examples, each query a token, of 300 tensors.

The contributions are made up: examples of very different weight, in phases, under noise; `describe` gives text, a
page of it, or images of 32 x 32 pixels. Opening is timed in a headless Chromium, if there is one.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import xarray as xr

import attrib

CHROMIUM = Path("/usr/bin/chromium")


def make(queries: int, steps: int, examples: int, groups: int, seed: int = 0) -> attrib.Result:
    """A result that adds up, of the sizes given."""
    random = np.random.default_rng(seed)
    contributions = random.standard_normal((queries, steps, examples))
    contributions *= random.lognormal(0, 1.5, (queries, 1, examples)) * np.exp(-np.linspace(0, 3, steps))[None, :, None]
    contributions += (random.standard_normal((queries, 1, examples)) ** 3) * 0.05
    by_group = contributions.sum(2, keepdims=True) * random.dirichlet(np.ones(groups), (queries, 1))
    total = by_group.sum(2).cumsum(1)
    zeros, q = np.zeros(queries), ("query",)
    variables = {
        **dict.fromkeys(("initial", "residual", "rounding", "spacing", "gross"), (q, zeros)),
        "final": (q, total[:, -1]),
        "decay": (("query", "step", "group"), np.zeros_like(by_group)),
        "inherited": (("query", "group"), np.zeros((queries, groups))),
        "timeline": (("query", "update_step", "group"), by_group),
        "curve": (("query", "state"), np.concatenate([zeros[:, None], total], 1)),
        **{f"{name}_identity": (("step",), np.zeros(steps)) for name in ("batch", "step", "measurement")},
        "contribution_step_example": (("query", "step", "example"), contributions),
        "contribution_step_group": (("query", "step", "group"), by_group),
    }
    names = [f"block.{g // 8}.part{g % 8 // 2}.{g % 2}" for g in range(groups)]
    coordinates = {"query": range(queries), "step": range(steps), "update_step": range(steps), "state": range(steps + 1),
                   "example": range(examples), "group": names}  # fmt: skip
    return attrib.Result(xr.Dataset(variables, coordinates, {"measurement": "tokens", "units": "nats"}))


def opening(path: Path) -> float:
    """Seconds until the page has drawn everything."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        start = time.perf_counter()
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-ready=yes]", timeout=120_000)
        seconds = time.perf_counter() - start
        browser.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--examples", type=int, default=4000)
    options = parser.parse_args()
    image, words = np.random.default_rng(1), [f"word{k}" for k in range(5000)]
    usual = options.queries, options.steps, options.examples
    describe = {
        "text": lambda e: f"{e % 113} + {e // 113} = {(e % 113 + e // 113) % 113}",
        "long": lambda e: " ".join(words[k] for k in np.random.default_rng(e).integers(0, len(words), 400)),
        "image": lambda e: (image.integers(0, 255, (32, 32, 3), dtype=np.uint8), f"a {e % 10}"),
    }

    def tag(example: int) -> str:
        return f"class {example % 10}"

    print("| queries | steps | examples | groups | described by | size | written in | opened in |\n" + "|---" * 8 + "|")
    with tempfile.TemporaryDirectory() as folder:
        rows = [(*usual, 6, "text"), (*usual, 6, "image"), (*usual, 160, "image"), (200, 60, 10_000, 300, "long")]
        for *sizes, kind in rows:
            result = make(*sizes)
            start = time.perf_counter()
            path = attrib.report.write(result, Path(folder) / "report.html", describe[kind], tag=tag, progress=False)
            seconds = time.perf_counter() - start
            opened = f"{opening(path):.1f} s" if CHROMIUM.exists() else "no browser"
            size = path.stat().st_size / 1e6
            print("".join(f"| {n} " for n in sizes) + f"| {kind} | {size:.2f} MB | {seconds:.1f} s | {opened} |")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB, the result included")


if __name__ == "__main__":
    main()
