"""Lightning's Trainer, recorded by a callback: the same training, its steps, its ids."""

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import crossed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from zarr.storage import MemoryStore

import attrib
from attrib import errors

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice, and what it warns of itself

ROWS, SIZE = 22, 4  # five batches of four, one of two


@pytest.fixture(scope="module", params=["lightning.pytorch"])
def lightning(request: pytest.FixtureRequest) -> Any:
    pytest.importorskip(request.param)
    return import_module(request.param)


class Data(NamedTuple):
    x: Tensor
    y: Tensor

    @property
    def rows(self) -> TensorDataset:
        return TensorDataset(self.x, self.y)


def data() -> Data:
    generator = torch.Generator().manual_seed(1)
    return Data(torch.randn(ROWS, 3, generator=generator), torch.randint(0, 3, (ROWS,), generator=generator))


def losses(module: Any, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(module.net(x), y, reduction="none")


def module_of(lightning: Any, manual: bool = False, **made: Any) -> Any:
    """A small LightningModule; made: replaces methods of it."""

    class Small(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = not manual
            self.net = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.2), nn.Tanh(), nn.Linear(5, 3))

        def forward(self, x: Tensor) -> Any:
            return self.net(x)

        def training_step(self, batch: Any, number: int) -> Tensor | None:
            loss = losses(self, batch).mean()
            if not manual:
                return loss
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.5)
            optimizer.step()
            return None

        def validation_step(self, batch: Any, number: int) -> None:
            self.log("val", losses(self, batch).mean())

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), 0.01)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    torch.manual_seed(0)
    return type("Made", (Small,), made)()


def trainer_of(lightning: Any, *callbacks: Any, **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"accelerator": "cpu", "enable_checkpointing": False, "max_epochs": 2, **quiet, **options}
    return lightning.Trainer(callbacks=list(callbacks), **options)


def loader_of(rows: Any = None, **options: Any) -> DataLoader[Any]:
    return DataLoader(data().rows if rows is None else rows, **{"batch_size": SIZE, "shuffle": True, **options})


