"""A small GPT on characters: random windows, accumulation, clipping, a cosine rate, checkpoints."""

import math

import torch
from torch import nn

import everystep  # added

TEXT = "".join(f"{n} times {n} is {n * n}, and {n} plus {n} is {n + n}. " for n in range(120))
BLOCK, BATCH, WIDTH, HEADS, LAYERS = 24, 6, 32, 4, 2
ITERATIONS, WARMUP, EVALUATE_EVERY, EVALUATIONS, ACCUMULATE = 26, 5, 6, 3, 2
MOST_RATE, LEAST_RATE = 3e-3, 3e-4


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (
            each.view(b, t, HEADS, -1).transpose(1, 2)
            for each in self.qkv(self.before_attention(x)).chunk(3, dim=2)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.out(mixed.transpose(1, 2).reshape(b, t, -1)))
        return x + self.drop(self.mlp(self.before_mlp(x)))


class GPT(nn.Module):
    def __init__(self, symbols):
        super().__init__()
        self.symbol, self.place = nn.Embedding(symbols, WIDTH), nn.Embedding(BLOCK, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, symbols, bias=False)
        self.head.weight = self.symbol.weight

    def forward(self, x, y):
        hidden = self.symbol(x) + self.place(torch.arange(x.shape[1]))
        logits = self.head(self.norm(self.blocks(hidden)))
        return nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())


def get_batch(split):
    data = splits[split]
    starts = torch.randint(len(data) - BLOCK, (BATCH,))
    x = torch.stack([data[i : i + BLOCK] for i in starts])
    y = torch.stack([data[i + 1 : i + 1 + BLOCK] for i in starts])
    return x, y


@torch.no_grad()
def estimate_loss():
    model.eval()
    found = {
        split: torch.tensor([model(*get_batch(split)).item() for _ in range(EVALUATIONS)]).mean().item()
        for split in splits
    }
    model.train()
    return found


def rate_at(iteration):
    if iteration < WARMUP:
        return MOST_RATE * (iteration + 1) / WARMUP
    share = (iteration - WARMUP) / (ITERATIONS - WARMUP)
    return LEAST_RATE + 0.5 * (1 + math.cos(math.pi * share)) * (MOST_RATE - LEAST_RATE)


torch.manual_seed(1337)
symbols = sorted(set(TEXT))
data = torch.tensor([symbols.index(each) for each in TEXT])
splits = {"train": data[: int(0.9 * len(data))], "val": data[int(0.9 * len(data)) :]}
model = GPT(len(symbols))
decayed = [p for p in model.parameters() if p.dim() >= 2]
others = [p for p in model.parameters() if p.dim() < 2]
groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=MOST_RATE, betas=(0.9, 0.95))
best = {"val": float("inf")}
ahead = dict(zip("xy", get_batch("train"), strict=True))  # the next batch

parts = {"model": model, "optimizer": optimizer, "best": best, "ahead": ahead}  # added
with everystep.record(**parts, run="./run", resume=True) as recording:  # added
    for iteration in recording.steps(range(ITERATIONS)):  # was: range(ITERATIONS)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(iteration)
        if iteration % EVALUATE_EVERY == 0:
            losses = estimate_loss()
            print(f"step {iteration}: train {losses['train']:.6f}, val {losses['val']:.6f}")
            if losses["val"] < best["val"]:
                best["val"] = losses["val"]
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state | {"iteration": iteration, "best": best["val"]}, "checkpoint.pt")
        for _ in range(ACCUMULATE):
            loss = model(ahead["x"], ahead["y"]) / ACCUMULATE
            ahead["x"], ahead["y"] = get_batch("train")
            loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        print(f"iteration {iteration}: loss {loss.item() * ACCUMULATE:.6f}, norm {norm:.6f}")
        recording.log(loss=loss * ACCUMULATE)  # added
