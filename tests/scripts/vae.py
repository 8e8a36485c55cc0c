"""A variational autoencoder on small patterns: reconstruction and divergence, weighted by a warm-up."""

from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import everystep  # added

EPOCHS, SIDE, LATENT, WARMUP = 5, 8, 3, 20


class VAE(nn.Module):
    def __init__(self, pixels=SIDE * SIDE, hidden=32):
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(pixels, hidden), nn.Tanh())
        self.mean, self.log_variance = nn.Linear(hidden, LATENT), nn.Linear(hidden, LATENT)
        self.decoder = nn.Sequential(nn.Linear(LATENT, hidden), nn.Tanh(), nn.Linear(hidden, pixels))

    def forward(self, images):
        features = self.encoder(images)
        mean, log_variance = self.mean(features), self.log_variance(features)
        drawn = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        return self.decoder(drawn), mean, log_variance


def patterns(count):
    """Bars, some across and some upright, as images of 0 and 1."""
    images = torch.zeros(count, SIDE, SIDE)
    for image in images:
        place = int(torch.randint(SIDE - 1, ()))
        if torch.rand(()) < 0.5:
            image[place : place + 2] = 1
        else:
            image[:, place : place + 2] = 1
    return images


def losses_of(images):
    logits, mean, log_variance = model(images)
    reconstruction = nn.functional.binary_cross_entropy_with_logits(
        logits, images.flatten(1), reduction="sum"
    )
    divergence = -0.5 * (1 + log_variance - mean.pow(2) - log_variance.exp()).sum()
    return reconstruction / len(images), divergence / len(images)


torch.manual_seed(4)
images = patterns(288)
train, test = images[:240], images[240:]
sampler = WeightedRandomSampler(1 + train.sum((1, 2)) % 3, num_samples=240)
loader = DataLoader(TensorDataset(train), batch_size=24, sampler=sampler)
model = VAE()
optimizer = torch.optim.NAdam(model.parameters(), lr=5e-3)
warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
counts = {"updates": 0, "weight": 0.0, "best": float("inf")}
Path("samples").mkdir(exist_ok=True)

parts = {"model": model, "optimizer": optimizer, "warmup": warmup, "counts": counts}  # added
with everystep.record(**parts, run="runs/vae", resume=True) as recording:  # added
    for epoch in recording.epochs(EPOCHS):  # was: range(EPOCHS)
        model.train()
        for (batch,) in recording.steps(loader):  # was: loader
            counts["weight"] = min(1.0, counts["updates"] / (2 * WARMUP))
            reconstruction, divergence = losses_of(batch)
            loss = reconstruction + counts["weight"] * divergence
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            warmup.step()
            counts["updates"] += 1
            recording.log(loss=loss, reconstruction=reconstruction, divergence=divergence)  # added
        model.eval()
        with torch.no_grad():
            reconstruction, divergence = (each.item() for each in losses_of(test))
            samples = model.decoder(torch.randn(4, LATENT)).sigmoid().view(-1, SIDE, SIDE)
        print(f"epoch {epoch}: {reconstruction:.5f} + {divergence:.5f}, weight {counts['weight']:.3f}")
        torch.save(samples, f"samples/{epoch:02d}.pt")
        if reconstruction + divergence < counts["best"]:
            counts["best"] = reconstruction + divergence
            torch.save({"epoch": epoch, "state": model.state_dict(), **counts}, "best.pt")
