"""Loops of several processes, as people write them: `torchrun ranks_loops.py CASE...`, in turn.

Each is trained without everystep, and then recorded in `runs/CASE`; `digests-RANK.json` has the digests
of the weights of both.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional_collectives
from tests.descent import descend, unrecorded
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import everystep
from everystep.cli import app
from everystep.recording import directories, snapshots
from everystep.recording.recorder import Recorder
from everystep.training import agreement, writer
from everystep.training.job import Progress

STEPS = 8
#: The step after which a fork of `epochs` begins, in its second epoch.
FORKED_AT = 9
#: Counts meetings of ranks, in each of them.
TIMES = itertools.count()


def batches(rank, rows=6, columns=20):
    generator = torch.Generator().manual_seed(100 + rank)
    shapes = (rows, columns), (rows, 1)
    return [tuple(torch.randn(s, generator=generator) for s in shapes) for _ in range(STEPS)]


def mlp(dropout=0.0, columns=20):
    return nn.Sequential(nn.Linear(columns, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 1))


def trained(begin, rank, model, make=None, data=None, after=lambda number: None, **options):
    """Train a model by DistributedDataParallel; `begin` returns the recording of parts.

    after: is called after each step, with the number of steps so far.
    """
    ddp = DistributedDataParallel(model, **options)
    optimizer = (make or (lambda p: torch.optim.SGD(p, lr=0.01)))(ddp.parameters())
    with begin(model=ddp, optimizer=optimizer) as recording:
        for number, (x, y) in enumerate(recording.steps(data or batches(rank)), start=1):
            loss = nn.functional.mse_loss(ddp(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            recording.log(loss=loss)
            after(number)
    return model


def trained_alone(begin, model, data, exchange, after=lambda number: None, logged=lambda loss: loss):
    """Train a model that shares nothing by itself: `exchange` may share gradients, `after` weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with begin(model=model, optimizer=optimizer) as recording:
        for number, (x, y) in enumerate(recording.steps(data), start=1):
            loss = nn.functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            exchange(number)
            optimizer.step()
            recording.log(loss=logged(loss))
            after(number)
    return model


def plain(begin, rank):
    return trained(begin, rank, mlp())


def dropout(begin, rank):
    torch.manual_seed(5 + rank)  # each rank draws its own
    return trained(begin, rank, mlp(0.3), lambda p: torch.optim.AdamW(p, lr=0.01))


