"""One training by everystep, PyTorch Lightning or Hugging Face's Trainer, which goes on where it ended.

It is what the independent checker `ckpt-chaos` runs: `python -m benchmarks.torture.peers everystep --out
DIR` trains a small network for 30 steps, with a checkpoint after every 5 (everystep places its own
snapshots), or goes on in DIR with the library's own means. The parameters go to DIR/final.bin.
"""

# mypy: disable-error-code="misc, no-untyped-call"

from __future__ import annotations

import argparse
from pathlib import Path

STEPS, EVERY, ROWS = 30, 5, 16


def main() -> None:
    """Train, or go on."""
    parser = argparse.ArgumentParser()
    parser.add_argument("library", choices=["everystep", "lightning", "transformers"])
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    if asked.library == "everystep":
        from everystep import numerics

        numerics.prepare()
    import torch
    from torch import Tensor, nn

    asked.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    x = torch.randn(EVERY * ROWS, 8, generator=torch.Generator().manual_seed(123))
    by = {"everystep": _everystep, "lightning": _lightning, "transformers": _transformers}
    by[asked.library](network, x, x.sum(1, keepdim=True), asked.out)
    values: list[Tensor] = [each.detach().contiguous() for each in network.parameters()]
    (asked.out / "final.bin").write_bytes(b"".join(value.numpy().tobytes() for value in values))


def _everystep(network, x, y, out):  # type: ignore[no-untyped-def]
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    import everystep

    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    loader = DataLoader(TensorDataset(x, y), batch_size=ROWS)
    run = out / "run"
    with everystep.record(run=run, resume=True, model=network, optimizer=optimizer) as recording:
        print(f"resumed from step {recording.step_count}")
        for _ in range(STEPS // EVERY):
            for inputs, targets in recording.steps(loader):
                optimizer.zero_grad()
                loss = torch.nn.functional.mse_loss(network(inputs), targets)
                loss.backward()
                optimizer.step()
                recording.log(loss=loss)


def _lightning(network, x, y, out):  # type: ignore[no-untyped-def]
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint
    from torch.utils.data import DataLoader, TensorDataset

    class Module(pl.LightningModule):
        def __init__(self):  # type: ignore[no-untyped-def]
            super().__init__()
            self.network = network

        def training_step(self, batch, number):  # type: ignore[no-untyped-def]
            return torch.nn.functional.mse_loss(self.network(batch[0]), batch[1])

        def configure_optimizers(self):  # type: ignore[no-untyped-def]
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    class Said(Callback):
        def on_train_start(self, trainer, module):  # type: ignore[no-untyped-def]
            print(f"resumed from step {trainer.global_step}")

    checkpoints = ModelCheckpoint(
        dirpath=out / "checkpoints",
        filename="ck-{step}",
        every_n_epochs=1,
        save_top_k=-1,
        save_last=True,
    )
    trainer = pl.Trainer(
        max_epochs=STEPS // EVERY,
        accelerator="cpu",
        callbacks=[Said(), checkpoints],
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        default_root_dir=out,
    )
    loader = DataLoader(TensorDataset(x, y), batch_size=ROWS)
    trainer.fit(Module(), loader, ckpt_path="last")


def _transformers(network, x, y, out):  # type: ignore[no-untyped-def]
    import torch
    from torch import nn
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Model(nn.Module):
        def __init__(self):  # type: ignore[no-untyped-def]
            super().__init__()
            self.network = network

        def forward(self, inputs, labels):  # type: ignore[no-untyped-def]
            prediction = self.network(inputs)
            return {"loss": nn.functional.mse_loss(prediction, labels), "logits": prediction}

    class Said(TrainerCallback):
        def on_train_begin(self, arguments, state, control, **rest):  # type: ignore[no-untyped-def]
            print(f"resumed from step {state.global_step}")

    settings = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=ROWS,
        num_train_epochs=STEPS // EVERY,
        save_steps=EVERY,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    rows = [{"inputs": a, "labels": b} for a, b in zip(x, y, strict=True)]
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    trainer = Trainer(
        model, settings, train_dataset=rows, optimizers=(optimizer, scheduler), callbacks=[Said()]
    )
    trainer.train(resume_from_checkpoint=any(out.glob("checkpoint-*")))


if __name__ == "__main__":
    main()
