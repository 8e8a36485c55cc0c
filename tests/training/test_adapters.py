"""Lightning's and Hugging Face's own trainers, recorded by a callback, and replayed."""

import copy
import pickle
import runpy
import sys
from pathlib import Path

import accelerate
import lightning.pytorch as pl
import pytest
import torch
import transformers
from tests.training.by_hand import bits
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import everystep
import everystep.lightning
import everystep.transformers

#: What these packages warn of is theirs.
pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = 18


def assert_replays(run):
    """Assert that a run replays exactly, without anything of its training."""
    found = everystep.open(run.directory).verify(processes=1, progress=False)
    assert found.is_exact, found


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1))
        self.head = nn.Linear(16, 3)
        self.losses = []

    def forward(self, x):
        return self.head(self.layers(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = 0.7 * nn.functional.cross_entropy(self(x), y)  # a third of it, three times, is another
        self.log("train_loss", loss)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("validation_loss", nn.functional.cross_entropy(self(x), y))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)]


def fit(model, callbacks, steps, checkpoint=None, **options):
    data = TensorDataset(torch.randn(96, 8), torch.randint(0, 3, (96,)))
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks, **options,
    )  # fmt: skip
    trainer.fit(model, DataLoader(data, 16, shuffle=True), DataLoader(data, 32), ckpt_path=checkpoint)
    return trainer


