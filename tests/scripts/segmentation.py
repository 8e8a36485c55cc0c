"""Segment discs in noisy images, which two workers of the DataLoader augment at random."""

import random

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import everystep  # added

EPOCHS, SIZE = 4, 16


class Discs(Dataset):
    """Images of a disc each, and its mask; flipped, shifted and made noisy at each access."""

    def __init__(self, count, augment):
        places = torch.arange(SIZE)
        rows, columns = torch.meshgrid(places, places, indexing="ij")
        self.masks = []
        for _ in range(count):
            row, column, radius = *torch.randint(3, SIZE - 3, (2,)).tolist(), random.uniform(2, 5)
            self.masks.append(((rows - row) ** 2 + (columns - column) ** 2 <= radius**2).float()[None])
        self.augment = augment

    def __len__(self):
        return len(self.masks)

    def __getitem__(self, index):
        mask = self.masks[index]
        if not self.augment:
            noise = torch.randn(mask.shape, generator=torch.Generator().manual_seed(index))
            return mask + 0.5 * noise, mask
        if random.random() < 0.5:
            mask = mask.flip(2)
        mask = mask.roll((random.randint(-2, 2), random.randint(-2, 2)), (1, 2))
        return mask * random.uniform(0.7, 1.3) + 0.5 * torch.randn(mask.shape), mask


class SmallUNet(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.GroupNorm(2, width), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.out = nn.Conv2d(2 * width, 1, 1)

    def forward(self, images):
        fine = self.down(images)
        return self.out(torch.cat([fine, self.up(self.middle(fine))], 1))


def dice_loss(logits, masks):
    shares = logits.sigmoid()
    common = (shares * masks).sum((1, 2, 3))
    return 1 - ((2 * common + 1) / (shares.sum((1, 2, 3)) + masks.sum((1, 2, 3)) + 1)).mean()


random.seed(11)
torch.manual_seed(11)
train_loader = DataLoader(Discs(96, augment=True), batch_size=12, shuffle=True, num_workers=2)
test_loader = DataLoader(Discs(24, augment=False), batch_size=24)
model = SmallUNet()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[2, 3], gamma=0.3)
losses = []

parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "losses": losses}  # added
with everystep.record(**parts, run="./run", resume=True) as recording:  # added
    for epoch in recording.epochs(EPOCHS):  # was: range(EPOCHS)
        model.train()
        for images, masks in recording.steps(train_loader):  # was: train_loader
            logits = model(images)
            entropy = nn.functional.binary_cross_entropy_with_logits(logits, masks)
            loss = entropy + dice_loss(logits, masks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            recording.log(loss=loss, entropy=entropy)  # added
        scheduler.step()
        model.eval()
        with torch.no_grad():
            images, masks = next(iter(test_loader))
            found = model(images) > 0
            iou = (found & masks.bool()).sum() / (found | masks.bool()).sum()
        mean = sum(losses[-len(train_loader) :]) / len(train_loader)
        print(f"epoch {epoch}: loss {mean:.6f}, IoU {iou:.6f}, rate {scheduler.get_last_lr()[0]:.4f}")
        torch.save({"epoch": epoch, "model": model.state_dict(), "losses": losses}, f"{epoch}.pt")
