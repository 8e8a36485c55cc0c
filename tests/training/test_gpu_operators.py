"""Operators of networks on GPUs, which have no kernel on the CPU, or a recent one, are in a program."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import everystep

aten = torch.ops.aten


def _weights(query, key, scale, is_causal):
    scores = query @ key.transpose(-1, -2) * (scale or 1 / math.sqrt(query.shape[-1]))
    return scores + torch.full(scores.shape[-2:], -math.inf).triu(1) if is_causal else scores


def _flash(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    """Return what the kernel of a GPU does: two sizes are numbers, two tensors are undefined."""
    scores = _weights(query, key, scale, is_causal)
    sizes = query.shape[2], key.shape[2]
    others = torch.zeros(2, dtype=torch.int64), torch.empty(0), torch.empty(0)
    return scores.softmax(-1) @ value, scores.logsumexp(-1), None, None, *sizes, *others


def _flash_backward(grad_out, query, key, value, out, logsumexp, *others, scale=None):
    weights = (_weights(query, key, scale, others[5]) - logsumexp.unsqueeze(-1)).exp()
    factor = scale or 1 / math.sqrt(query.shape[-1])
    slope = grad_out @ value.transpose(-1, -2) - (grad_out * out).sum(-1, keepdim=True)
    slope = weights * slope * factor
    return slope @ key, slope.transpose(-1, -2) @ query, weights.transpose(-1, -2) @ grad_out


class Flash(nn.Module):
    """Attention as on a GPU; x (N, 6, 8) to (N, 6, 5)."""

    operator = "_scaled_dot_product_flash_attention"

    def __init__(self):
        super().__init__()
        self.given, self.out = nn.Linear(8, 24), nn.Linear(8, 5)

    def forward(self, x):
        heads = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.given(x).chunk(3, -1))
        found = aten._scaled_dot_product_flash_attention(*heads, 0.0, True)[0]
        return self.out(found.transpose(1, 2).flatten(2))


class Experts(nn.Module):
    """A mixture of experts by a product of groups, as Transformers has it; x (N, 6, 8) to (N, 6, 5)."""

    operator = "_grouped_mm"

    def __init__(self):
        super().__init__()
        self.router, self.out = nn.Linear(8, 3), nn.Linear(8, 5)
        self.experts = nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x):
        words = x.flatten(0, 1)
        weights, chosen = self.router(words).softmax(-1).max(-1)
        order = chosen.argsort()
        counts = torch.histc(chosen.float(), 3, 0, 2)
        ends = counts.cumsum(0, dtype=torch.int32)
        found = torch._grouped_mm(words[order], self.experts, offs=ends)
        placed = torch.zeros_like(found).index_copy(0, order, found * weights[order, None])
        return self.out(placed).unflatten(0, x.shape[:2])


def _losses(model, optimizer, steps):
    for x, y in steps:
        loss = functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss


@pytest.mark.parametrize("network", [Flash, Experts])
def test_the_operator_is_a_part_of_the_program(network, tmp_path):
    torch.manual_seed(0)
    data = [(torch.randn(4, 6, 8), torch.randint(0, 5, (4, 6))) for _ in range(5)]
    parts = []
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl(Flash.operator, _flash, "CPU")
        library.impl(f"{Flash.operator}_backward", _flash_backward, "CPU")
        for _ in range(2):
            torch.manual_seed(1)
            model = network()
            parts.append((model, torch.optim.AdamW(model.parameters(), lr=1e-2)))
        expected = [loss.item() for loss in _losses(*parts[0], data)]
        model, optimizer = parts[1]
        with everystep.record(run=tmp_path / "run", model=model, optimizer=optimizer) as recording:
            for loss in _losses(model, optimizer, recording.steps(data)):
                recording.log(loss=loss)
        run = recording.run
        assert run.losses["loss"].to_list() == expected
        assert not run.facts.training.loop.unseen
        assert run.verify(processes=1, progress=False).is_exact
        step = run[3]
        numbers = []
        for number, seen in enumerate(step.operations):
            if network.operator in seen.operation.name:
                made = [each for each in seen.results.values() if each.dim() > 1]
                numbers += [f"#{number}.{i}{[1] * each.dim()}" for i, each in enumerate(made, start=1)]
        assert len(numbers) > 1  # backward, too
        for number in numbers:
            found = step.why(number)
            assert np.isclose(found.number.value, found.recomputed, rtol=1e-4)
        if network is Flash:
            assert step.rows.known == list(step.gradients)