def batch_norm(begin, rank):
    """A validation between two steps, in which all ranks take the averages of rank 0."""
    model = nn.Sequential(nn.Linear(20, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
    with begin(model=ddp, optimizer=optimizer) as recording:
        for part in (batches(rank)[:-1], batches(rank)[-1:]):
            if len(part) == 1:
                ddp.eval()
                with torch.no_grad():
                    ddp(part[0][0])
                ddp.train()
            for x, y in recording.steps(part):
                recording.log(loss=descend(optimizer, nn.functional.mse_loss(ddp(x), y)))
    return model


def buckets(begin, rank):
    layers = [m for _ in range(4) for m in (nn.Linear(32, 32), nn.ReLU())]
    data = batches(rank, columns=32)
    return trained(begin, rank, nn.Sequential(*layers, nn.Linear(32, 1)), data=data, bucket_cap_mb=0.01)


def views_of_buckets(begin, rank):
    return trained(begin, rank, mlp(), gradient_as_bucket_view=True)


class Branches(nn.Module):
    """Uses another layer in every other step."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.last = nn.Linear(20, 8), nn.Linear(20, 8), nn.Linear(8, 1)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.last((self.one if self.calls % 2 else self.two)(x).relu())


def unused_parameters(begin, rank, kill=None):
    def die(number):
        if kill == (rank, number):
            os.kill(os.getpid(), signal.SIGKILL)

    return trained(begin, rank, Branches(), after=die, find_unused_parameters=True)


def product(begin, rank):
    class Product(nn.Linear):
        def forward(self, x):
            return (super().forward(x) * 0.1 + 1).prod(1, keepdim=True)

    return trained(begin, rank, Product(20, 3))


def accumulated(begin, rank):
    model = mlp()
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(ddp.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    with begin(model=ddp, optimizer=optimizer, scheduler=schedule) as recording:
        for number, (x, y) in enumerate(recording.steps(batches(rank))):
            is_last = number % 3 == 2
            with contextlib.nullcontext() if is_last else ddp.no_sync():
                loss = nn.functional.mse_loss(ddp(x), y)
                (loss / 3).backward()
            if is_last:
                nn.utils.clip_grad_norm_(ddp.parameters(), 0.1)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            recording.log(loss=loss)
    return model


def by_hand(begin, rank):
    """Averages gradients itself, asynchronously, and logs the mean loss of all ranks."""
    model, world = mlp(), dist.get_world_size()

    def exchange(number):
        waiting = [dist.all_reduce(p.grad, async_op=True) for p in model.parameters()]
        for each in waiting:
            each.wait()
        for parameter in model.parameters():
            parameter.grad /= world

    def mean(loss):
        total = loss.detach().clone()
        dist.all_reduce(total, op=dist.ReduceOp.SUM)
        return total / world

    return trained_alone(begin, model, batches(rank), exchange, logged=mean)


def read(begin, rank):
    """Python reads the loss of the last rank in each step."""
    model = mlp()

    def add(number):
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)

    return trained_alone(
        begin, model, batches(rank), add, logged=lambda loss: (rank and loss.item(), loss)[1]
    )


def local_steps(begin, rank):
    """Averages the weights in every fourth step alone."""
    torch.manual_seed(rank)
    model = mlp()

    def average(number):
        for parameter in model.parameters() if number % 4 == 0 else ():
            dist.all_reduce(parameter.data)
            parameter.data /= dist.get_world_size()

    return trained_alone(begin, model, batches(rank), lambda number: None, average)


def federated(begin, rank):
    """Averages weights between two steps, and what a buffer counts while the recording is paused."""
    torch.manual_seed(rank)
    model = mlp()
    model.register_buffer("count", torch.zeros(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    (one, two, three, _), works = model.parameters(), []
    with begin(model=model, optimizer=optimizer) as recording:
        for x, y in batches(rank):
            with recording.step((x, y)):
                while works:
                    works.pop().wait()
                loss = nn.functional.mse_loss(model(x), y) + model.count.mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                with recording.paused():
                    model.count.add_(rank)
                    dist.all_reduce(model.count)
                recording.log(loss=loss)
            dist.broadcast(one, 0)
            dist.broadcast(two.detach(), 1)
            dist.broadcast(optimizer.state[three]["momentum_buffer"], 0)
            with after(1, rank):  # which is about to begin its next step
                works.append(dist.broadcast(three, 0, async_op=True))
        while works:
            works.pop().wait()
    return model


@contextlib.contextmanager
def after(first, rank):
    """Let one of two ranks be through here before the other one begins."""
    key, store = f"after {next(TIMES)}", dist.distributed_c10d._get_default_store()
    if rank != first:
        store.wait([key])
    yield
    if rank == first:
        store.set(key, "")


def functional(begin, rank):
    """Functional collectives, in steps, in pauses and between steps, which no group in Python shows."""
    torch.manual_seed(rank)
    model, name, functions = mlp(), dist.group.WORLD.group_name, torch.ops._c10d_functional
    model.register_buffer("count", torch.zeros(2))
    outside = torch.zeros(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    one, two, three, _ = model.parameters()
    with begin(model=model, optimizer=optimizer) as recording:
        for x, y in batches(rank):
            with recording.step((x, y)):
                loss = nn.functional.mse_loss(model(x), y) + model.count.mean() + outside[1].mean()
                optimizer.zero_grad()
                loss.backward()
                grown = functional_collectives.all_reduce(one.grad, "sum", dist.group.WORLD)
                one.grad.copy_(grown)
                optimizer.step()
                row = outside[1]
                with recording.paused():
                    model.count.add_(rank)
                    row.add_(1)
                    works = [functions.all_reduce_(each, "sum", name) for each in (model.count, row)]
                    for each in works:
                        functions.wait_tensor(each)
                loss = loss + row.sum() + model.count.sum()
                recording.log(loss=loss)
            functions.wait_tensor(functions.all_reduce_(two.detach(), "avg", name))
            [each] = functions.all_reduce_coalesced_([three.detach()], "avg", name)
            functions.wait_tensor(each)
    return model


def received(begin, rank, into_part=False):
    """Each step receives for the next one; a pause swaps a buffer, and code between steps the weights.

    into_part: the next step's message comes into a part, which the end of the step would have to hold.
    """
    torch.manual_seed(rank)
    model, other = mlp(), 1 - rank
    model.register_buffer("taken", torch.zeros(20))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    coming, weight = torch.zeros(2, 20), model[0].weight.detach()
    places = [model.taken] * 2 if into_part else [coming[0], coming[1]]
    with begin(model=model, optimizer=optimizer) as recording:
        waiting = dist.irecv(places[0], other, tag=1)
        for number, (x, y) in enumerate(batches(rank)):
            with recording.step((x, y)):
                with recording.paused():
                    sent = dist.isend(x[0].clone(), other, tag=1)
                waiting.wait()
                loss = nn.functional.mse_loss(model(x + coming[number % 2]), y) + model.taken.mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                with recording.paused():
                    sent.wait()
                    if number + 1 < STEPS:
                        waiting = dist.irecv(places[(number + 1) % 2], other, tag=1)
                    came, gone = dist.irecv(model.taken, other), dist.isend(weight[0].clone(), other)
                    came.wait()
                    gone.wait()
                recording.log(loss=loss + model.taken.sum())
            own = weight[1].clone()
            came, gone = dist.irecv(weight[1], other), dist.isend(own, other)
            came.wait()
            gone.wait()
    return model


def many_collectives(begin, rank):
    world = dist.get_world_size()
    model = nn.Linear(20, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with begin(model=model, optimizer=optimizer) as recording:
        for number, (x, _) in enumerate(recording.steps(batches(rank))):
            own = model(x)
            parts = [torch.empty_like(own) for _ in range(world)]
            dist.all_gather(parts, own.detach())
            parts[rank] = own
            every = torch.cat(parts)
            loss = (every @ every.T).logsumexp(1).mean()
            optimizer.zero_grad()
            loss.backward()
            flat = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
            share = torch.empty(len(flat) // world)
            dist.reduce_scatter_tensor(share, flat)
            dist.all_gather_into_tensor(flat, share)
            swapped = torch.empty_like(flat)
            dist.all_to_all_single(swapped, flat)
            dist.all_to_all_single(flat, swapped)
            dist.barrier()
            dist.reduce(loss.detach().clone(), 0)
            sent_number = [number] if rank == 0 else [None]
            dist.broadcast_object_list(sent_number)
            nn.utils.vector_to_parameters(
                nn.utils.parameters_to_vector(model.parameters()) - flat * 0.001 * (sent_number[0] + 1),
                model.parameters(),
            )
            recording.log(loss=loss)
    return model


def lists(begin, rank):
    """Collectives that no program has, and others with parts of different sizes."""
    world = dist.get_world_size()
    model = nn.Linear(20, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with begin(model=model, optimizer=optimizer) as recording:
        for x, _ in recording.steps(batches(rank)):
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            gradient = model.weight.grad
            parts = [torch.empty_like(gradient) for _ in range(world)] if rank == 0 else None
            dist.gather(gradient, parts)
            dist.scatter(gradient, None if parts is None else [sum(parts)] * world)
            own = torch.empty_like(model.bias.grad)
            dist.reduce_scatter(own, [model.bias.grad.clone() for _ in range(world)])
            sent = [rank + 1 + place for place in range(world)]
            taken = [other + 1 + rank for other in range(world)]
            rows = torch.arange(float(sum(sent))) + rank
            swapped = torch.empty(sum(taken))
            dist.all_to_all_single(swapped, rows, taken, sent)
            gradient += swapped.mean() * 1e-3
            model.bias.grad.copy_(own)
            optimizer.step()
            recording.log(loss=loss)
    return model


def stale(begin, rank, kill=None):
    """Each step exchanges its gradients while the next one is drawn, which then uses them.

    kill: ends a rank in a step; the other has begun to exchange, and waits at the end of the step.
    """
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for number, parameter in enumerate(model.parameters()):
        model.register_buffer(f"sent{number}", torch.zeros_like(parameter))
    sent, works = [*model.buffers()], []
    with begin(model=model, optimizer=optimizer) as recording:
        for x, y in recording.steps(batches(rank)):
            while works:
                works.pop().wait()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            if kill == (rank, recording.step_count):
                os.kill(os.getpid(), signal.SIGKILL)
            for parameter, buffer in zip(model.parameters(), sent, strict=True):
                now, parameter.grad = parameter.grad, buffer.clone()
                buffer.copy_(now)
            optimizer.step()
            optimizer.zero_grad()
            with after(0, rank):  # which is at the end of its step by now
                works += [dist.all_reduce(buffer, async_op=True) for buffer in sent]
            recording.log(loss=loss)
        while works:
            works.pop().wait()
    return model


def sparse(begin, rank):
    class Words(nn.Sequential):
        def forward(self, x):
            return super().forward((x * 4).long().clamp(0, 8))

    return trained(begin, rank, Words(nn.EmbeddingBag(9, 4, sparse=True), nn.Linear(4, 1)))


def uneven(begin, rank):
    """Rank 1 has more batches than rank 0, and communicates in the first steps alone."""
    model = mlp()

    def add(number):
        for parameter in model.parameters() if number <= 3 else ():
            dist.all_reduce(parameter.grad)

    return trained_alone(begin, model, batches(rank)[: 8 if rank else 5], add)


def epochs(begin, rank, kill=None, slower_after=None):
    """A sampler of torch's, dropout, and a validation on all ranks.

    kill: ends a rank at a step; slower_after: the step after which the rate is lower. The environment
    has the step after which the loop is left, and the size of a bucket of gradients, in MB, if it has.
    """
    leaves, size = int(os.environ.get("LEAVE", 0)), os.environ.get("BUCKET")
    generator = torch.Generator().manual_seed(1)
    rows = TensorDataset(*(torch.randn(48, n, generator=generator) for n in (20, 1)))
    sampler = DistributedSampler(rows, seed=3)
    loader = DataLoader(rows, batch_size=4, sampler=sampler)
    model = mlp(0.2)
    ddp = DistributedDataParallel(model, bucket_cap_mb=None if size is None else float(size))
    optimizer = torch.optim.Adam(ddp.parameters(), lr=0.01)
    with begin(model=ddp, optimizer=optimizer) as recording:
        for epoch in recording.epochs(3):
            sampler.set_epoch(epoch)
            for x, y in recording.steps(loader):
                if recording.step_count == slower_after:
                    optimizer.param_groups[0]["lr"] = 0.001
                loss = nn.functional.mse_loss(ddp(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                recording.log(loss=loss)
                if kill == (rank, recording.step_count):
                    os.kill(os.getpid(), signal.SIGKILL)
                if recording.step_count + 1 == leaves:
                    return model
            ddp.eval()
            with torch.no_grad():
                validation = sum(nn.functional.mse_loss(ddp(x), y) for x, y in loader)
            dist.all_reduce(validation)
            ddp.train()
            recording.log(validation=validation)
    return model


def forked(begin, rank, kill=None):
    """A fork of `epochs` in the middle of an epoch, with another rate.

    If a rank is killed, rank 0 has written all its steps, and others only some.
    """
    if kill is not None:
        writer.FLUSH_SECONDS = math.inf if rank else 0.0
    if begin is not unrecorded:
        begin = partial(begin, fork=os.environ.get("PARENT", "runs/epochs"), at=FORKED_AT)
    return epochs(begin, rank, kill, slower_after=FORKED_AT)


def planted(begin, rank, *, row=False, weight=False, nan=False):
    """row: of step 5 on the last rank, differs, or has a NaN; weight: rank 0 changes one at step 3."""
    data = batches(rank)
    if (row or nan) and rank:
        data[4][0][2, 3] += torch.nan if nan else 1
    model = mlp()

    def change(number):
        if weight and number == 3 and not rank:
            with torch.no_grad():
                model[0].weight[1, 2] += 1e-6

    return trained(begin, rank, model, data=data, after=change)


class LayerOfBatch(Branches):
    """Uses another layer for some batches, and has one that it never uses."""

    def __init__(self):
        super().__init__()
        self.never = nn.Linear(2, 2, dtype=torch.float64)

    def forward(self, x):
        self.calls = int(x.sum() > 0)
        return super().forward(x)


def trained_model(begin, rank):
    """A model by `everystep.train`, and by hand; a layer is used on one rank alone, in some steps."""
    world = dist.get_world_size()
    x, y = (torch.cat(parts) for parts in zip(*batches(0), strict=True))
    share = slice(rank * len(x) // world, (rank + 1) * len(x) // world)
    model = LayerOfBatch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=0.1)
    given = {"loss": nn.functional.mse_loss, "optimizer": optimizer, "max_grad_norm": 0.5}
    if begin is not unrecorded:
        everystep.train(model, (x, y), **given, steps=STEPS, run="runs/trained_model", progress=False)
        return model
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    for _ in range(STEPS):
        loss = nn.functional.mse_loss(ddp(x[share]), y[share])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return model


def trained_step(begin, rank):
    """A step function, by `everystep.train` and by hand."""
    model = DistributedDataParallel(mlp())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def step(batch):
        loss = nn.functional.mse_loss(model(batch[0]), batch[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    if begin is unrecorded:
        [*map(step, batches(rank))]
    else:
        given = {"parts": {"model": model, "optimizer": optimizer}, "epochs": 1, "progress": False}
        everystep.train(step, batches(rank), run="runs/trained_step", **given)
    return model


def shuffled(run, reduction, **given):
    """Train on shuffled batches, the last of which has a row more for one rank than for the other."""
    x, y = (torch.cat(parts) for parts in zip(*batches(0), strict=True))
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01 if reduction == "mean" else 0.001)
    given = {"batch_size": 10, "epochs": 4, "evaluate_every": 5, "progress": False} | given
    given |= {"loss": nn.MSELoss(reduction=reduction), "validation": (x[:9], y[:9])}
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.1)
    given |= {"optimizer": optimizer, "scheduler": scheduler}
    return everystep.train(model, (x[:43], y[:43]), run=run, **given)


class Killed(Progress):
    """Ends a rank once a step is written."""

    def __init__(self, rank, kill):
        self.kill = kill is not None and kill[0] == rank and kill[1]

    def advance(self, first_step, losses):
        if self.kill and first_step + len(losses) > self.kill:
            os.kill(os.getpid(), signal.SIGKILL)


def shuffled_mean(begin, rank, kill=None, reduction="mean"):
    if begin is not unrecorded:
        given = {"resume": "RESUME" in os.environ, "progress": Killed(rank, kill)}
        if "LEAVE" in os.environ:
            given |= {"epochs": None, "steps": int(os.environ["LEAVE"])}
        shuffled(f"runs/shuffled_{reduction}", reduction, **given)


shuffled_sum = partial(shuffled_mean, reduction="sum")


def command(begin, rank):
    """By the command line; the processes communicate already."""
    if begin is not unrecorded:
        given = ["digits", "--steps", "3", "--run", "runs/command", "--quiet"]
        app(["train", *given], standalone_mode=False)
        app(["train", *given[:2], "5", *given[3:], "--resume"], standalone_mode=False)
        app(["resume", "runs/command", "--steps", "7", "-q"], standalone_mode=False)


def command_again(begin, rank):
    """Another number of processes has continued it."""
    app(["resume", "runs/command", "--steps", "11", "-q"], standalone_mode=False)


received_part = partial(received, into_part=True)
other_row = partial(planted, row=True)
nan = partial(planted, nan=True)
other_weight = partial(planted, weight=True)


# Refused.


def other_parts(begin, rank):
    return begin(**({"model": mlp()} if rank else {"network": mlp()})).__enter__()


class OwnZeroGrad(torch.optim.SGD):
    def zero_grad(self):
        """Keep them."""


#: Settings that a training of a model by several processes refuses, by the case.
TRAIN_REFUSED = {
    "indivisible": lambda model, rank: {"batch_size": 5},
    "last_batch": lambda model, rank: {"batch_size": 4},
    "own_loss": lambda model, rank: {"loss": lambda prediction, target: prediction.mean()},
    "weighted_loss": lambda model, rank: {"loss": nn.CrossEntropyLoss(torch.ones(1))},
    "own_zero_grad": lambda model, rank: {"optimizer": OwnZeroGrad(model.parameters())},
    "other_seed": lambda model, rank: {"seed": rank},
    "other_model": lambda model, rank: {"stop_on_nan": model[0].bias.data.add_(rank) is None},
    "stopped": lambda model, rank: {"stop_on_nan": True},
}


def train_refused(name, begin, rank):
    model = DistributedDataParallel(mlp()) if name == "wrapped" else mlp()
    x, y = torch.ones(13, 20), torch.ones(13, 1)
    given = {"loss": nn.MSELoss(), "optimizer": torch.optim.SGD(model.parameters(), lr=0.01), "steps": 2}
    everystep.train(model, (x, y), **given | TRAIN_REFUSED.get(name, lambda *_: {})(model, rank))


def hook(begin, rank):
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    ddp = DistributedDataParallel(mlp())
    ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
    with begin(model=ddp) as recording:
        for x, _ in recording.steps(batches(rank)):
            ddp(x)


def sharded(begin, rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = mlp()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    begin(model=model).__enter__()


def sent(begin, rank):
    with begin(model=mlp()) as recording:
        for x, _ in recording.steps(batches(rank)):
            dist.recv(x, 0) if rank else dist.send(x, 1)


def programs(begin, rank):
    model = mlp()
    everystep.train(
        lambda x: model(x[0]).sum(),
        batches(rank),
        parts={"model": model},
        engine="program",
        steps=3,
        run="runs/programs",
    )


def joined(begin, rank):
    ddp = DistributedDataParallel(mlp())
    with ddp.join(), begin(model=ddp) as recording:
        for x, _ in recording.steps(batches(rank)):
            ddp(x)


def kept(begin, rank):
    everystep.record(model=mlp(), run="runs/kept", keep=f"last {100 + rank} steps").__enter__()


def condition(begin, rank):
    everystep.record(model=mlp(), run="runs/condition", stop_when="loss < 1").__enter__()


def unshared(begin, rank):
    """The last rank is on a machine that does not see what rank 0 has begun."""
    agreement.NOTICE_SECONDS = 0.004  # two looks, by the clock of the tests
    if rank:
        agreement.Path = lambda *names: Path(*names, "nothing here") if names else Path()
    try:
        begin(model=mlp()).__enter__()
    finally:
        agreement.NOTICE_SECONDS, agreement.Path = 10, Path


def unbegun(begin, rank):
    """A directory without a step, which takes long to remove."""
    directories.shutil = SimpleNamespace(rmtree=lambda place: (time.sleep(0.2), shutil.rmtree(place)))
    try:
        return plain(begin, rank)
    finally:
        directories.shutil = shutil


def full(begin, rank):
    """The last rank has no room for its directory."""
    create = agreement.create_directory
    if rank:
        agreement.create_directory = partial(_raise, everystep.RecordingError("there is no room"))
    try:
        begin(model=mlp()).__enter__()
    finally:
        agreement.create_directory = create


def _raise(error, *_):
    raise error


def taken(begin, rank):
    """The directory of the run exists."""
    begin(model=mlp()).__enter__()


def alone(begin, rank):
    agreement.NOTICE_SECONDS, agreement.MOST_SECONDS = 0.01, 0.05
    if rank == 0:
        begin(model=mlp()).__enter__()


def digest(model):
    found = hashlib.sha256()
    for tensor in model.state_dict().values():
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def main(names):
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = f"file://{os.environ['STORE']}" if "STORE" in os.environ else "env://"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    kill = os.environ.get("KILL")
    if "SNAPSHOTS" in os.environ:  # after each step, once some were timed
        snapshots.REPLAY_SECONDS, snapshots.TIME_SHARE, Recorder.is_behind = 0.0, math.inf, False
    found = {}
    for name in names:
        case, options = globals().get(name) or partial(train_refused, name), {}
        if kill is not None:
            options["kill"] = tuple(map(int, kill.split(",")))

        def recorded(name=name, **parts):
            return everystep.record(run=f"runs/{name}", resume="RESUME" in os.environ, **parts)

        ways = [recorded] if kill or "RECORDED" in os.environ else [unrecorded, recorded]
        try:
            models = []
            for begin in ways:
                torch.manual_seed(0)
                models.append(case(begin, rank, **options))
            found[name] = [digest(model) for model in models if model is not None]
        except everystep.EverystepError as error:
            found[name] = str(error)
    Path(f"digests-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    # The store, of rank 0, must outlive what other ranks ask of it.
    dist.barrier()
    dist.destroy_process_group()


def run_here(names, directory, environment):
    """Run loops in this process, a fork of the tests'; its errors are in a file."""
    os.chdir(directory)
    os.environ.update(environment)
    file = f"stderr-{environment['RANK']}"
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.stderr = sys.__stderr__
    warnings.simplefilter("ignore")
    main(names)


if __name__ == "__main__":
    main(sys.argv[1:])
