"""A regression with a progress bar, and a CSV file that grows with each epoch."""

import csv
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import everystep  # added

EPOCHS, LOG_EVERY = 6, 4


class CsvLog:
    """A CSV file to which rows are added; what is in the file after the last of them is dropped."""

    def __init__(self, path, columns):
        self.path, self.columns, self.size = path, columns.split(), 0

    def add(self, row):
        with Path(self.path).open("r+" if self.size else "w", newline="") as file:
            file.seek(self.size)
            file.truncate()
            csv.writer(file).writerows([row] if self.size else [self.columns, row])
            self.size = file.tell()


class Average:
    def __init__(self):
        self.total, self.count = 0.0, 0

    def add(self, value):
        self.total, self.count = self.total + value, self.count + 1
        return self.total / self.count


torch.manual_seed(21)
x = torch.rand(400, 3) * 4 - 2
y = (x[:, :1] * x[:, 1:2]).sin() + 0.1 * x[:, 2:] + 0.05 * torch.randn(400, 1)
train_loader = DataLoader(TensorDataset(x[:320], y[:320]), batch_size=32, shuffle=True)
model = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 1))
ema = torch.optim.swa_utils.AveragedModel(
    model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
)
opt = torch.optim.RMSprop(model.parameters(), lr=3e-3)
scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, 1e-2, EPOCHS * len(train_loader))
steps_log = CsvLog("steps.csv", "epoch batch loss rate")
epochs_log = CsvLog("epochs.csv", "epoch train test averaged")
logs = {"steps": steps_log, "epochs": epochs_log, "mean": Average()}

parts = {"model": model, "ema": ema, "opt": opt, "scheduler": scheduler, "logs": logs}  # added
with everystep.record(**parts, run="./run", resume=True) as recording:  # added
    for epoch in recording.epochs(EPOCHS):  # was: range(EPOCHS)
        logs["mean"] = mean = Average()
        bar = tqdm(recording.steps(train_loader), desc=f"epoch {epoch}")  # was: tqdm(train_loader, ...)
        for inputs, targets in bar:
            loss = nn.functional.huber_loss(model(inputs), targets)
            opt.zero_grad()
            loss.backward()
            opt.step()
            ema.update_parameters(model)
            rate = scheduler.get_last_lr()[0]
            scheduler.step()
            bar.set_postfix(loss=f"{mean.add(loss.item()):.4f}")
            if mean.count % LOG_EVERY == 0:
                steps_log.add([epoch, mean.count, f"{loss.item():.8f}", f"{rate:.8f}"])
            recording.log(loss=loss)  # added
        with torch.no_grad():
            tests = [nn.functional.mse_loss(each(x[320:]), y[320:]).item() for each in (model, ema)]
        epochs_log.add([epoch, mean.total / mean.count, *tests])
        tqdm.write(f"epoch {epoch}: train {mean.total / mean.count:.6f}, test {tests[0]:.6f}")
    torch.save(ema.module.state_dict(), "averaged.pt")
