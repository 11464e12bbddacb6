"""attrib: exact training attribution for PyTorch.

Record a training run, then rebuild any prediction as a sum over training examples, steps and parameter groups, plus
weight decay, inherited momentum and a residual that is measured.

    recorder = attrib.record(optimizer, model, loss, "run.zarr")      # one line in the training loop
    run = attrib.open_run("run.zarr")
    result = attrib.attribute(run, model, attrib.measure.log_prob(x_test, y_test), loss=loss)
    print(result.check())
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

# Installed, kernels/ is inside this package. In the source tree it stands beside it: it is this package's all the same.
if not (Path(__file__).parent / "kernels").exists():
    spec = spec_from_file_location(f"{__name__}.kernels", Path(__file__).parent.parent / "kernels" / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    kernels = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(kernels)
    del spec

from . import errors, hf, intervention, lightning, measure, report
from .attribute import attribute
from .batch import shared
from .counterfactual import (
    Outcomes,
    lds,
    leave_out,
    mislabelled_auc,
    open_outcomes,
    random_subsets,
    retrain_subsets,
)
from .development import (
    ablate,
    barrier,
    clusters,
    connectivity,
    convexity_gap,
    curvature,
    evaluate,
    interpolate,
    moves,
    settled,
    similarity,
    vestiges,
    what_if,
)
from .difference import difference
from .influence import influence
from .intervention import replay, retrain
from .path import GaussLegendre, Midpoint, Secant
from .phases import Phases, onset, phases
from .plan import Plan, plan
from .recorder import Recorder, record
from .result import Difference, Influence, Result, open_result
from .run import Run, open_run
from .setup import Setup
from .store import Compaction, compact
from .verify import verify

__all__ = [
    "Compaction",
    "Difference",
    "GaussLegendre",
    "Influence",
    "Midpoint",
    "Outcomes",
    "Phases",
    "Plan",
    "Recorder",
    "Result",
    "Run",
    "Secant",
    "Setup",
    "ablate",
    "attribute",
    "barrier",
    "clusters",
    "compact",
    "connectivity",
    "convexity_gap",
    "curvature",
    "difference",
    "errors",
    "evaluate",
    "hf",
    "influence",
    "interpolate",
    "intervention",
    "lds",
    "leave_out",
    "lightning",
    "measure",
    "mislabelled_auc",
    "moves",
    "onset",
    "open_outcomes",
    "open_result",
    "open_run",
    "phases",
    "plan",
    "random_subsets",
    "record",
    "replay",
    "report",
    "retrain",
    "retrain_subsets",
    "settled",
    "shared",
    "similarity",
    "verify",
    "vestiges",
    "what_if",
]
