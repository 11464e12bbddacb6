"""The demo: train modular addition until it generalises, recorded, and account for held-out predictions."""

import time
from collections.abc import Callable
from pathlib import Path

from .. import measure
from ..attribute import attribute
from ..report import figures, text, write
from ..run import open_run
from .modular import GENERALISED, ordered_pairs, train_until_generalised
from .recipe import cross_entropy

GROUPS = {"embedding": ["embedding.*"], "hidden": ["hidden.*"], "output": ["output.*"]}
QUERIES = 4
TOLERANCE = 1e-5  # float32 replay of float32 training, of the largest term


def demo(folder: Path, seed: int = 0, say: Callable[[str], None] = print) -> None:
    """Write run.zarr, result.zarr, timeline.png and report.html to `folder`, and tell the story on the way."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = ordered_pairs(31, 0.5, seed)
    say(f"1. Train a ReLU MLP on {len(pairs.train)} of the {len(pairs.x)} sums a + b modulo 31, recording every step.")
    start = time.perf_counter()
    model, curve = train_until_generalised(pairs, folder / "run.zarr", seed=seed, overwrite=True)
    steps, test = curve[-1].step, curve[-1].test
    memorised = next((seen.step for seen in curve if seen.train >= GENERALISED), None)
    say(
        f"   {steps} steps in {time.perf_counter() - start:.1f} s: the training pairs were memorised by step {memorised},"
    )
    say(f"   the held-out pairs are {test:.1%} right at step {steps}.\n")
    run = open_run(folder / "run.zarr")
    say(f"{run}\n")

    queries = pairs.test[:: len(pairs.test) // QUERIES][:QUERIES]
    names = [pairs.describe(int(q)) for q in queries]
    say("2. Attribute the log-probability of the right answer to " + "; ".join(names) + ",")
    say("   none of which was trained on, to training pairs, steps and layers.")
    start = time.perf_counter()
    measurement = measure.log_prob(pairs.x[queries], pairs.y[queries], names)
    result = attribute(run, model, measurement, loss=cross_entropy, groups=GROUPS)
    say(f"   {time.perf_counter() - start:.1f} s.\n")
    say("   The ledger: initial + examples + decay + inherited + residual = final, in nats.\n")
    say(f"{result.check(TOLERANCE)}\n")
    say(
        "   Weight decay pulls the weights back at every step and the examples push them out again, so the two terms are"
    )
    say("   large, of opposite sign, and nearly cancel: what is left over is the change of the log-probability.\n")
    say(f"3. The ten largest contributions to query 0, {names[0]} (accounting, not a counterfactual):\n")
    say(text.largest(result, 0, 10, pairs.describe) + "\n")
    say("4. The layers over time: change of the log-probability made by each layer's updates, weight decay included.\n")
    say(text.timeline(result, 0) + "\n")
    result.save(folder / "result.zarr", overwrite=True)
    figures.overview(result, 0, f"log p({names[0]})", pairs.describe, folder / "timeline.png")
    write(result, folder / "report.html", pairs.describe, tag=lambda i: f"sum {int(pairs.y[i])}", progress=False)
    say(
        "Saved: " + ", ".join(str(folder / name) for name in ("run.zarr", "result.zarr", "timeline.png", "report.html"))
    )
    say("Open report.html in a browser: choose a window of steps there, and see which pairs counted in it.")
