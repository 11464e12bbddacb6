"""Scores of other packages for a setting that `bench_influence.py` wrote, each to FOLDER/scores/NAME.npz unless it is there.

    peers/bin/python scripts/peers/score.py FOLDER/SETTING/SEED [FOLDER ...] [--only captum]

Read from the folder: setting.json (network, its arguments), data.npz (x, y, query_x, query_y), checkpoints.npz (states of
training, the last one last; with the learning rate of each). Nothing of attrib is imported. Scores are (queries, examples),
positive where an example raised the query's log-probability. A package that fails says why, and the others go on.
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import MODELS, losses_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

PROJECTED = 100  # far below the number of examples, or their Gram matrix is fitted exactly


class Exported:
    """A setting as it was written."""

    def __init__(self, folder: Path) -> None:
        facts = json.loads((folder / "setting.json").read_text())
        self.build = lambda: MODELS[facts["model"]](**facts["arguments"])
        self.x, self.y, self.query_x, self.query_y = (
            self._tensor(array) for array in np.load(folder / "data.npz").values()
        )
        self.rates: list[float] = facts["rates"]
        held = np.load(folder / "checkpoints.npz")
        self.states = [
            {name.split("/", 1)[1]: torch.from_numpy(held[name]).float() for name in held if name.startswith(f"{n}/")}
            for n in range(len(self.rates))
        ]

    @staticmethod
    def _tensor(array: np.ndarray) -> Tensor:
        t = torch.from_numpy(array)
        return t.float() if t.is_floating_point() else t

    @property
    def model(self) -> nn.Module:
        """In float32, at its last state."""
        model: nn.Module = self.build().float()
        model.load_state_dict(self.states[-1])
        return model.eval()

    @property
    def train(self) -> TensorDataset:
        return TensorDataset(self.x, self.y)

    @property
    def queries(self) -> TensorDataset:
        return TensorDataset(self.query_x, self.query_y)

    def loaders(self) -> tuple[Any, Any]:
        return DataLoader(self.train, batch_size=len(self.x)), DataLoader(self.queries, batch_size=len(self.query_x))


class MeanLoss(nn.Module):
    reduction = "none"  # captum asks

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        return losses_of(logits, y)


def captum_tracincp(given: Exported) -> Tensor:
    from captum.influence import TracInCP

    def load(model: nn.Module, number: str) -> float:
        model.load_state_dict(given.states[int(number)])
        return given.rates[int(number)]

    found = TracInCP(
        given.model,
        given.train,
        [str(n) for n in range(len(given.rates))],
        load,
        loss_fn=MeanLoss(),
        batch_size=50,
    )
    return found.influence((given.query_x, given.query_y), show_progress=False)


def _task(given: Exported, states: Any, function: Callable[..., Any] | None = None) -> Any:
    from dattri.task import AttributionTask

    model = given.model

    def of_one(params: Any, data: Any) -> Tensor:
        x, y = data
        return losses_of(torch.func.functional_call(model, params, (x[None],)), y[None])[0]

    def of_batch(params: Any, data: Any) -> Tensor:
        x, y = data
        return losses_of(torch.func.functional_call(model, params, (x,)), y).mean()

    return AttributionTask({None: of_one, "batch": of_batch}.get(function, function), model, states)


def dattri_trak(given: Exported) -> Tensor:
    from dattri.algorithm.trak import TRAKAttributor

    model = given.model

    def margin(params: Any, data: Any) -> Tensor:
        x, y = data
        p = torch.exp(-losses_of(torch.func.functional_call(model, params, (x[None],)), y[None])[0])
        return torch.log(p / (1 - p + 1e-12))

    def right(params: Any, data: Any) -> Tensor:
        x, y = data
        return torch.exp(-losses_of(torch.func.functional_call(model, params, (x[None],)), y[None]))

    found = TRAKAttributor(
        _task(given, given.states[-1], margin),
        right,
        {"proj_dim": PROJECTED, "proj_type": "normal", "proj_max_batch_size": 32, "proj_seed": 0, "device": "cpu"},
        regularization=1e-6,
    )
    train, queries = given.loaders()
    with torch.no_grad():
        found.cache(train)
        return found.attribute(queries).T


def traker(given: Exported) -> Tensor:
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput
    from trak.projectors import BasicProjector, ProjectionType

    class Margin(AbstractModelOutput):
        """The package's own for classes; it has none for a passage, whose p is the mean over its characters."""

        def __init__(self) -> None:
            pass

        def get_output(self, model: nn.Module, weights: Any, buffers: Any, x: Tensor, y: Tensor) -> Tensor:
            outputs = torch.func.functional_call(model, (weights, buffers), (x[None],))
            log_p = -losses_of(outputs, y[None])[0]
            return log_p - torch.log(-torch.expm1(log_p.clamp(max=-1e-12)))

        def get_out_to_loss_grad(
            self, model: nn.Module, weights: Any, buffers: Any, batch: tuple[Tensor, Tensor]
        ) -> Tensor:
            x, y = batch
            losses = losses_of(torch.func.functional_call(model, (weights, buffers), (x,)), y)
            return -torch.expm1(-losses)[:, None].detach()

    model, size = given.model, sum(p.numel() for p in given.model.parameters())
    # in several blocks: a single one is given up after the training examples, and then missed
    projector = BasicProjector(
        size, PROJECTED, 0, ProjectionType.normal, "cpu", block_size=PROJECTED // 2, dtype=torch.float32
    )
    with tempfile.TemporaryDirectory() as folder:
        found = TRAKer(
            model,
            Margin(),
            len(given.x),
            folder,
            device="cpu",
            projector=projector,
            proj_dim=PROJECTED,
            use_half_precision=False,
            lambda_reg=1e-6,
            logging_level=40,
        )
        found.load_checkpoint(given.states[-1], model_id=0)
        found.featurize(batch=(given.x, given.y), num_samples=len(given.x))
        found.finalize_features()
        found.start_scoring_checkpoint("queries", given.states[-1], 0, len(given.query_x))
        found.score(batch=(given.query_x, given.query_y), num_samples=len(given.query_x))
        return torch.as_tensor(np.array(found.finalize_scores("queries"))).T