@pytest.mark.sweep(every=2)
@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}, {}])
def test_lightning(tmp_path, options):
    def trained(*callbacks):
        torch.manual_seed(0)
        model = Classifier()
        fit(model, [*callbacks], STEPS // options.get("accumulate_grad_batches", 1), **options)
        return model

    expected = trained()
    callback = everystep.lightning.RecordFit(run=tmp_path / "fit")
    model = trained(callback)
    run = callback.run
    assert model.losses == expected.losses
    assert run.losses["loss"].to_list() == model.losses
    assert [bits(p) for p in model.parameters()] == [bits(p) for p in expected.parameters()]
    assert_replays(run)
    assert (len(run), run.status) == (len(model.losses), "finished")
    assert run[-1].batch.x.shape == (16, 8)
    trained(callback := everystep.lightning.RecordFit(run=tmp_path / "stopped", stop_when="step == 3"))
    assert (len(callback.run), callback.run.status) == (3, "stopped")


def test_a_batch_that_the_module_refuses_is_no_step(capfd):
    class Refusing(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None  # the rest of the epoch is skipped

        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)  # returns no loss

    callback = everystep.lightning.RecordFit()
    model = Refusing()
    fit(model, [callback], -1, max_epochs=2)
    assert (len(callback.run), callback.run.status, len(model.losses)) == (4, "finished", 4)
    assert "in Lightning, return it from training_step" in capfd.readouterr().err
    assert_replays(callback.run)


def test_a_callback_in_settings_that_are_copied_and_saved_has_the_run():
    callback = everystep.lightning.RecordFit()
    fit(Classifier(), copy.deepcopy([callback]), 2)
    assert len(callback.run) == 2
    with pytest.raises(everystep.UsageError, match="nothing is recorded yet"):
        _ = pickle.loads(pickle.dumps(callback)).run


def test_lightning_by_its_former_name_alone(monkeypatch):
    """Packages for forecasting install pytorch_lightning, without lightning."""
    monkeypatch.setitem(sys.modules, "pytorch_lightning", pl)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    assert issubclass(runpy.run_path(everystep.lightning.__file__)["RecordFit"], pl.Callback)


def test_lightning_that_fails_closes_its_run():
    class Failing(Classifier):
        def training_step(self, batch, batch_idx):
            if self.global_step == 5:
                raise ZeroDivisionError("of my own")
            return super().training_step(batch, batch_idx)

    callback = everystep.lightning.RecordFit()
    with pytest.raises(everystep.UsageError, match="nothing is recorded yet"):
        callback.run  # noqa: B018
    with pytest.raises(ZeroDivisionError):
        fit(Failing(), [callback], 20)
    assert (len(callback.run), callback.run.status) == (5, "failed")


def test_a_fit_that_goes_on_from_its_checkpoint_is_a_new_run_that_replays(tmp_path):
    def trained(steps, checkpoint=None):
        torch.manual_seed(0)
        callback = everystep.lightning.RecordFit()
        trainer = fit(Classifier(), [callback], steps, checkpoint, default_root_dir=tmp_path)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return callback.run

    whole, first = trained(18), trained(12)
    second = trained(18, tmp_path / "last.ckpt")
    assert (len(first), len(second), second.directory) == (12, 6, Path("runs/loop-3"))
    assert_replays(second)
    for name, tensor in whole.parameters(0).items():
        assert second.parameters(0)[name].shape == tensor.shape


@pytest.mark.parametrize(
    "callback", [everystep.lightning.RecordFit, everystep.transformers.RecordTraining]
)
def test_the_callbacks_say_how_their_trainers_go_on(callback):
    with pytest.raises(everystep.UsageError, match=r"trainer's checkpoint, trainer\.(fit|train)\("):
        callback(run="runs/loop-1", resume=True)


class Sentences(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, row):
        generator = torch.Generator().manual_seed(row)
        ids = torch.randint(1, 40, (10,), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def bert():
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
    )
    return transformers.BertForMaskedLM(config)


def trained_by(trainer, model, callbacks, **settings):
    """Train three steps, and log each of them, unless the settings ask for others."""
    settings = {"max_steps": 3, "logging_steps": 1} | settings
    arguments = transformers.TrainingArguments(
        output_dir="out", per_device_train_batch_size=4, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True, **settings,
    )  # fmt: skip
    trainer(model, arguments, train_dataset=Sentences(), callbacks=callbacks).train()
    return model


@pytest.mark.sweep(every=2)
@pytest.mark.parametrize("accumulated", [1, 3])
def test_hugging_face_trainer(tmp_path, accumulated):
    torch.manual_seed(0)
    start = bert()

    def trained(*callbacks):
        settings = {"max_steps": STEPS // accumulated, "gradient_accumulation_steps": accumulated}
        settings |= {"learning_rate": 1e-3, "warmup_steps": 5, "seed": 1}
        return trained_by(transformers.Trainer, copy.deepcopy(start), [*callbacks], **settings)

    expected = trained()
    callback = everystep.transformers.RecordTraining(run=tmp_path / "run")
    model = trained(callback)
    run = callback.run
    assert [bits(p) for p in model.parameters()] == [bits(p) for p in expected.parameters()]
    assert_replays(run)
    assert (len(run), run.status) == (STEPS // accumulated, "finished")
    batch = run[2].batch
    assert batch["input_ids"].shape == (4, 10)
    assert len([name for name in batch.tensors if name.endswith("labels")]) == accumulated
    assert run.losses["loss"][-1] < run.losses["loss"][0]
    stopping = {"stop_when": "norm(gradients['cls.predictions.bias']) > 0 and step >= 2"}
    trained(callback := everystep.transformers.RecordTraining(run=tmp_path / "stopped", **stopping))
    assert (len(callback.run), callback.run.status) == (2, "stopped")


class Distilling(transformers.Trainer):
    """Its loss is another one than the model's."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output = model(**inputs)
        loss = 3 * output["loss"] + output["logits"].pow(2).mean()
        return (loss, output) if return_outputs else loss


class Around(transformers.Trainer):
    """Gives callbacks an object of its own, and what it trains by another name, as SetFit does."""

    def __init__(self, *args, **keywords):
        super().__init__(*args, **keywords)
        call = self.callback_handler.call_event

        def called(event, *given, **more):
            self.callback_handler.model = {"body": self.model}
            return call(event, *given, inner=self.model, **more)

        self.callback_handler.call_event = called


class Logged(transformers.TrainerCallback):
    def __init__(self):
        self.losses = []

    def on_log(self, args, state, control, logs=None, **given):
        self.losses += [logs["loss"]] if "loss" in logs else []


class Failing(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **given):
        if state.global_step == 2:
            raise ArithmeticError


def gpt():
    sizes = {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    config = transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.sweep(every=2)
@pytest.mark.parametrize(
    ("trainer", "make", "accumulated", "smoothing"),
    [
        (transformers.Trainer, bert, 1, 0.1),
        (transformers.Trainer, gpt, 2, 0.0),
        (Distilling, bert, 2, 0.0),
        (Around, bert, 1, 0.0),
    ],
)
def test_the_loss_of_a_step_is_what_trainer_logs(trainer, make, accumulated, smoothing):
    torch.manual_seed(0)
    backward = accelerate.Accelerator.backward
    logged, recorded = Logged(), everystep.transformers.RecordTraining(run="./run")
    settings = {"gradient_accumulation_steps": accumulated, "label_smoothing_factor": smoothing}
    trained_by(trainer, make(), [logged, recorded], **settings)
    assert recorded.run.losses["loss"].to_list() == logged.losses
    assert recorded.run.why(2, "loss").number.value == logged.losses[1]
    assert accelerate.Accelerator.backward is backward
    assert_replays(recorded.run)


def test_a_run_that_trainer_left_with_an_error_is_closed_as_the_next_begins():
    backward = accelerate.Accelerator.backward
    failed = everystep.transformers.RecordTraining(run="./failed")
    with pytest.raises(ArithmeticError):
        trained_by(transformers.Trainer, bert(), [failed, Failing()])
    trained_by(transformers.Trainer, bert(), [everystep.transformers.RecordTraining(run="./next")])
    assert accelerate.Accelerator.backward is backward
    assert (failed.run.status, len(failed.run)) == ("failed", 2)
