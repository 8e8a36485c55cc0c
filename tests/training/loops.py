"""Loops as people write them: each is run as it is, and recorded, and must do the same.

A loop takes a number of steps and something that makes a recording of its parts, or one that does
nothing (`tests.descent.unrecorded`). It returns its losses and the state_dicts that it ends with.
"""

import copy
import random

import numpy as np
import torch
from tests.descent import descend
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["LOOPS"]

LOOPS = {}


class Noted:
    """A recording that notes each loss that is logged."""

    def __init__(self, recording, losses):
        self._recording, self._losses = recording, losses

    def __enter__(self):
        self._recording = self._recording.__enter__() or self._recording
        return self

    def __exit__(self, *error):
        return self._recording.__exit__(*error)

    def __getattr__(self, name):
        return getattr(self._recording, name)

    def log(self, **values):
        self._recording.log(**values)
        if "loss" in values:
            loss = values["loss"]
            self._losses.append(loss.item() if isinstance(loss, torch.Tensor) else loss)


def loop(function):
    """Add a loop, which is a function of steps and `record` that returns its models."""

    def run(steps, record):
        losses = []
        models = function(steps, lambda **parts: Noted(record(**parts), losses))
        return losses, [model.state_dict() for model in models]

    LOOPS[function.__name__] = run
    return run


def data(rows=64, inputs=6, outputs=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, inputs, generator=generator)
    return x, torch.randn(rows, outputs, generator=generator)


def endless(loader, steps):
    """Yield so many batches, in as many epochs as that takes."""
    count = 0
    while True:
        for batch in loader:
            if count == steps:
                return
            count += 1
            yield batch


def loader(*tensors, batch_size=16):
    return DataLoader(TensorDataset(*tensors), batch_size=batch_size, shuffle=True)


@loop
def classifier_with_dropout(steps, record):
    x, _ = data()
    y = torch.randint(0, 3, (64,), generator=torch.Generator().manual_seed(2))
    model = nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with record(model=model, optimizer=optimizer) as recording:
        for inputs, labels in recording.steps(endless(loader(x, y), steps)):
            optimizer.zero_grad()
            logits = model(inputs)
            loss = functional.cross_entropy(logits, labels)
            loss.backward()
            optimizer.step()
            accuracy = (logits.argmax(1) == labels).float().mean().item()
            recording.log(loss=loss, accuracy=accuracy)
    return [model]


@loop
def gan_with_two_optimizers(steps, record):
    x, _ = data(inputs=2)
    generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    discriminator = nn.Sequential(nn.Linear(2, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
    optimizer_g = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    criterion = nn.BCEWithLogitsLoss()
    parts = {"generator": generator, "discriminator": discriminator}
    with record(**parts, optimizer_g=optimizer_g, optimizer_d=optimizer_d) as recording:
        for (real,) in recording.steps(endless(loader(x), steps)):
            optimizer_d.zero_grad()
            fake = generator(torch.randn(len(real), 4))
            ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)
            loss_d = criterion(discriminator(real), ones) + criterion(
                discriminator(fake.detach()), zeros
            )
            loss_d.backward()
            optimizer_d.step()
            optimizer_g.zero_grad()
            loss_g = criterion(discriminator(fake), ones)
            loss_g.backward()
            optimizer_g.step()
            recording.log(loss=loss_g, loss_d=loss_d)
    return [generator, discriminator]


class LanguageModel(nn.Module):
    def __init__(self, words=32, width=16):
        super().__init__()
        self.tokens, self.places = nn.Embedding(words, width), nn.Embedding(8, width)
        layer = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.1, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        h = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.head(self.layers(h, mask=mask, is_causal=True))


@loop
def language_model_with_accumulation_and_clipping(steps, record):
    ids = torch.randint(0, 32, (64, 9), generator=torch.Generator().manual_seed(3))
    model = LanguageModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / 10))
    batches = [{"ids": part[:, :-1], "labels": part[:, 1:]} for part in ids.split(8)]
    with record(model=model, optimizer=optimizer, scheduler=scheduler) as recording:
        for number, batch in enumerate(recording.steps(endless(batches, steps))):
            logits = model(batch["ids"])
            loss = functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()) / 4
            loss.backward()
            if (number + 1) % 4 == 0:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            recording.log(loss=loss)
    return [model]


@loop
def bfloat16_autocast(steps, record):
    x, y = data()
    model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    with record(model=model, optimizer=optimizer) as recording:
        for inputs, targets in recording.steps(endless(loader(x, y), steps)):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = functional.mse_loss(model(inputs), targets)
            descend(optimizer, loss)
            recording.log(loss=loss)
    return [model]


@loop
def gradient_scaler_with_an_overflow(steps, record):
    x, y = data()
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=20)
    with record(model=model, optimizer=optimizer, scaler=scaler) as recording:
        for number, (inputs, targets) in enumerate(recording.steps(endless(loader(x, y), steps))):
            optimizer.zero_grad()
            loss = functional.mse_loss(model(inputs), targets)
            if number == 12:
                loss = loss * float("inf")
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            recording.log(loss=loss, scale=scaler.get_scale())
    return [model]


