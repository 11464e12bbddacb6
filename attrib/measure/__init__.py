"""Measurements: what is to be explained. Any callable `model -> (Q,)` is one; these are the usual ones, over a batch.

A `Measurement` made here knows its batch, one row per query, so that the queries are run side by side. Units: nats for
`log_prob`, `loss`, `continuation` and `tokens`, the model's own for `logit` and `margin`. A model may return its logits
as they are, in an object or a dict by that name, or first in a tuple.

    measurement = attrib.measure.log_prob(x_test, y_test)
    measurement(model)                                     # (Q,)

Any of them may be taken of an average of the model over the run, see `averaged`.
"""

from .averages import Average, Ema, OfAverage, Swa, averaged
from .base import Measurement
from .classes import log_prob, logit, loss, margin
from .language import continuation, tokens
from .outputs import IGNORED, logits_of

__all__ = [
    "IGNORED",
    "Average",
    "Ema",
    "Measurement",
    "OfAverage",
    "Swa",
    "averaged",
    "continuation",
    "log_prob",
    "logit",
    "logits_of",
    "loss",
    "margin",
    "tokens",
]
