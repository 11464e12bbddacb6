"""What an exact account costs where people train: lines of glue, time, disk, and how exact it is, a row a setup.

A setup trains small models with random weights, once plainly and once recorded, and asks one question of two predictions.
Ratios are of CPU seconds (one thread) to those of the plain training next to it. Steady: of the steps after the tenth; of
attribution, what the second half of the steps adds. With start-up: of everything, tracing and checks included. Of two
processes the seconds are summed.

    python scripts/bench_frameworks.py [SETUP ...] [--repeats 3] [--steps 60]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from settings import folder_bytes, machine
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import attrib

SKIPPED = 10  # steps that steady figures leave out
EXAMPLES, LENGTH, VOCABULARY, BATCH = 256, 48, 256, 16


@dataclass
class Training:
    """One that was made. marks: CPU seconds at its beginning and after each step. glue: lines that recording took."""

    model: nn.Module
    marks: Sequence[float]
    glue: int
    loss: Callable[..., Tensor]
    measurement: Callable[[nn.Module], Tensor]


Setup = Callable[[Path | None, int], Training]  # store, None for plain training; steps


# data


@cache
def texts() -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, VOCABULARY, (EXAMPLES, LENGTH), generator=g)
    masks = (torch.arange(LENGTH) < torch.randint(LENGTH // 2, LENGTH + 1, (EXAMPLES, 1), generator=g)).long()
    each = zip(tokens, masks, strict=True)
    return [{"input_ids": x, "attention_mask": k, "labels": x.masked_fill(k == 0, -100)} for x, k in each]


@cache
def labelled() -> list[dict[str, Tensor]]:
    classes = torch.randint(0, 4, (EXAMPLES,), generator=torch.Generator().manual_seed(2))
    return [{**item, "labels": y} for item, y in zip(texts(), classes, strict=True)]


@cache
def images() -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    pixels, classes = torch.randn(EXAMPLES, 3, 32, 32, generator=g), torch.randint(0, 4, (EXAMPLES,), generator=g)
    return [{"pixel_values": x, "labels": y} for x, y in zip(pixels, classes, strict=True)]


# models of transformers

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "attn_implementation": "eager"}
ENDS = {"bos_token_id": 0, "eos_token_id": 0}


def gpt2(drop: float = 0.0) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": VOCABULARY, "n_positions": LENGTH, "n_embd": 128, "n_layer": 2, "n_head": 4}
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), drop)
    return GPT2LMHeadModel(GPT2Config(**sizes, **rates, **ENDS, attn_implementation="eager"))


def adapted() -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    lora = LoraConfig(r=8, lora_dropout=0.05, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES, **TOKENS, **ENDS, pad_token_id=0)), lora)


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**SIZES, **TOKENS, num_labels=4))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    shape = {"image_size": 32, "patch_size": 8, "num_labels": 4, "attn_implementation": "eager"}
    return ViTForImageClassification(ViTConfig(**SIZES, **shape))


def resnet18() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    widths, depths = [64, 128, 256, 512], [2, 2, 2, 2]
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=64, hidden_sizes=widths, depths=depths, layer_type="basic", num_labels=4)
    )


def next_token(model: nn.Module) -> Tensor:
    tokens = torch.stack([item["input_ids"] for item in texts()[:2]])
    logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    return logits[:, -1].log_softmax(-1)[:, 3]


def first_class(model: nn.Module) -> Tensor:
    tokens = torch.stack([item["input_ids"] for item in texts()[:2]])
    return model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits.log_softmax(-1)[:, 0]


def picture_class(model: nn.Module) -> Tensor:
    return model(pixel_values=torch.stack([item["pixel_values"] for item in images()[:2]])).logits.log_softmax(-1)[:, 0]


def by_trainer(
    build: Callable[[], nn.Module],
    data: Callable[[], list[dict[str, Tensor]]],
    measurement: Callable[[nn.Module], Tensor],
    record: dict[str, Any] | None = None,
    **arguments: Any,
) -> Setup:
    """A setup that `transformers.Trainer` trains; the one line of glue is `attrib.hf.record(trainer, store)`."""

    def setup(store: Path | None, steps: int) -> Training:
        from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

        marks: list[float] = []

        class Clock(TrainerCallback):
            def on_train_begin(self, *args: Any, **named: Any) -> None:
                marks.append(time.process_time())

            def on_step_end(self, *args: Any, **named: Any) -> None:
                marks.append(time.process_time())

        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            quiet = {
                "report_to": [],
                "disable_tqdm": True,
                "logging_strategy": "no",
                "save_strategy": "no",
                "use_cpu": True,
            }
            said = {"per_device_train_batch_size": BATCH, "learning_rate": 1e-3, "weight_decay": 0.01, **arguments}
            kept = TrainingArguments(folder, max_steps=steps, **quiet, **said)
            trainer = Trainer(build(), kept, train_dataset=data(), callbacks=[Clock()])
            trainer.remove_callback(PrinterCallback)
            if store is not None:
                attrib.hf.record(trainer, store, **(record or {}))
            trainer.train()
        marks.append(time.process_time())  # what closing took counts for the last step
        model = trainer.model.eval()
        return Training(model, marks, 1, attrib.hf.loss(model), measurement)

    return setup


def by_lightning(store: Path | None, steps: int) -> Training:
    """A perceptron with dropout in a module of Lightning; the line of glue is the callback, which is given a loss."""
    import lightning.pytorch as pl

    marks: list[float] = []

    class Digits(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            widths = nn.Linear(784, 256), nn.Linear(256, 256), nn.Linear(256, 10)
            self.net = nn.Sequential(widths[0], nn.GELU(), nn.Dropout(0.1), widths[1], nn.GELU(), widths[2])

        def training_step(self, batch: list[Tensor], number: int) -> Tensor:
            return cross_entropy(self, batch).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    class Clock(pl.Callback):
        def on_train_start(self, *args: Any) -> None:
            marks.append(time.process_time())

        def on_train_batch_end(self, *args: Any) -> None:
            marks.append(time.process_time())

    torch.manual_seed(0)
    g, module = torch.Generator().manual_seed(1), Digits()
    x, y = torch.randn(2048, 784, generator=g), torch.randint(0, 10, (2048,), generator=g)
    loader = DataLoader(TensorDataset(x, y), 128, shuffle=True)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    recording = [] if store is None else [attrib.lightning.Record(store, loss=cross_entropy)]
    callbacks = [Clock(), *recording]
    pl.Trainer(max_steps=steps, max_epochs=-1, accelerator="cpu", callbacks=callbacks, **quiet).fit(module, loader)
    marks.append(time.process_time())
    return Training(module.eval(), marks, 1, cross_entropy, lambda m: m.net(x[:2]).log_softmax(-1)[:, 0])


def cross_entropy(module: Any, batch: Sequence[Tensor]) -> Tensor:
    return nn.functional.cross_entropy(module.net(batch[0]), batch[1], reduction="none")


def half_of_batches(rank: int, folder: str, store: Path | None, steps: int) -> None:
    """What one of two processes does, on every other example of batches of 64; marks and parameters to the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/meeting")
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(gpt2())
    loss, items = attrib.hf.loss(model), texts()
    optimizer: Any = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.01)
    drawn = [torch.randperm(EXAMPLES)[:64][rank::2] for _ in range(steps)]
    batches = [{name: torch.stack([items[i][name] for i in index]) for name in items[0]} for index in drawn]
    loss(gpt2(), batches[0]).mean().backward()  # what a process does once is no part of either
    marks = [time.process_time()]
    if store is not None:
        optimizer = attrib.record(optimizer, model, loss, store)
    for index, batch in zip(drawn, batches, strict=True):
        optimizer.zero_grad()
        if store is not None:
            optimizer.batch(index, batch)
        loss(model, batch).mean().backward()
        optimizer.step()
        marks.append(time.process_time())
    if store is not None:
        optimizer.close()
    marks.append(time.process_time())
    torch.save((marks, model.module.state_dict()), Path(folder) / str(rank))
    dist.destroy_process_group()


