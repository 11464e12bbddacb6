"""Hugging Face: Trainer, accelerate and peft are recorded as they train. Models from configs, random weights."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attrib

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

N, LENGTH, VOCABULARY = 9, 8, 30


def _data() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, LENGTH + 1, (N, 1), generator=g)
    return {
        "tokens": torch.randint(1, VOCABULARY, (N, LENGTH), generator=g),
        "mask": (torch.arange(LENGTH) < lengths).long(),
        "classes": torch.randint(0, 3, (N,), generator=g),
        "pixels": torch.randn(N, 3, 8, 8, generator=g),
    }


DATA = _data()
TEXTS = [
    {"input_ids": x, "attention_mask": k, "labels": x.masked_fill(k == 0, -100)}
    for x, k in zip(DATA["tokens"], DATA["mask"], strict=True)
]
LABELLED = [
    {"input_ids": x, "attention_mask": k, "labels": y}
    for x, k, y in zip(DATA["tokens"], DATA["mask"], DATA["classes"], strict=True)
]
NUMBERS = [{**item, "labels": item["labels"].float()} for item in LABELLED]
FLAGS = [{**item, "labels": 0.7 * F.one_hot(item["labels"], 3) + 0.1} for item in LABELLED]
IMAGES = [{"pixel_values": x, "labels": y} for x, y in zip(DATA["pixels"], DATA["classes"], strict=True)]

SMALL = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
WORDS = {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "attn_implementation": "eager"}


def gpt2(drop: float = 0.0, attention: str = "eager") -> nn.Module:
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), drop)
    sizes = {"vocab_size": VOCABULARY, "n_positions": LENGTH, "n_embd": 8, "n_layer": 1, "n_head": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, **rates, **ends, attn_implementation=attention)
    )


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**SMALL, **WORDS, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    return transformers.LlamaForCausalLM(config)


def adapted() -> nn.Module:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(llama(), lora)


def bert(head: str = "ForSequenceClassification", labels: int = 3) -> nn.Module:
    config = transformers.BertConfig(**SMALL, **WORDS, num_labels=labels)
    return getattr(transformers, f"Bert{head}")(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(**SMALL, image_size=8, patch_size=4, num_labels=3, attn_implementation="eager")
    return transformers.ViTForImageClassification(config)


def t5() -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)
    )


def trainer_of(build: Callable[[], nn.Module], data: Any, folder: Path, **arguments: Any) -> Any:
    """A Trainer of a model with the weights of seed 0."""
    own = {name: arguments.pop(name) for name in ("callbacks", "optimizers", "compute_loss_func") if name in arguments}
    kind = arguments.pop("trainer", transformers.Trainer)
    defaults = {
        "use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no",
        "max_steps": 3, "learning_rate": 1e-3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    model = build()
    said = transformers.TrainingArguments(str(folder), **{**defaults, **arguments})
    trainer = kind(
        model, said, train_dataset=data, eval_dataset=data if arguments.get("eval_strategy") else None, **own
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def trained(build: Callable[[], nn.Module], data: Any, folder: Path, record: Any = None, **arguments: Any) -> nn.Module:
    """The model after training, which is recorded with the options `record`."""
    trainer = trainer_of(build, data, folder, **arguments)
    if record is not None:
        attrib.hf.record(trainer, folder / "run.zarr", **record)
    trainer.train()
    return trainer.model.eval()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(map(torch.equal, a.parameters(), b.parameters()))


def next_token(model: nn.Module) -> Tensor:
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    return model(input_ids=DATA["tokens"][:2], attention_mask=mask).logits[:, -1].log_softmax(-1)[:, 3]


def translated(model: nn.Module) -> Tensor:
    tokens = DATA["tokens"][:2]
    return model(input_ids=tokens, decoder_input_ids=tokens).logits[:, -1].log_softmax(-1)[:, 3]


def first_class(model: nn.Module) -> Tensor:
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    return model(input_ids=DATA["tokens"][:2], attention_mask=mask).logits[:, 0]


def picture_class(model: nn.Module) -> Tensor:
    return model(pixel_values=DATA["pixels"][:2]).logits.log_softmax(-1)[:, 0]


@dataclass(frozen=True)
class Setup:
    """A training, and what is measured."""

    build: Callable[[], nn.Module]
    data: Any
    measurement: Callable[[nn.Module], Tensor]
    arguments: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)


FULL = {
    "bf16": True, "gradient_accumulation_steps": 4, "max_grad_norm": 0.5, "weight_decay": 0.1,
    "lr_scheduler_type": "cosine", "num_train_epochs": 2, "max_steps": -1,
}  # fmt: skip
SETUPS = {
    "GPT-2, accumulated by 4, bf16, dropout, clipped": Setup(lambda: gpt2(0.1), TEXTS, next_token, FULL),
    "GPT-2, smoothed": Setup(gpt2, TEXTS, next_token, {"label_smoothing_factor": 0.1}),
    "GPT-2, sdpa, evaluated": Setup(
        lambda: gpt2(0.1, "sdpa"), TEXTS, next_token, {"eval_strategy": "steps", "eval_steps": 1}
    ),
    "GPT-2, remainder": Setup(gpt2, TEXTS, next_token, {}, {"remainder": "account"}),
    "GPT-2, stored": Setup(gpt2, TEXTS, next_token, {}, {"capture": "gradients", "states_every": 2}),
    "GPT-2, checkpointed": Setup(lambda: gpt2(0.1), TEXTS, next_token, {"gradient_checkpointing": True}),
    "Llama": Setup(llama, TEXTS, next_token),
    "Llama, adapters": Setup(adapted, TEXTS, next_token, {}, {"constants": "digest"}),
    "BERT, classes": Setup(bert, LABELLED, first_class, {"max_grad_norm": 0.1}),
    "BERT, numbers": Setup(lambda: bert(labels=1), NUMBERS, first_class),
    "BERT, flags": Setup(bert, FLAGS, first_class),
    "BERT, masked words": Setup(lambda: bert("ForMaskedLM"), TEXTS, next_token),
    "ViT": Setup(vit, IMAGES, picture_class),
    "ViT, bf16": Setup(vit, IMAGES, picture_class, {"bf16": True}),
}
FAST = ("GPT-2, accumulated by 4, bf16, dropout, clipped",)


@pytest.mark.parametrize(
    "setup", [pytest.param(s, id=n, marks=() if n in FAST else pytest.mark.slow) for n, s in SETUPS.items()]
)
def test_a_trainer_trains_the_same_bits_and_its_predictions_are_accounted_for(setup: Setup, tmp_path: Path) -> None:
    plain = trained(setup.build, setup.data, tmp_path / "plain", **setup.arguments)
    model = trained(setup.build, setup.data, tmp_path, setup.record, **setup.arguments)
    assert same(plain, model)
    run = attrib.open_run(tmp_path / "run.zarr")
    assert run.complete
    key = next(iter(setup.data[0]))
    for step in range(run.steps):  # the ids are of the rows that the loss saw, in a shuffled order
        seen = torch.cat([batch[0][key] for batch in run.batches(step)])
        assert torch.equal(seen, torch.stack([setup.data[i][key] for i in run.index(step)]))
    assert run.index(0).tolist() != sorted(run.index(0))
    smoothing = setup.arguments.get("label_smoothing_factor", 0.0)
    result = attrib.attribute(
        run,
        model,
        setup.measurement,
        loss=attrib.hf.loss(model, smoothing),
        progress=False,
    )
    result.check()  # the ledger, and the identities within the bounds that they have in float32 or bfloat16


LOSSES = {
    "GPT-2": (gpt2, TEXTS),
    "Llama with adapters": (adapted, TEXTS),
    "BERT, classes": (bert, LABELLED),
    "BERT, numbers": (lambda: bert(labels=1), NUMBERS),
    "BERT, flags": (bert, FLAGS),
    "BERT, masked words": (lambda: bert("ForMaskedLM"), TEXTS),
    "BERT, tokens": (lambda: bert("ForTokenClassification", VOCABULARY), TEXTS),
    "ViT": (vit, IMAGES),
    "T5": (t5, TEXTS),
}


@pytest.mark.parametrize("case", LOSSES)
def test_the_losses_over_their_count_are_the_loss_that_the_model_returns(case: str) -> None:
    build, data = LOSSES[case]
    torch.manual_seed(0)
    model = build().eval()
    inputs = {name: torch.stack([item[name] for item in data]) for name in data[0]}
    loss = attrib.hf.loss(model)
    losses = loss(model, inputs)
    assert losses.shape == (N,)
    with torch.no_grad():  # last: it settles the type of problem in the model's config
        expected = model(**inputs).loss
    # 1e-6: a float32 mean of 72 numbers of order 3, summed in another order
    torch.testing.assert_close(losses.sum() / loss.count(inputs), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", ["GPT-2", "BERT, classes", "BERT, masked words"])
def test_the_smoothed_losses_are_those_of_transformers(case: str) -> None:
    build, data = LOSSES[case]
    torch.manual_seed(0)
    model = build().eval()
    inputs = {name: torch.stack([item[name] for item in data]) for name in data[0]}
    loss = attrib.hf.loss(model, label_smoothing=0.1)
    smoother = transformers.trainer_pt_utils.LabelSmoother(0.1)
    with torch.no_grad():
        output = model(**{name: part for name, part in inputs.items() if name != "labels"})
    expected = smoother(output, inputs["labels"], shift_labels=case == "GPT-2")
    torch.testing.assert_close(loss(model, inputs).sum() / loss.count(inputs), expected, rtol=1e-6, atol=1e-6)


# ids


class Walked(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        return iter([{**item, "name": f"doc-{n}"} for n, item in enumerate(TEXTS)])


@pytest.mark.parametrize("kind", ["numbers", "texts", "walked"])
def test_ids_are_those_of_a_column(kind: str, tmp_path: Path) -> None:
    names = [100 + n if kind == "numbers" else f"doc-{n}" for n in range(N)]
    data = Walked() if kind == "walked" else [{**item, "name": i} for item, i in zip(TEXTS, names, strict=True)]
    trained(gpt2, data, tmp_path, {"ids": "name"}, max_steps=2)
    run = attrib.open_run(tmp_path / "run.zarr")
    for step in range(run.steps):
        seen = torch.cat([batch[0]["input_ids"] for batch in run.batches(step)])
        assert torch.equal(seen, torch.stack([TEXTS[names.index(i)]["input_ids"] for i in run.index(step)]))


@pytest.mark.slow
def test_ids_survive_workers_padding_collators_and_a_last_batch_that_is_dropped(tmp_path: Path) -> None:
    arguments = {"dataloader_num_workers": 1, "dataloader_drop_last": True, "max_steps": -1, "num_train_epochs": 2}
    plain = trained(gpt2, TEXTS, tmp_path / "plain", **arguments)
    assert same(plain, trained(gpt2, TEXTS, tmp_path, {}, **arguments))
    run = attrib.open_run(tmp_path / "run.zarr")
    assert [len(run.index(step)) for step in range(run.steps)] == [4, 4, 4, 4]
    for step in range(run.steps):
        seen = torch.cat([batch[0]["input_ids"] for batch in run.batches(step)])
        assert torch.equal(seen, DATA["tokens"][torch.as_tensor(run.index(step))])


# ends, and going on


class Crash(transformers.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        if state.global_step == self.step:
            raise RuntimeError("power is gone")


SAVED = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


def crashed(folder: Path, step: int, **arguments: Any) -> None:
    with pytest.raises(RuntimeError, match="power is gone"):
        trained(lambda: gpt2(0.1), TEXTS, folder, {}, callbacks=[Crash(step)], **SAVED, **arguments)


def gone_on(folder: Path, checkpoint: int | None, **arguments: Any) -> nn.Module:
    trainer = trainer_of(lambda: gpt2(0.1), TEXTS, folder, **{**SAVED, **arguments})
    attrib.hf.record(trainer, folder / "run.zarr", resume=True)
    at = None if checkpoint is None else str(folder / f"checkpoint-{checkpoint}")
    trainer.train(resume_from_checkpoint=at)
    return trainer.model


def test_a_training_that_fails_leaves_the_steps_before_and_no_trace_on_the_trainer(tmp_path: Path) -> None:
    crashed(tmp_path, 3)
    run = attrib.open_run(tmp_path / "run.zarr")
    assert (run.complete, run.steps) == (False, 3)


def test_a_trainer_that_was_recorded_trains_on_as_it_would(tmp_path: Path) -> None:
    trainer = trainer_of(gpt2, TEXTS, tmp_path, max_steps=1)
    before = dict(vars(trainer))
    attrib.hf.record(trainer, tmp_path / "run.zarr")
    trainer.train()
    assert not {"train", "compute_loss", "training_step", "get_train_dataloader"} & (set(vars(trainer)) - set(before))
    trainer.train()
    assert attrib.open_run(tmp_path / "run.zarr").steps == 1
    attrib.hf.record(trainer, tmp_path / "again.zarr")
    trainer.train()
    result = attrib.attribute(
        attrib.open_run(tmp_path / "again.zarr"),
        trainer.model.eval(),
        next_token,
        loss=attrib.hf.loss(trainer.model),
        progress=False,
    )
    assert (result.dataset["inherited"] != 0).any()  # of the two trainings before
    result.check()


@pytest.mark.parametrize(
    ("checkpoint", "arguments"),
    [
        (2, {}),
        pytest.param(None, {}, marks=pytest.mark.slow),
        pytest.param(
            2, {"eval_strategy": "steps", "eval_steps": 1, "label_smoothing_factor": 0.1}, marks=pytest.mark.slow
        ),
    ],
)
def test_resuming_from_a_checkpoint_or_the_start_gives_the_run_that_was_not_interrupted(
    checkpoint: int | None, arguments: dict[str, Any], tmp_path: Path
) -> None:
    whole = trained(lambda: gpt2(0.1), TEXTS, tmp_path / "whole", {}, **SAVED, **arguments)
    crashed(tmp_path, 3, **arguments)
    assert same(whole, gone_on(tmp_path, checkpoint, **arguments))
    runs = [attrib.open_run(folder / "run.zarr") for folder in (tmp_path, tmp_path / "whole")]
    assert all(run.complete and run.steps == 6 for run in runs)
    for step in range(6):
        assert all(map(torch.equal, *(run.vector(step)[None] for run in runs)))
        assert all(map(torch.equal, *([batch[0]["input_ids"] for batch in run.batches(step)] for run in runs)))
        assert torch.equal(*(run.random_state(step) for run in runs))
        assert runs[0].index(step).tolist() == runs[1].index(step).tolist()


def test_resuming_another_training_is_refused(tmp_path: Path) -> None:
    crashed(tmp_path, 3)
    with pytest.raises(attrib.errors.ResumeError, match="the training is not that of the run"):
        gone_on(tmp_path, 2, data_seed=7)
    assert attrib.open_run(tmp_path / "run.zarr").steps == 3


@pytest.mark.slow
def test_a_checkpoint_ahead_of_the_run_is_refused(tmp_path: Path) -> None:
    trained(lambda: gpt2(0.1), TEXTS, tmp_path, **SAVED)
    crashed(tmp_path, 1)
    with pytest.raises(attrib.errors.ResumeError, match="the checkpoint is ahead of the run: got training from step 4"):
        gone_on(tmp_path, 4)


@pytest.mark.slow
def test_the_best_model_may_be_loaded_at_the_end(tmp_path: Path) -> None:
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trained(gpt2, TEXTS, tmp_path, {}, **{**SAVED, "learning_rate": 1.0}, **best)
    assert attrib.open_run(tmp_path / "run.zarr").complete


# what is refused


class Own(transformers.Trainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **named: Any) -> Any:
        return model(**inputs).loss


def _twice(trainer: Any) -> None:
    attrib.hf.record(trainer, "run.zarr")


REFUSED: dict[str, tuple[dict[str, Any], Callable[[Any], Any] | None, dict[str, Any], str]] = {
    "batch size": ({"auto_find_batch_size": True}, None, {}, "the size of the batches is not fixed"),
    "noise": ({"neftune_noise_alpha": 5.0}, None, {}, "the loss draws noise"),
    "loss": ({"trainer": Own}, None, {}, "the loss of each example is not known: got a compute_loss of its own"),
    "loss function": ({"compute_loss_func": print}, None, {}, "the loss of each example is not known"),
    "twice": ({}, _twice, {}, "the Trainer is recorded already"),
    "walked": ({"data": Walked()}, None, {}, "the rows have no numbers: got an Walked"),
    "capture": ({}, None, {"capture": "all"}, "unknown capture"),
    "options": ({}, None, {"colour": 1}, "unknown options: got colour"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_recorded_is_said_before_training(case: str, tmp_path: Path) -> None:
    arguments, prepare, options, words = REFUSED[case]
    trainer = trainer_of(gpt2, arguments.pop("data", TEXTS) if case == "walked" else TEXTS, tmp_path, **arguments)
    if prepare is not None:
        prepare(trainer)
    with pytest.raises((ValueError, TypeError), match=words):
        attrib.hf.record(trainer, tmp_path / "run.zarr", **options)


def test_a_recorder_that_a_trainer_is_given_names_the_lines_that_record(tmp_path: Path) -> None:
    model, store = gpt2(), tmp_path / "run.zarr"
    recorder = attrib.record(torch.optim.SGD(model.parameters(), 0.1), model, attrib.hf.loss(model), store)
    trainer = trainer_of(lambda: model, TEXTS, tmp_path, optimizers=(recorder, None))
    line = r"attrib.hf.record\(trainer, store\)"
    with pytest.raises(attrib.errors.BatchError, match=rf"the optimizer itself, not the recorder, and write {line}"):
        trainer.train()
    again = rf"is a recorder already: got one of SGD.*optimizers=\(recorder.optimizer, None\), and call {line}"
    with pytest.raises(ValueError, match=again):
        attrib.hf.record(trainer, store)  # by now in a wrapper of accelerate's
    trainer = trainer_of(lambda: model, TEXTS, tmp_path, optimizers=(recorder.optimizer, None))
    attrib.hf.record(trainer, store)
    trainer.train()
    assert attrib.open_run(store).steps == 3


def test_a_recorder_that_a_trainer_makes_of_its_optimizer_is_refused(tmp_path: Path) -> None:
    class Recorded(transformers.Trainer):
        def create_optimizer(self, *args: Any) -> Any:
            optimizer = super().create_optimizer(*args)
            self.optimizer = attrib.record(optimizer, self.model, attrib.hf.loss(self.model), tmp_path / "other.zarr")
            return self.optimizer

    with pytest.raises(ValueError, match="is a recorder already: got one of AdamW"):
        trained(gpt2, TEXTS, tmp_path, {}, trainer=Recorded)


def test_an_unknown_model_a_missing_column_and_another_trainer_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not known: got a model Linear"):
        attrib.hf.loss(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"it is no Trainer: got object"):
        attrib.hf.record(object(), tmp_path)
    with pytest.raises(attrib.errors.BatchError, match=r"the dataset has no such column: got ids='name'"):
        trained(gpt2, TEXTS, tmp_path, {"ids": "name"})
    with pytest.raises(attrib.errors.BatchError, match=r"an id is neither a number nor a text: got 0.5"):
        trained(gpt2, [{**item, "name": 0.5} for item in TEXTS], tmp_path, {"ids": "name"})


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(attrib.errors.MissingExtraError, match=r"got no transformers.*attrib\[hf\]"):
        attrib.hf.record(object(), "run.zarr")


@pytest.mark.slow
def test_attrib_alone_brings_in_nothing_of_hugging_face() -> None:
    code = "import sys, attrib.hf; print({'transformers', 'accelerate', 'peft'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_loss_of_ones_own_is_used_with_the_trainers_own_reduction(tmp_path: Path) -> None:
    def loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
        return F.cross_entropy(logits.transpose(1, 2), inputs["labels"][:, 1:], reduction="none").sum(1)

    model = trained(gpt2, TEXTS, tmp_path, {"loss": loss}, trainer=Own)
    result = attrib.attribute(attrib.open_run(tmp_path / "run.zarr"), model, next_token, loss=loss, progress=False)
    result.check()


# peft, accelerate


def test_adapters_are_recorded_alone_and_accounted_for_on_a_model_that_is_built_again(tmp_path: Path) -> None:
    trained(adapted, TEXTS, tmp_path, {"constants": "digest"})
    run = attrib.open_run(tmp_path / "run.zarr")
    assert all("lora_" in name for name in run.groups)
    assert run.constants() == {}  # the base is recognised, not stored
    torch.manual_seed(0)
    model = adapted().eval()
    attrib.attribute(run, model, next_token, loss=attrib.hf.loss(model), progress=False).check()
    torch.manual_seed(1)
    with pytest.raises(attrib.errors.ModelMismatchError):
        attrib.attribute(run, adapted().eval(), next_token, loss=attrib.hf.loss(model), progress=False)


def loop(folder: Path, recorded: bool, announced: bool = True) -> nn.Module:
    """A loop of accelerate: accumulated over two batches, clipped, with a schedule."""

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y, reduction="none")

    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.1), nn.Linear(6, 3))
    optimizer: Any = torch.optim.AdamW(inner.parameters(), lr=1e-2)
    data = torch.utils.data.TensorDataset(torch.arange(N), DATA["pixels"][:, :, 0, 0], DATA["classes"])
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    loader = torch.utils.data.DataLoader(data, 2, shuffle=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.9**n)
    model = accelerator.prepare(inner)
    recorder = attrib.record(optimizer, model, loss, folder / "run.zarr") if recorded else None
    optimizer, loader, schedule = accelerator.prepare(recorder or optimizer, loader, schedule)
    for index, x, y in loader:
        if recorder is not None and announced:
            recorder.batch(index, x, y)
        with accelerator.accumulate(model):
            accelerator.backward(loss(model, x, y).mean())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    if recorder is not None:
        recorder.close()
        run = attrib.open_run(folder / "run.zarr")
        measurement = attrib.measure.log_prob(DATA["pixels"][:2, :, 0, 0], DATA["classes"][:2])
        attrib.attribute(run, inner.eval(), measurement, loss=loss, progress=False).check()
        assert [len(run.passes(step)) for step in range(run.steps)] == [2, 2, 1]
    return inner


def test_a_loop_of_accelerate_trains_the_same_bits_and_is_accounted_for(tmp_path: Path) -> None:
    accelerate.state.AcceleratorState._reset_state(True)
    assert same(loop(tmp_path, recorded=False), loop(tmp_path, recorded=True))


def test_a_loop_of_accelerate_that_announces_no_batch_names_the_line(tmp_path: Path) -> None:
    accelerate.state.AcceleratorState._reset_state(True)
    line = (
        r"recorder.batch\(index, \*batch\) before the forward pass.*the recorder that was given to accelerator.prepare"
    )
    with pytest.raises(attrib.errors.BatchError, match=line):
        loop(tmp_path, recorded=True, announced=False)


def test_an_optimizer_that_accelerate_has_prepared_is_refused_in_its_words(tmp_path: Path) -> None:
    accelerate.state.AcceleratorState._reset_state(True)
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared = accelerate.Accelerator(cpu=True).prepare(optimizer)
    with pytest.raises(attrib.errors.UnsupportedOptimizerError, match="the optimizer is prepared already"):
        attrib.record(prepared, model, nn.functional.mse_loss, tmp_path)
