"""Classify scikit-learn's digits: validation, best checkpoint, early stop."""

import json
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import everystep  # added

EPOCHS, BATCH, PATIENCE = 12, 64, 1


class Net(nn.Module):
    def __init__(self, channels=8, classes=10):
        super().__init__()
        self.conv = nn.Conv2d(1, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.pool = nn.MaxPool2d(2)
        self.drop = nn.Dropout(0.25)
        self.out = nn.Linear(channels * 16, classes)

    def forward(self, images):
        features = self.pool(torch.relu(self.norm(self.conv(images))))
        return self.out(self.drop(features.flatten(1)))


def evaluate(model, loader):
    """Mean loss and accuracy over a data set."""
    model.eval()
    loss, correct, seen = 0.0, 0, 0
    with torch.no_grad():
        for images, labels in loader:
            logits = model(images)
            loss += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            correct += (logits.argmax(1) == labels).sum().item()
            seen += len(labels)
    return loss / seen, correct / seen


torch.manual_seed(7)
digits = load_digits()
images = torch.tensor(digits.images[:700], dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target[:700])
train_set, val_set = random_split(TensorDataset(images, labels), [500, 200])
train_loader = DataLoader(train_set, batch_size=BATCH, shuffle=True)
val_loader = DataLoader(val_set, batch_size=200)

model = Net()
opt = torch.optim.AdamW(model.parameters(), lr=2e-2)
scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0)
best = {"loss": float("inf"), "epoch": -1}
log = {"loss": 0.0, "seen": 0, "history": []}

parts = {"model": model, "opt": opt, "scheduler": scheduler, "best": best, "log": log}  # added
with everystep.record(**parts, run="./run", resume=True) as recording:  # added
    for epoch in recording.epochs(EPOCHS):  # was: range(EPOCHS)
        model.train()
        log.update(loss=0.0, seen=0)
        for images, labels in recording.steps(train_loader):  # was: train_loader
            opt.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            opt.step()
            log["loss"] += loss.item() * len(labels)
            log["seen"] += len(labels)
            recording.log(loss=loss)  # added
        train_loss = log["loss"] / log["seen"]
        val_loss, accuracy = evaluate(model, val_loader)
        scheduler.step(val_loss)
        log["history"].append(
            {"epoch": epoch, "train": train_loss, "val": val_loss, "accuracy": accuracy}
        )
        print(f"epoch {epoch}: train {train_loss:.6f}, validation {val_loss:.6f}, {accuracy:.1%}")
        if val_loss < best["loss"]:
            best.update(loss=val_loss, epoch=epoch)
            torch.save(model.state_dict(), "best.pt")
        elif epoch - best["epoch"] >= PATIENCE:
            print(f"no better for {epoch - best['epoch']} epochs")
            break

Path("history.json").write_text(json.dumps(log["history"], indent=1))
model.load_state_dict(torch.load("best.pt", weights_only=True))
print(f"best epoch {best['epoch']}: {evaluate(model, val_loader)}")
