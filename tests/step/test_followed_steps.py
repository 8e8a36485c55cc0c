"""Steps that are followed on known paths, in loops that try to make one step pass for another."""

import pytest
import torch
from tests.descent import as_alone, descend, looped
from tests.step.loops_to_mistake import LOOPS, STEPS, trained, update
from torch import nn
from torch.nn import functional

import everystep
from everystep.step import known_paths
from everystep.step.under_way import UnderWay

pytestmark = pytest.mark.filterwarnings("ignore")


#: Loops with a branch of their own, and some others: the rest runs with `--sweep` alone.
OFTEN = {
    *("a_batch_that_is_added_late_and_aliases", "a_mode_of_operators_in_the_step", "modes_at_random"),
    *("an_evaluation_in_inference_mode", "data_and_buffers_of_which_the_step_reads_more"),
    *(
        "answers_about_two_tensors",
        "memory_that_python_reads",
        "floats_of_every_kind",
        "gradients_of_the_batch_that_add_up",
        "nothing_is_a_part",
    ),
    *("steps_that_fail_and_are_taken_again", "tensors_from_elsewhere_that_alias"),
    "memory_in_a_cycle_that_python_has_collected",
    "groups_casts_and_leaves_that_change",
    "operations_and_passes_that_raise_after_they_have_written",
    *("tensors_from_outside_that_have_a_name", "losses_and_gradients_on_memory_of_something_else"),
    "memory_that_is_exchanged_for_other_at_the_same_address",
}


@pytest.fixture
def followed(monkeypatch):
    """The steps of a recording that an earlier one predicted to the end."""
    found, end = [], UnderWay.end

    def ended(step, *arguments):
        path = end(step, *arguments)
        found.extend([step] * step.is_followed)
        return path

    monkeypatch.setattr(UnderWay, "end", ended)
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.sweep] * (name not in OFTEN)) for name in LOOPS]
)
def test_steps_are_what_they_were(name, tmp_path, followed):
    function, least = LOOPS[name]
    run, _ = as_alone(tmp_path / "run", lambda record: function(record).state_dict())
    assert len(followed) >= least
    assert run[11].is_exact


def departs_in_the_forward_pass(model, optimizer, x, y, departs):
    h = model[:2](x)
    return descend(optimizer, functional.mse_loss(model[2:](h.relu() if departs else h), y))


def departs_before_the_backward_pass(model, optimizer, x, y, departs):
    loss = functional.mse_loss(model(x), y)
    return descend(optimizer, loss + model[0].weight.pow(2).sum() if departs else loss)


def departs_after_the_backward_pass(model, optimizer, x, y, departs):
    loss = functional.mse_loss(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    if departs:
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    return loss


def departs_in_the_optimizer(model, optimizer, x, y, departs):
    optimizer.param_groups[0]["weight_decay"] = 0.1 if departs else 0
    return update(model, optimizer, x, y)


@pytest.mark.sweep(every=2)
@pytest.mark.parametrize(
    "body",
    [
        *(departs_in_the_forward_pass, departs_before_the_backward_pass),
        *(departs_after_the_backward_pass, departs_in_the_optimizer),
    ],
)
def test_a_step_that_departs_has_the_operations_that_it_would_have_in_full(
    body, tmp_path, monkeypatch, followed
):
    def recorded(name):
        torch.manual_seed(0)
        trained(
            lambda **parts: everystep.record(run=tmp_path / name, **parts),
            lambda m, o, x, y, n: body(m, o, x, y, n in (7, 11)),
        )
        return everystep.open(tmp_path / name)

    def operations(run, step):
        found = [seen.operation for seen in run[step].operations]
        return [(o.operator, o.phase, o.arguments, o.results) for o in found]

    run = recorded("followed")
    assert len(followed) >= STEPS - 4  # the second departs as the first
    assert run.verify(processes=1, progress=False).is_exact
    monkeypatch.setattr(known_paths, "_MOST_ENTRIES", 0)
    full = recorded("full")
    for step in (6, 7, 10, 11, 12):
        assert operations(run, step) == operations(full, step)


def test_masks_of_a_count_met_before_are_followed(tmp_path):
    x, y = torch.randn(6, 3), torch.randn(6)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    followed = []
    with everystep.record(run=tmp_path / "run", model=model, optimizer=optimizer) as recording:
        for number in range(1, 31):
            mask = torch.arange(6) < 2 + number % 3
            with recording.step({"x": x, "y": y, "mask": mask}):
                recording.log(loss=descend(optimizer, ((model(x[mask])[:, 0] - y[mask]) ** 2).mean()))
            followed.append(recording.writer.watched.last[1].is_followed)
    assert sum(followed[16:]) >= 12
    assert everystep.open(tmp_path / "run").verify(progress=False, processes=1).is_exact


@pytest.mark.parametrize("first", [7, 12, 40])
def test_steps_that_become_alike_are_followed_from_then_on(first, tmp_path, followed):
    def loss_of(model, batch):
        length = 200 - len(lengths) if len(lengths) < first else 10
        lengths.append(length)
        return model(batch[:length] * 1.0).pow(2).mean()  # with one kind of batch

    lengths = []
    run = looped(torch.nn.Linear(1, 1), [torch.randn(200, 1)] * 100, loss_of, run=tmp_path / "run")
    assert len(followed) >= 100 - 2 * max(first, 8) - 2
    assert run.verify(progress=False, processes=1).is_exact


@pytest.mark.sweep
def test_after_many_steps_that_all_differ_one_of_eight_is_remembered(tmp_path, followed):
    batches = [torch.randn(length, 1) for length in range(1, 201)]
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    counts = []
    with everystep.record(run=tmp_path / "run", model=model, optimizer=optimizer) as recording:
        for epoch in range(3):
            # The second epoch has the same batches in another order: it follows those remembered.
            for x in recording.steps(batches[::-1] if epoch == 1 else batches):
                recording.log(loss=descend(optimizer, model(x).pow(2).mean()))
            counts.append(len(followed) - sum(counts))
    assert counts[0] == 0
    assert 64 + 136 // 8 - 2 <= counts[1] <= 64 + 136 // 8
    assert counts[2] == 200  # each eighth was followed, so the others were worth remembering
    assert len([*(tmp_path / "run" / "programs").iterdir()]) == 3
    assert everystep.open(tmp_path / "run").verify(progress=False, processes=1).is_exact
