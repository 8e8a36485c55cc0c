"""A GAN on a ring of points: two networks, two optimizers, samples from a fixed noise."""

import itertools
import math

import torch
from torch import nn
from torch.utils.data import DataLoader

import everystep  # added

EPOCHS, NOISE = 5, 4


def network(*sizes, last=None):
    layers = []
    for one, two in itertools.pairwise(sizes):
        layers += [nn.Linear(one, two), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers[:-1], *([last] if last else []))


def ring(count):
    angles = torch.rand(count) * 2 * math.pi
    radii = 1 + 0.05 * torch.randn(count)
    return torch.stack([radii * angles.cos(), radii * angles.sin()], 1)


torch.manual_seed(3)
loader = DataLoader(
    ring(520), batch_size=50, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(5)
)
net_g, net_d = network(NOISE, 24, 24, 2), network(2, 24, 24, 1)
opt_g = torch.optim.Adam(net_g.parameters(), lr=2e-3, betas=(0.5, 0.999))
opt_d = torch.optim.Adam(net_d.parameters(), lr=2e-3, betas=(0.5, 0.999))
criterion = nn.BCEWithLogitsLoss()
fixed = torch.randn(32, NOISE)
sums = {"generator": 0.0, "discriminator": 0.0, "fooled": 0.0}

parts = {"net_g": net_g, "net_d": net_d, "opt_g": opt_g, "opt_d": opt_d, "sums": sums}  # added
with everystep.record(**parts, run="./run", resume=True) as recording:  # added
    for epoch in recording.epochs(EPOCHS):  # was: range(EPOCHS)
        sums.update(dict.fromkeys(sums, 0.0))
        for real in recording.steps(loader):  # was: loader
            ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)

            net_d.zero_grad()
            on_real = criterion(net_d(real), ones)
            on_real.backward()
            fake = net_g(torch.randn(len(real), NOISE))
            on_fake = criterion(net_d(fake.detach()), zeros)
            on_fake.backward()
            opt_d.step()

            net_g.zero_grad()
            answers = net_d(fake)
            loss = criterion(answers, ones)
            loss.backward()
            opt_g.step()

            sums["discriminator"] += (on_real + on_fake).item()
            sums["generator"] += loss.item()
            sums["fooled"] += (answers > 0).float().mean().item()
            recording.log(loss=loss, discriminator_loss=on_real + on_fake)  # added
        means = {name: total / len(loader) for name, total in sums.items()}
        print(f"epoch {epoch}: " + ", ".join(f"{name} {mean:.6f}" for name, mean in means.items()))
        with torch.no_grad():
            samples = net_g(fixed)
        torch.save(samples, f"samples-{epoch}.pt")
        torch.save({"g": net_g.state_dict(), "d": net_d.state_dict()}, "networks.pt")

print(f"mean radius {samples.norm(dim=1).mean():.6f}")