def kronfluence_ekfac(given: Exported) -> Tensor:
    """With its own choice of the damping."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Losses(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            x, y = batch
            logits = model(x)
            if sample:
                with torch.no_grad():
                    flat = torch.softmax(logits, -1).reshape(-1, logits.shape[-1])
                    y = torch.multinomial(flat, 1).reshape(y.shape)
            return losses_of(logits, y).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            x, y = batch
            return losses_of(model(x), y).sum()

    with tempfile.TemporaryDirectory() as folder:
        task = Losses()
        model = prepare_model(given.model, task)
        found = Analyzer("peers", model, task, cpu=True, disable_tqdm=True, output_dir=folder, log_level=40)
        found.fit_all_factors("factors", given.train, 100, factor_args=FactorArguments(strategy="ekfac"))
        arguments = ScoreArguments(damping_factor=None)
        found.compute_pairwise_scores("scores", "factors", given.queries, given.train, 20, 100, score_args=arguments)
        return found.load_pairwise_scores("scores")["all_modules"]


METHODS: dict[str, Callable[[Exported], Tensor]] = {
    "captum TracInCP": captum_tracincp,
    "dattri TRAK": dattri_trak,
    "traker TRAK": traker,
    "kronfluence EK-FAC": kronfluence_ekfac,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--only", default="", help="methods whose name holds this")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for folder in options.folders:
        given = Exported(folder)
        (folder / "scores").mkdir(exist_ok=True)
        for name, method in METHODS.items():
            place = folder / "scores" / f"{name}.npz"
            if options.only not in name or place.exists():
                continue
            torch.manual_seed(0)
            start = time.process_time()
            try:
                scores = method(given).detach().double().numpy()
            except Exception as error:
                print(f"{folder.name}: {name} failed: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
                continue
            expected = len(given.query_x), len(given.x)
            if scores.shape != expected:
                print(f"{folder.name}: {name} gave shape {scores.shape}, not {expected}", file=sys.stderr)
                continue
            np.savez(place, scores=scores, seconds=time.process_time() - start)
            print(f"{folder.name}: {name} {time.process_time() - start:.1f} s of CPU", flush=True)


if __name__ == "__main__":
    main()