def by_two_processes(store: Path | None, steps: int) -> Training:
    """GPT-2 in DistributedDataParallel over gloo; the glue: to record, to announce, to close."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(half_of_batches, (folder, store, steps), 2)
        (marks, state), (others, _) = (torch.load(Path(folder) / rank) for rank in "01")
    model = gpt2().eval()
    model.load_state_dict(state)
    return Training(model, [a + b for a, b in zip(marks, others, strict=True)], 3, attrib.hf.loss(model), next_token)


FULL = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 4, "bf16": True, "max_grad_norm": 0.5}
SETUPS: dict[str, Setup] = {
    "GPT-2": by_trainer(gpt2, texts, next_token),
    "Llama + LoRA": by_trainer(adapted, texts, next_token, record={"constants": "digest"}),
    "BERT classifier": by_trainer(bert, labelled, first_class),
    "ViT": by_trainer(vit, images, picture_class),
    "ResNet-18, BatchNorm": by_trainer(
        resnet18, images, picture_class, record={"shares": "rows"}, optim="sgd", optim_args="momentum=0.9"
    ),
    "Lightning": by_lightning,
    "DistributedDataParallel x 2, GPT-2": by_two_processes,
    "Trainer: accumulation 4, bf16, dropout, clipping": by_trainer(lambda: gpt2(0.1), texts, next_token, **FULL),
}


def attributed(store: Path, training: Training, steps: slice | None = None) -> tuple[float, attrib.Result]:
    run, began = attrib.open_run(store), time.process_time()
    options = {"loss": training.loss, "steps": steps, "progress": False}
    result = attrib.attribute(run, training.model, training.measurement, **options)
    return time.process_time() - began, result


def whole(training: Training) -> float:
    return training.marks[-1] - training.marks[0]


def steady(training: Training) -> float:
    return (training.marks[-1] - training.marks[SKIPPED]) / (len(training.marks) - 1 - SKIPPED)


def row(name: str, steps: int, repeats: int) -> str:
    setup, found = SETUPS[name], []
    setup(None, SKIPPED + 2)  # what a process does once is no part of either
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            store = Path(folder) / "run.zarr"
            plain, recorded = setup(None, steps), setup(store, steps)
            half, _ = attributed(store, recorded, slice(steps // 2, steps))
            seconds, result = attributed(store, recorded)
            more = (seconds - half) / (steps - steps // 2) / steady(plain)
            whole_ratios = whole(recorded) / whole(plain), seconds / whole(plain)
            found.append((steady(recorded) / steady(plain), whole_ratios[0], more, whole_ratios[1]))
            disk = folder_bytes(store) / steps / 2**20
    ledger = result.check(1e-5)  # float32: Adam's first steps divide by gradients that are little but rounding
    sizes = [abs(ledger.terms[end].values) for end in ("initial", "final")]
    residual = float((abs(ledger.terms["residual"].values) / (sizes[0] + sizes[1])).max())
    gaps = [f"{ledger.identities[which]:.0e}" for which in ("split", "limit")]
    ratios = [f"{statistics.median(each):.2f}" for each in zip(*found, strict=True)]
    return f"| {name} | {recorded.glue} | {' | '.join(ratios)} | {disk:.2f} MiB | {residual:.0e} | {' | '.join(gaps)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("setups", nargs="*", default=list(SETUPS), metavar="SETUP", help=", ".join(SETUPS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    costs = "recorded / plain, steady | all | attributed / plain, steady | all"
    print(f"| setup | lines | {costs} | disk a step | residual | split | limit |")
    print("|" + "---|" * 10)
    for name in options.setups:
        print(row(name, options.steps, options.repeats), flush=True)


if __name__ == "__main__":
    main()
