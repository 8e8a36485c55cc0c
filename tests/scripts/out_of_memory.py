"""Sort sequences with a transformer; where a batch does not fit into memory, go on with half of it."""

import torch
from torch import nn

import everystep  # added

UPDATES, BATCH, WIDTH, SYMBOLS = 30, 32, 16, 10
#: Symbols of a batch for which there is memory; this machine has more, so we pretend.
MEMORY = 16 * 10


class Sorter(nn.Module):
    def __init__(self):
        super().__init__()
        self.symbol, self.place = nn.Embedding(SYMBOLS, WIDTH), nn.Embedding(16, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.1, batch_first=True)
        self.out = nn.Linear(WIDTH, SYMBOLS)

    def forward(self, sequences):
        hidden = self.symbol(sequences) + self.place(torch.arange(sequences.shape[1]))
        if sequences.numel() > MEMORY:
            raise torch.OutOfMemoryError(f"cannot hold {sequences.numel()} symbols")
        return self.out(self.layer(hidden))


def batches(count):
    """Sequences of random lengths, longer ones later."""
    for number in range(count):
        length = int(torch.randint(4, 6 + number // 3, ()))
        yield torch.randint(SYMBOLS, (BATCH, length))


def backward(sequences, size):
    """Add the gradients of a batch, in pieces of a size; return its loss."""
    total = 0.0
    for piece in sequences.split(size):
        logits = model(piece)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), piece.sort(1).values.flatten())
        loss = loss * len(piece) / len(sequences)
        loss.backward()
        total += loss.detach()
    return total


torch.manual_seed(9)
model = Sorter()
optimizer = torch.optim.Adamax(model.parameters(), lr=1e-2)
memory = {"size": BATCH, "failures": []}

parts = {"model": model, "optimizer": optimizer, "memory": memory}  # added
with everystep.record(**parts, run="./run", resume=True) as recording:  # added
    for number, sequences in recording.steps(enumerate(batches(UPDATES))):  # was: enumerate(...)
        loss = None
        while loss is None:
            optimizer.zero_grad()
            try:
                loss = backward(sequences, memory["size"])
            except torch.OutOfMemoryError as error:
                memory["size"] //= 2
                memory["failures"].append(number)
                print(f"update {number}: {error}; from now on {memory['size']} at once")
        optimizer.step()
        print(f"update {number}: length {sequences.shape[1]}, loss {loss.item():.6f}")
        recording.log(loss=loss)  # added
        if number % 10 == 9:
            torch.save({"model": model.state_dict(), "number": number, **memory}, "last.pt")