@loop
def averaged_weights_with_batch_norm(steps, record):
    x, y = data()
    model = nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16, momentum=None), nn.ReLU(), nn.Linear(16, 3)
    )
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99), use_buffers=True
    )
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)
    with record(model=model, average=average, optimizer=optimizer) as recording:
        for inputs, targets in recording.steps(endless(loader(x, y), steps)):
            loss = descend(optimizer, functional.mse_loss(model(inputs), targets))
            average.update_parameters(model)
            recording.log(loss=loss)
    return [model, average]


@loop
def two_schedulers_and_layers_unfrozen_on_the_way(steps, record):
    x, y = data()
    body, head = nn.Sequential(nn.Linear(6, 16), nn.ReLU()), nn.Linear(16, 3)
    model = nn.Sequential(body, head)
    body.requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [{"params": head.parameters()}, {"params": body.parameters(), "lr": 1e-4}]
    )
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    with record(model=model, optimizer=optimizer, warmup=warmup, cosine=cosine) as recording:
        for number, (inputs, targets) in enumerate(recording.steps(endless(loader(x, y), steps))):
            if number == 15:
                body.requires_grad_(True)
            loss = descend(optimizer, functional.smooth_l1_loss(model(inputs), targets))
            (warmup if number < 10 else cosine).step()
            recording.log(loss=loss)
    return [model]


@loop
def lbfgs_with_line_search(steps, record):
    x, y = data()
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2, line_search_fn="strong_wolfe")
    with record(model=model, optimizer=optimizer) as recording:
        for inputs, targets in recording.steps([(x, y)] * min(steps, 8)):

            def closure(inputs=inputs, targets=targets):
                optimizer.zero_grad()
                loss = functional.mse_loss(model(inputs), targets)
                loss.backward()
                return loss

            loss = optimizer.step(closure)
            recording.log(loss=loss)
    return [model]


@loop
def target_network_with_a_replay_buffer(steps, record):
    online = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    target = copy.deepcopy(online)
    optimizer = torch.optim.Adam(online.parameters(), lr=1e-3)
    buffer = []
    generator = np.random.default_rng(0)
    with record(online=online, target=target, optimizer=optimizer) as recording:
        for number in range(steps):
            with recording.step():
                state = torch.from_numpy(generator.normal(size=4).astype(np.float32))
                with torch.no_grad():
                    action = online(state).argmax().item()
                following = torch.from_numpy(generator.normal(size=4).astype(np.float32))
                buffer.append((state, action, float(generator.normal()), following))
                batch = random.sample(buffer, min(8, len(buffer)))
                states, followers = (
                    torch.stack([b[0] for b in batch]),
                    torch.stack([b[3] for b in batch]),
                )
                actions = torch.tensor([b[1] for b in batch])
                with torch.no_grad():
                    best = torch.tensor([b[2] for b in batch]) + 0.9 * target(followers).max(1).values
                chosen = online(states).gather(1, actions[:, None]).squeeze(1)
                loss = descend(optimizer, functional.huber_loss(chosen, best))
                if number % 10 == 0:
                    target.load_state_dict(online.state_dict())
                recording.log(loss=loss)
    return [online, target]


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        context.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(context, gradient):
        (x,) = context.saved_tensors
        return gradient * 2 + 0 * x


@loop
def sparse_embeddings_and_own_functions(steps, record):
    words = torch.randint(0, 20, (64, 4), generator=torch.Generator().manual_seed(4))
    _, y = data()
    embedding, head = nn.Embedding(20, 6, sparse=True), nn.Linear(6, 3)
    sparse = torch.optim.SparseAdam(embedding.parameters(), lr=1e-2)
    dense = torch.optim.Adagrad(head.parameters(), lr=1e-2)
    with record(embedding=embedding, head=head, sparse=sparse, dense=dense) as recording:
        for ids, targets in recording.steps(endless(loader(words, y), steps)):
            h = torch.utils.checkpoint.checkpoint(
                lambda ids: embedding(ids).mean(1).tanh(), ids, use_reentrant=False
            )
            loss = functional.mse_loss(head(Doubled.apply(h)), targets)
            sparse.zero_grad()
            dense.zero_grad()
            loss.backward()
            sparse.step()
            dense.step()
            recording.log(loss=loss)
    return [embedding, head]


@loop
def speech_with_ctc_and_lstm(steps, record):
    generator = torch.Generator().manual_seed(5)
    sounds = torch.randn(32, 12, 4, generator=generator)
    texts = torch.randint(1, 5, (32, 4), generator=generator)
    recurrent, head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 5)
    optimizer = torch.optim.Adam([*recurrent.parameters(), *head.parameters()], lr=1e-2)
    with record(recurrent=recurrent, head=head, optimizer=optimizer) as recording:
        for sound, text in recording.steps(
            endless(loader(sounds, texts, batch_size=8), min(steps, 100))
        ):
            logits = head(recurrent(sound)[0]).log_softmax(-1).transpose(0, 1)
            lengths = torch.full((len(sound),), 12), torch.full((len(sound),), 4)
            recording.log(loss=descend(optimizer, functional.ctc_loss(logits, text, *lengths)))
    return [recurrent, head]