def equal(a: Any, b: Any) -> bool:
    """Bit for bit, whatever tree."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


class Loop(NamedTuple):
    """steps: that are made; options: of the Trainer; loader: of the DataLoader."""

    steps: int
    options: dict[str, Any]
    manual: bool = False
    loader: dict[str, Any] = {}  # noqa: RUF012


LOOPS = {
    "automatic, with a schedule, validation and checkpoints": Loop(12, {"enable_checkpointing": True}),
    "accumulating four batches, the last group of an epoch shorter": Loop(4, {"accumulate_grad_batches": 4}),
    "clipped by norm": Loop(12, {"gradient_clip_val": 0.2}),
    "bf16-mixed": Loop(12, {"precision": "bf16-mixed"}),
    "manual": Loop(12, {}, manual=True),
    "read by workers": Loop(12, {}, loader={"num_workers": 2}),
}


FAST = ("automatic, with a schedule, validation and checkpoints", "manual")


@pytest.mark.parametrize("name", crossed(LOOPS, fast=[(name,) for name in FAST]))
def test_a_recorded_trainer_trains_as_it_would_and_its_run_adds_up(name: str, lightning: Any, tmp_path: Path) -> None:
    loop, trained = LOOPS[name], []
    for n, callbacks in enumerate(([], [attrib.lightning.Record(tmp_path / "run", losses)])):
        module = module_of(lightning, loop.manual)
        trainer = trainer_of(lightning, *callbacks, **loop.options, default_root_dir=tmp_path / str(n))
        trainer.fit(module, loader_of(**loop.loader), loader_of(shuffle=False))
        trained.append(
            (module.state_dict(), trainer.optimizers[0].state_dict(), trainer.global_step, torch.get_rng_state())
        )
        if trainer.checkpoint_callback:
            saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
            trained[-1] += (saved["optimizer_states"], saved["state_dict"])
    assert equal(*trained)
    run = attrib.open_run(tmp_path / "run")
    assert run.steps == loop.steps == trained[0][2]
    assert run.complete
    drawn = np.concatenate([run.index(step) for step in range(run.steps)])
    assert sorted(drawn) == sorted([*range(ROWS)] * 2)
    stored = [batch for step in range(run.steps) for (batch,) in run.batches(step)]
    assert equal([torch.cat(parts) for parts in zip(*stored, strict=True)], [t[drawn] for t in data()])
    module.eval()
    measurement = attrib.measure.log_prob(data().x[:2], data().y[:2])
    attrib.attribute(run, module, measurement, loss=losses, progress=False).check()


def test_one_callback_serves_both_names_of_the_library(lightning: Any) -> None:
    other = pytest.importorskip("pytorch_lightning")
    callback = attrib.lightning.Record("run.zarr", losses)
    assert isinstance(callback, attrib.lightning.Record)
    assert isinstance(callback, lightning.Callback)
    assert isinstance(callback, other.Callback)


class Named(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> dict[str, Any]:
        x, y = (t[row] for t in data())
        return {"pair": (x, y), "name": f"doc-{row}", "number": row + 100}


@pytest.mark.parametrize(
    ("ids", "of_row"),
    [
        (None, lambda row: row),
        ("number", lambda row: row + 100),
        ("name", lambda row: f"doc-{row}"),
        (lambda batch: batch["number"] * 2, lambda row: 2 * row + 200),
    ],
)
def test_ids_are_rows_or_what_the_batch_says(
    ids: Any, of_row: Callable[[int], Any], lightning: Any, tmp_path: Path
) -> None:
    def step(module: Any, batch: Any, number: int) -> Tensor:
        return losses(module, batch["pair"]).mean()

    record = attrib.lightning.Record(tmp_path / "run", losses, ids, lambda batch: batch["pair"], capture="gradients")
    loader = loader_of(Named())
    before = vars(loader) | {}
    trainer_of(lightning, record, max_epochs=1).fit(module_of(lightning, training_step=step), loader)
    assert vars(loader) == before  # as it was
    run = attrib.open_run(tmp_path / "run")
    row_of = {tuple(x.tolist()): row for row, x in enumerate(data().x)}
    for n in range(run.steps):
        (((x, _),),) = run.batches(n)
        assert run.index(n).tolist() == [of_row(row_of[tuple(each.tolist())]) for each in x]


@pytest.mark.parametrize("name", ["StochasticWeightAveraging", "EMAWeightAveraging"])
def test_what_moves_the_parameters_after_training_is_no_step(
    name: str, lightning: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    averaging = getattr(lightning.callbacks, name, None)
    if averaging is None:
        pytest.skip(f"this version of Lightning has no {name}")
    options, states = {"swa_lrs": 0.01} if name.startswith("Stochastic") else {}, []
    for callbacks in ([], [attrib.lightning.Record(tmp_path / "run", losses)]):
        module = module_of(lightning)
        trainer_of(lightning, averaging(**options), *callbacks, max_epochs=4).fit(module, loader_of())
        states.append(module.state_dict())
    assert equal(*states)
    run = attrib.open_run(tmp_path / "run")
    assert (run.steps, run.complete) == (24, True)
    assert "the parameters moved after the last step" in caplog.text


def test_a_batch_that_training_step_skips_is_no_step(lightning: Any, tmp_path: Path) -> None:
    def step(module: Any, batch: Any, number: int) -> Tensor | None:
        return None if number == 2 else losses(module, batch).mean()

    states = []
    for callbacks in ([], [attrib.lightning.Record(tmp_path / "run", losses, check_every=1)]):
        module = module_of(lightning, training_step=step)
        trainer_of(lightning, *callbacks).fit(module, loader_of())
        states.append(module.state_dict())
    assert equal(*states)
    assert attrib.open_run(tmp_path / "run").steps == 10


def work(rank: int, folder: Path) -> None:
    """A process of two, as torchrun starts them."""
    process = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (folder / "port").read_text(), "TORCHELASTIC_RUN_ID": "tests"}
    os.environ.update({name: str(value) for name, value in (process | here).items()})
    lightning = import_module("lightning.pytorch")
    module = module_of(lightning)
    record = attrib.lightning.Record(folder / "run", losses, check_every=1)
    options = {"devices": 2, "strategy": "ddp", "accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    trainer_of(lightning, record, **options).fit(module, loader_of())
    torch.save(module.state_dict(), folder / f"state{rank}")


def test_a_callback_is_sent_to_the_processes_of_ddp_spawn_as_it_was_made(lightning: Any, tmp_path: Path) -> None:
    record = attrib.lightning.Record(tmp_path / "run", losses, ids=0, capture="gradients")
    sent = pickle.loads(pickle.dumps(record))
    assert isinstance(sent, lightning.Callback)
    assert vars(sent) == vars(record)


SPAWNING = """
import sys

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

