"""Setups for the command line: the runs of `training.train` over the small MLP, and setups that fail."""

import numpy as np
import torch
from cases import MODELS

import attrib

CASE = MODELS["mlp"]


def _measurements() -> dict[str, attrib.measure.Measurement]:
    torch.manual_seed(0)
    CASE.build()
    x, y = CASE.data(12)  # as `train` draws them
    names = [f"<b>sum {int(k)}</b>" for k in y]
    return {"log_prob": attrib.measure.log_prob(x, y, names), "margin": attrib.measure.margin(x, y, names)}


def plain() -> tuple[object, ...]:
    return CASE.build().double(), CASE.loss, _measurements()["log_prob"]


def full() -> attrib.Setup:
    return attrib.Setup(
        CASE.build().double(),
        CASE.loss,
        _measurements(),
        describe=lambda i: (np.arange(64).reshape(8, 8) * i, f"<script>alert({i})</script>"),
        describe_query=lambda q: f"query <script>alert({q})</script>",
        tag=lambda i: f"<i>{i % 3}</i>",
        groups={"first": ["embedding.*"], "rest <img src=x onerror=alert(1)>": ["hidden.*", "output.*"]},
    )


def named() -> attrib.Setup:
    """Of runs whose ids are strings."""
    return attrib.Setup(CASE.build().double(), CASE.loss, _measurements()["log_prob"], describe=lambda e: e.upper())


def callable_only() -> tuple[object, ...]:
    measurement = _measurements()["log_prob"]

    def odds(model: torch.nn.Module) -> torch.Tensor:
        return measurement(model)

    return CASE.build().double(), CASE.loss, odds


def badly_described() -> attrib.Setup:
    return attrib.Setup(*plain(), describe=lambda i: ["only one"][i + 1])  # type: ignore[arg-type]


def wrong() -> str:
    return "nothing of use"


def failing() -> None:
    raise RuntimeError("no data\nhere")


def changes() -> attrib.intervention.Penalty:
    return attrib.intervention.Penalty(lambda m: m.hidden.weight.square().sum() + m.output.bias.abs().sum(), 0.01)
