"""Predict a time series with an LSTM, by truncated backpropagation through time."""

import torch
from torch import nn

import everystep  # added

EPOCHS, WINDOW, STREAMS, HIDDEN = 4, 16, 5, 12


class Forecaster(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(1, HIDDEN, num_layers=2, dropout=0.1, batch_first=True)
        self.out = nn.Linear(HIDDEN, 1)

    def forward(self, window, memory):
        features, memory = self.lstm(window, memory)
        return self.out(features), memory


def windows(series):
    """Inputs and targets of successive windows."""
    for start in range(0, series.shape[1] - WINDOW, WINDOW):
        yield series[:, start : start + WINDOW], series[:, start + 1 : start + WINDOW + 1]


torch.manual_seed(2)
times = torch.arange(16 * WINDOW + 1) * 0.15
speeds = torch.linspace(0.7, 1.3, STREAMS).unsqueeze(1)
series = ((speeds * times).sin() + 0.5 * (2.3 * speeds * times).cos()).unsqueeze(2)
series += 0.05 * torch.randn(series.shape)
model = Forecaster()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
carried = {"memory": None, "loss": 0.0, "windows": 0}

parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "carried": carried}  # added
with everystep.record(**parts, run="./run", resume=True) as recording:  # added
    for epoch in recording.epochs(EPOCHS):  # was: range(EPOCHS)
        model.train()
        carried.update(memory=None, loss=0.0, windows=0)
        for inputs, targets in recording.steps(windows(series)):  # was: windows(series)
            memory = carried["memory"]
            if memory is not None:
                memory = tuple(state.detach() for state in memory)
            predicted, carried["memory"] = model(inputs, memory)
            loss = nn.functional.mse_loss(predicted, targets)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_value_(model.parameters(), 0.5)
            optimizer.step()
            carried["loss"] += loss.item()
            carried["windows"] += 1
            recording.log(loss=loss)  # added
        scheduler.step()
        print(f"epoch {epoch}: {carried['loss'] / carried['windows']:.6f}")

        model.eval()
        with torch.no_grad():
            value, memory = series[:1, :1], None
            said = []
            for _ in range(8):
                value, memory = model(value, memory)
                said.append(f"{value.item():.5f}")
        print("free run:", *said)
        torch.save(
            {"epoch": epoch, "model": model.state_dict(), "rate": scheduler.get_last_lr()}, "last.pt"
        )