import attrib


def loss(module, batch):
    return (module.net(batch[0])[:, 0] - batch[1]).square()


class Line(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2, 1)

    def training_step(self, batch, number):
        return loss(self, batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


if __name__ == "__main__":
    torch.manual_seed(0)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    record = attrib.lightning.Record(sys.argv[1], loss, check_every=1)
    options = {"accelerator": "cpu", "devices": 2, "strategy": "ddp_spawn", "max_epochs": 2}
    trainer = pl.Trainer(callbacks=[record], **options, **quiet)
    trainer.fit(Line(), DataLoader(TensorDataset(torch.randn(12, 2), torch.randn(12)), 3))
"""


@pytest.mark.slow  # two processes, each of which loads Lightning
def test_two_processes_that_a_trainer_spawns_are_one_run(lightning: Any, tmp_path: Path) -> None:
    script = tmp_path / "spawning.py"
    script.write_text(SPAWNING)
    subprocess.run([sys.executable, str(script), str(tmp_path / "run")], check=True, capture_output=True)
    run = attrib.open_run(tmp_path / "run")
    assert (run.steps, run.complete) == (4, True)
    assert [len(run.passes(step)) for step in range(run.steps)] == [2] * 4


@pytest.mark.slow  # two processes, each of which loads Lightning
def test_a_trainer_of_two_processes_is_one_run(lightning: Any, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    torch.multiprocessing.spawn(work, (tmp_path,), 2)
    states = [torch.load(tmp_path / f"state{rank}") for rank in (0, 1)]
    assert equal(*states)
    run, module = attrib.open_run(tmp_path / "run"), module_of(lightning)
    drawn = np.concatenate([run.index(step) for step in range(run.steps)])
    assert run.steps == 4
    assert sorted(drawn) == sorted([*range(ROWS)] * 2)
    module.load_state_dict(states[0])
    measurement = attrib.measure.log_prob(data().x[:2], data().y[:2])
    attrib.attribute(run, module.eval(), measurement, loss=losses, progress=False).check()


class Endless(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Any:
        return iter(data().rows)


def by_label(items: Any) -> Any:
    return torch.utils.data.default_collate(sorted(items, key=lambda item: int(item[1])))


@pytest.mark.parametrize(
    ("loader", "said"),
    [
        (lambda: loader_of(Endless(), shuffle=False), "a DataLoader of an IterableDataset"),
        (lambda: loader_of(batch_size=None), "batch_size=None"),
        (lambda: loader_of(collate_fn=by_label), "a collate_fn that gives other rows, or in another order"),
    ],
)
def test_rows_that_are_not_known_are_refused(
    loader: Callable[[], Any], said: str, lightning: Any, tmp_path: Path
) -> None:
    with pytest.raises(errors.BatchError, match=rf"{said}.*Say the ids instead: ids="):
        trainer_of(lightning, attrib.lightning.Record(tmp_path / "run", losses)).fit(module_of(lightning), loader())


def test_a_collate_fn_that_keeps_the_order_is_tried_and_drawn_as_ever(lightning: Any, tmp_path: Path) -> None:
    def noisy(items: Any) -> Any:
        x, y = torch.utils.data.default_collate(items)
        return x + torch.rand(()), y

    states = []
    for callbacks in ([], [attrib.lightning.Record(tmp_path / "run", losses)]):
        module = module_of(lightning)
        trainer_of(lightning, *callbacks).fit(module, loader_of(collate_fn=noisy))
        states.append(module.state_dict())
    assert equal(*states)


def test_what_was_recorded_before_an_exception_stays(lightning: Any, tmp_path: Path) -> None:
    def step(module: Any, batch: Any, number: int) -> Tensor:
        if number == 3:
            raise ArithmeticError("of the user's own")
        return losses(module, batch).mean()

    record = attrib.lightning.Record(tmp_path / "run", losses)
    trainer = trainer_of(lightning, record)
    with pytest.raises(ArithmeticError):
        trainer.fit(module_of(lightning, training_step=step), loader_of())
    run = attrib.open_run(tmp_path / "run")
    assert (run.steps, run.complete) == (3, False)
    assert type(trainer.optimizers[0]) is torch.optim.AdamW
    assert "process_dataloader" not in vars(trainer.strategy)


def test_a_run_goes_on_from_a_checkpoint_of_its_last_step_alone(lightning: Any, tmp_path: Path) -> None:
    def fit(epochs: int, start: Path | None = None, end: Path | None = None, failing: int | None = None) -> Any:
        def step(module: Any, batch: Any, number: int) -> Tensor:
            if number == 0 and end is not None and module.trainer.global_step == 6:
                module.trainer.save_checkpoint(end)
            if module.trainer.global_step == failing:
                raise ArithmeticError("of the machine")
            return losses(module, batch).mean()

        record = attrib.lightning.Record(tmp_path / "run", losses, resume=True)
        module = module_of(lightning, training_step=step)
        torch.manual_seed(epochs)
        trainer = trainer_of(lightning, record, max_epochs=epochs)
        trainer.fit(module, loader_of(), ckpt_path=start, weights_only=True)
        return trainer

    epoch = tmp_path / "epoch"
    with pytest.raises(ArithmeticError):
        fit(2, end=epoch, failing=6)
    with pytest.raises(ArithmeticError):
        fit(2, start=epoch, failing=8)
    with pytest.raises(errors.ResumeError, match=r"got global_step 6, expected 8.*ckpt_path="):
        fit(2, start=epoch)
    assert attrib.open_run(tmp_path / "run").steps == 8


def two(module: Any) -> Any:
    return [torch.optim.SGD(module.net[0].parameters(), 0.1), torch.optim.SGD(module.net[3].parameters(), 0.1)]


def its_own(module: Any) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    return attrib.record(optimizer, module, losses, MemoryStore())


@pytest.mark.parametrize(("optimizers", "said"), [(two, "got SGD, SGD"), (its_own, "got Recorder")])
def test_one_optimizer_of_torchs_is_what_a_callback_records(
    optimizers: Any, said: str, lightning: Any, tmp_path: Path
) -> None:
    module = module_of(lightning, manual=True, configure_optimizers=optimizers)
    with pytest.raises(errors.AttribError, match=rf"one optimizer: {said} from configure_optimizers"):
        trainer_of(lightning, attrib.lightning.Record(tmp_path / "run", losses)).fit(module, loader_of())


def test_a_recorder_that_a_trainer_steps_by_itself_names_the_callback(lightning: Any) -> None:
    """It is told neither ids nor what the loss is to be given."""
    with pytest.raises(errors.BatchError, match=r"Trainer\(callbacks=\[attrib.lightning.Record\(store, loss\)\]\)"):
        trainer_of(lightning).fit(module_of(lightning, configure_optimizers=its_own), loader_of())
