"""A denoising diffusion model (DDPM) of points on a spiral, with averaged weights."""

import copy
import math

import torch
from torch import nn

import everystep  # added

STEPS, EPOCHS, BATCH, POINTS = 20, 5, 64, 512


class Denoiser(nn.Module):
    """Predicts the noise in points, given the time."""

    def __init__(self, width=32, frequencies=4):
        super().__init__()
        self.register_buffer("frequencies", 2.0 ** torch.arange(frequencies))
        self.first = nn.Linear(2 + 2 * frequencies, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.last = nn.Linear(width, 2)

    def forward(self, points, times):
        angles = times[:, None] / STEPS * self.frequencies * math.pi
        hidden = self.first(torch.cat([points, angles.sin(), angles.cos()], 1))
        for block in self.blocks:
            hidden = hidden + nn.functional.silu(block(hidden))
        return self.last(hidden)


class Schedule:
    """How much of the data is left at each time."""

    def __init__(self):
        self.beta = torch.linspace(1e-3, 0.3, STEPS)
        self.kept = (1 - self.beta).cumprod(0)

    def noisy(self, points, times, noise):
        kept = self.kept[times][:, None]
        return kept.sqrt() * points + (1 - kept).sqrt() * noise

    @torch.no_grad()
    def sample(self, denoiser, count):
        points = torch.randn(count, 2)
        for time in reversed(range(STEPS)):
            noise = denoiser(points, torch.full((count,), time))
            points = points - self.beta[time] / (1 - self.kept[time]).sqrt() * noise
            points = points / (1 - self.beta[time]).sqrt()
            if time:
                points = points + self.beta[time].sqrt() * torch.randn_like(points)
        return points


def average(into, model, decay=0.95):
    with torch.no_grad():
        for mean, parameter in zip(into.parameters(), model.parameters(), strict=True):
            mean.mul_(decay).add_(parameter, alpha=1 - decay)


torch.manual_seed(6)
turns = torch.rand(POINTS).sqrt() * 3 * math.pi
data = torch.stack([turns * turns.cos(), turns * turns.sin()], 1) / 6 + 0.02 * torch.randn(POINTS, 2)
schedule, model = Schedule(), Denoiser()
averaged = copy.deepcopy(model).requires_grad_(False)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-4)
log = {"order": torch.arange(POINTS), "sum": 0.0, "history": []}

parts = {"model": model, "averaged": averaged, "optimizer": optimizer, "log": log}  # added
with everystep.record(**parts, run="./run", resume=True) as recording:  # added
    for epoch in recording.epochs(EPOCHS):  # was: range(EPOCHS)
        log["order"], log["sum"] = torch.randperm(POINTS), 0.0
        for start in recording.steps(range(0, POINTS, BATCH)):  # was: range(0, POINTS, BATCH)
            points = data[log["order"][start : start + BATCH]]
            times, noise = torch.randint(STEPS, (len(points),)), torch.randn_like(points)
            loss = nn.functional.mse_loss(model(schedule.noisy(points, times, noise), times), noise)
            optimizer.zero_grad(set_to_none=False)
            loss.backward()
            optimizer.step()
            average(averaged, model)
            log["sum"] += loss.item()
            recording.log(loss=loss)  # added
        log["history"].append(log["sum"] * BATCH / POINTS)
        samples = schedule.sample(averaged, 64)
        print(f"epoch {epoch}: loss {log['history'][-1]:.6f}, radius {samples.norm(dim=1).mean():.6f}")
        torch.save({"averaged": averaged.state_dict(), "samples": samples, **log}, "diffusion.pt")
