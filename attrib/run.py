"""A recorded run, opened for reading: parameters, batches and updates of every step."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from html import escape
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .autocast import Autocast, from_facts
from .batch import Batch
from .constants import Constant, is_low, precision, to_tensor, wide
from .errors import StoreError
from .functional import uncompiled
from .gradients import from_tensors
from .kernels.factors import Factor
from .layout import Layout
from .matching import check_digests, check_model, check_types
from .optim import Rules, describe_options, rules_in
from .steps import Blocks, RecordedPass, Steps, passes_of
from .store import Ids, Passes, Reader, Rows, local_path
from .trajectory import Trajectory

_UNFINISHED = "not closed, or interrupted: read up to its last committed block"


class Run:
    """A run in a store, read-only. Open one with `attrib.open_run`.

    Example:
        >>> run.steps, run.groups
        (12, ('hidden.weight', 'hidden.bias', 'output.weight', 'output.bias'))
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.header = reader.header
        if not reader.steps:
            raise StoreError(
                f"the run has no committed steps: got 0, expected at least 1, at {reader.target}. A block is committed "
                f"when it is full or when the recorder is closed: close it, or record with a smaller block=."
            )
        layout = self.header["layout"]
        self.layout = Layout(tuple(layout["names"]), tuple(tuple(s) for s in layout["shapes"]))
        dtype = self.header["dtype"]
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise StoreError(
                f"this attrib cannot read the run: got type {dtype}, expected one of torch's, at {reader.target}. Update "
                f"attrib."
            )
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.rules: Rules = rules_in(self.header, reader.target)

    @property
    def compute(self) -> torch.dtype:
        """What its vectors are computed with: its type, or float32 where that is less than single precision."""
        return wide(self.dtype)

    @property
    def steps(self) -> int:
        """T, the number of recorded steps that can be read."""
        return self.reader.steps

    @property
    def complete(self) -> bool:
        """Whether the recorder was closed; if not, the run was killed or is still going on."""
        return self.reader.complete

    @property
    def groups(self) -> tuple[str, ...]:
        """The default groups: one per parameter tensor."""
        return self.layout.names

    @property
    def capture(self) -> str:
        """What is stored of the shares: "replay" (nothing), "gradients" or "factors"."""
        return str(self.header["capture"])

    @property
    def unmodelled(self) -> bool:
        """Whether there is an optimizer whose update its coefficients need not explain: by signs, or without a rule."""
        return self.rules.unmodelled

    @cached_property
    def ids(self) -> Ids:
        """What the examples are called: `run.ids.of(numbers)`."""
        return Ids(self.reader)

    @cached_property
    def numbers(self) -> np.ndarray:
        """(N,) int64: the numbers of all examples that were trained on, in order. Ids that are numbers are their own; those
        of strings are in the order in which these first came."""
        numbers = np.unique(self.reader.read("index", slice(0, self.steps)))
        return numbers[numbers >= 0]

    @cached_property
    def examples(self) -> np.ndarray:
        """(N,): the ids of all examples that were trained on, in the order of `numbers`: int64, or strings (objects)."""
        return self.ids.of(self.numbers)

    @cached_property
    def trajectory(self) -> Trajectory:
        return Trajectory(self.reader, self.rules, self.layout)

    @cached_property
    def options(self) -> dict[str, list[Any]]:
        """Options of the optimizer: name -> the smallest and the largest value over steps and parameter groups. Of several
        optimizers, with the optimizer's name before it: "AdamW lr"."""
        return self.rules.options(self.reader.read("hyper", slice(0, self.steps)))

    def index(self, step: int) -> np.ndarray:
        """(B,): ids of the examples in the batch of a step, int64 or strings (objects)."""
        numbers = self._at("index", step)
        return self.ids.of(numbers[numbers >= 0])

    def batch(self, step: int) -> tuple[Any, ...]:
        """The inputs of a step of one pass, as they were given to the recorder after the index; ValueError: it was made of
        several, see `batches`."""
        passes = self.passes(step)
        if len(passes) > 1:
            raise ValueError(
                f"step {step} was made of {len(passes)} batches: run.batches({step}) has them, one by one."
            )
        return self.inputs(passes[0]).args

    def batches(self, step: int) -> list[tuple[Any, ...]]:
        """The inputs of each pass of a step, as for `batch`; `index` has the ids of all of them, one behind the other."""
        return [self.inputs(p).args for p in self.passes(step)]

    def passes(self, step: int) -> tuple[RecordedPass, ...]:
        """The passes that the gradient of a step was made of."""
        rows = self._at("row", step)
        random = self._at("random", step)[None] if "random" in self.reader else None
        return passes_of(Passes(self._at("passes", step)[None]), 0, rows[rows >= 0], random)

    def inputs(self, recorded: RecordedPass) -> Batch:
        """What the loss of a pass was given."""
        return self.reader.batch(recorded.kind, recorded.rows, recorded.shared)

    def scales(self, step: int) -> np.ndarray:
        """(B,): of each example its share over the gradient of its loss; NaN where that is fitted when attributing."""
        return np.repeat([p.scale for p in self.passes(step)], [p.size for p in self.passes(step)])

    def factor_scales(self, step: int) -> np.ndarray:
        """(B,): of each example the factor between its stored factors and its share."""
        return np.repeat([p.factor_scale for p in self.passes(step)], [p.size for p in self.passes(step)])

    def vector(self, step: int) -> Tensor:
        """(P,): all parameters of a step, 0 .. T, bit for bit."""
        return self.trajectory.state(self._state(step))

    def _state(self, step: int) -> int:
        if not -self.steps - 1 <= step <= self.steps:
            raise IndexError(f"no such state: got step {step}, expected 0 to {self.steps} of {self.reader.target}.")
        return step % (self.steps + 1)

    def whole(self, step: int) -> Tensor:
        """(P + E,): what a measurement depends on at a step, 0 .. T: all parameters, then the floating buffers that move."""
        return self.trajectory.whole(self._state(step))

    def parameters(self, step: int) -> dict[str, Tensor]:
        """Name -> tensor, the parameters that step `step` started from; T for the final ones. Bit for bit."""
        return self.layout.unflatten(self.vector(step))

    def buffers(self, step: int) -> dict[str, Tensor]:
        """Name -> tensor, the buffers that training changed (running statistics), as `parameters` has those."""
        return self.trajectory.buffers.at(self._state(step)) if self.trajectory.buffers else {}

    def shares(self, step: int) -> np.ndarray:
        """(B, P): the per-example gradient shares of a step, with capture="gradients"."""
        return self._at("gradients", step)[: self._size(step)]

    def factors(self, step: int, names: Sequence[str] | None = None) -> dict[str, list[Factor]]:
        """With capture="factors", by parameter: what times `factor_scales(step)` are the shares; see `kernels.factors`."""
        size = self._size(step)
        return from_tensors(self.header["factors"], lambda name: torch.from_numpy(self._at(name, step))[:size], names)

    def random_state(self, step: int) -> Tensor | None:
        """State of the generators before the first pass of a step (`generators`); None where the loss drew no numbers."""
        return self.passes(step)[0].random

    @property
    def accounts_remainder(self) -> bool:
        """Whether what p.grad holds beyond the shares is a row: it was recorded so, or a pass rounds to few bits."""
        return self.declares_remainder or is_low(self.precision)

    @property
    def declares_remainder(self) -> bool:
        """Whether p.grad may hold anything beyond the shares: recorded with remainder="account"."""
        return bool(self.header.get("remainder") == "account")

    @property
    def replayed(self) -> dict[str, Any]:
        """What the header says of a replay, {} of another run."""
        return dict(self.header.get("replay", {}))

    @property
    def definition(self) -> str:
        """What example i's share is: "example", the gradient of its own loss, or "rows", what flowed through its rows."""
        return str(self.header.get("shares", "example"))

    def log(self, name: str) -> np.ndarray:
        """(T,) of "loss"; "batch_identity", "step_identity", with stored shares "split_identity"; "remainder", what p.grad
        held beyond the shares, relative to it, where the run accounts for it: NaN where it was not checked; "seconds", what
        the step took without being recorded, NaN for the first."""
        return self.reader.fact(name, slice(0, self.steps))

    def load(self, model: nn.Module, step: int) -> None:
        """Put the parameters and buffers of a state, 0 .. T, and the recorded frozen parameters, into a model, bit for bit.
        Those of which the run holds the digest only are left as they are.

        Raises:
            ModelMismatchError: naming the first tensor that differs in name, shape or dtype, or in value where only its
                digest is known; the model is unchanged.
        """
        model = uncompiled(model)
        check_model(self, model, values=False)
        held = dict([*model.named_parameters(), *model.named_buffers()])
        values = {**self.parameters(step), **self.constants(), **self.buffers(step)}
        check_types(self, held)
        check_digests(self, {name: held[name] for name in self.digests if name not in values})
        with torch.no_grad():
            for name, value in values.items():
                held[name].copy_(value)

    def optimizer(self, model: nn.Module | dict[str, Tensor], step: int) -> torch.optim.Optimizer:
        """Torch's optimizer over the parameters of a model, or over tensors by name, as it was at a state, 0 .. T:
        accumulators and options bit for bit, a group per parameter tensor; at T with the options of the last step. Of a run
        of several optimizers all of them together: one `Together`, whose `optimizers` they are.

        Raises:
            ReplayError: an optimizer has no rule, so that its state is not known."""
        if not 0 <= step <= self.steps:
            raise IndexError(f"no such state: got step {step}, expected 0 to {self.steps} of {self.reader.target}.")
        own = dict(uncompiled(model).named_parameters()) if isinstance(model, nn.Module) else model
        return self.trajectory.optimizer(step, [own[name] for name in self.groups])

    @cached_property
    def digests(self) -> dict[str, Constant]:
        """Type, shape and digest of every buffer and frozen parameter, by name."""
        return {name: Constant(d, tuple(shape), digest) for name, (d, shape, digest) in self.header["digests"].items()}

    @property
    def precision(self) -> torch.dtype:
        """What a pass rounds to on its way: the run's type, or that of a frozen part in less than single precision, of an
        autocast, or of fewer bits that the model casts to."""
        types = [t for known in self.digests.values() if is_low(t := getattr(torch, known.dtype))]
        autocast = self.autocast
        return precision([*types, autocast.dtype] if autocast and autocast.rounds(self.dtype) else types, self.dtype)

    @cached_property
    def autocast(self) -> Autocast | None:
        """What the loss was computed under; None for none."""
        return from_facts(self.header["settled"]["autocast"])

    def constants(self) -> dict[str, Tensor]:
        """Buffers that training does not change and frozen parameters, by name; none with constants="digest"."""
        return {
            name: to_tensor(self.reader.read(f"constants/{n}"), self.digests[name].dtype)
            for n, name in enumerate(self.header["constants"])
            if name not in self.trajectory.buffers.known
        }

    def blocks(self, start: int, stop: int, backwards: bool = True) -> Iterator[Steps]:
        """The steps start .. stop - 1, those of each block together."""
        blocks = Blocks(self.trajectory, stop)
        ranges = blocks.ranges(range(start, stop), self.trajectory.block)
        return map(blocks.at, ranges if backwards else reversed(ranges))

    def __reduce__(self) -> tuple[Any, ...]:
        """Opened again, from whichever folder."""
        return open_run, (local_path(self.reader.target) or self.reader.target,)

    def _size(self, step: int) -> int:
        return int((self._at("index", step) >= 0).sum())

    @cached_property
    def _rows(self) -> Rows:
        return Rows(self.reader)

    def _at(self, name: str, step: int) -> np.ndarray:
        """The row of a step in an array of the store."""
        if not -self.steps <= step < self.steps:
            raise IndexError(f"no such step: got {step}, expected 0 to {self.steps - 1} of {self.reader.target}.")
        return self._rows.at(name, step % self.steps)

    def __str__(self) -> str:
        """What the run holds, a fact a line."""
        h, checked, updates = self.header, self.log("batch_identity"), self.log("step_identity")
        steps = f"{self.steps}" + ("" if self.complete else " (" + _UNFINISHED + ")")
        rows = {
            "store": self.reader.target,
            "steps": steps,
            "examples": f"{len(self.numbers)}, at most {h['slots']} a step",
            "parameters": f"{self.layout.size} in {len(self.groups)} tensors",
            "model": h["model"],
            "optimizer": h["optimizer"] + describe_options(self.options),
            "type": h["dtype"],
            "capture": h["capture"] + (", shares by rows" if self.definition == "rows" else ""),
            "size": f"{self.reader.nbytes_stored() / 2**20:.1f} MiB, {h['block']} steps a block",
            "batch identity": f"{_worst(checked)} over {int((~np.isnan(checked)).sum())} checked steps "
            f"(the first two, then every {h['check_every']})",
            "step identity": f"{_worst(updates)} over {int((~np.isnan(updates)).sum())} checked steps",
            "written with": ", ".join(f"{name} {v}" for name, v in h["versions"].items()),
            "recorded": h["recorded"],
        }
        if self.declares_remainder:
            rows["remainder"] = _worst(self.log("remainder"), "at most") + " of |p.grad|, a row of the ledger"
        if again := h.get("replay"):
            kinds = ", ".join(change["kind"] for change in again["interventions"]) or "unchanged"
            rows["replay"] = f"of {again['run']} from step {again['start']}: {kinds}"
        return "\n".join(f"{name:16s}{value}" for name, value in rows.items())

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"

    def __repr__(self) -> str:
        h, state = self.header, "complete" if self.complete else _UNFINISHED
        return (
            f"<attrib.Run {self.reader.target}: {self.steps} steps ({state}), {self.layout.size} parameters in "
            f"{len(self.groups)} tensors, {len(self.numbers)} examples, {h['model']}, {h['optimizer']}, {h['dtype']}, "
            f"capture={h['capture']!r}>"
        )


def _worst(gaps: np.ndarray, what: str = "largest gap") -> str:
    return f"{what} {np.nanmax(gaps):.2e}" if (~np.isnan(gaps)).any() else "not checked"


def open_run(store: Any) -> Run:
    """Open a recorded run, read-only.

    Args:
        store: path or zarr Store.

    Returns:
        A `Run`; of a killed run, the steps up to the last committed block (`run.steps`).

    Raises:
        StoreError: nothing there, not a run, of a newer format, no committed steps, or damaged.

    Example:
        >>> run = attrib.open_run("run.zarr")
        >>> run.steps, run.index(0).shape, run.vector(0).shape
        (12, (8,), torch.Size([75]))
    """
    return Run(Reader(store))
