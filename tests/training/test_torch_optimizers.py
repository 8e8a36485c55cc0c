"""The step of one of torch's own optimizers is one operation, and opens to all that it ran."""

import contextlib
import functools
import json
import sys

import pytest
import torch
from tests.descent import as_alone, descend, unrecorded
from torch import nn, optim

import everystep
from everystep.errors import ProgramError
from everystep.program.step_program import Program

sgd_module = sys.modules["torch.optim.sgd"]

OPTIMIZERS = {
    "sgd": lambda p: optim.SGD(p, 0.1, weight_decay=0.0),
    "sgd_momentum": lambda p: optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam_amsgrad": lambda p: optim.Adam(p, 0.01, amsgrad=True, maximize=True),
    "adam_tensor_rate": lambda p: optim.Adam(p, torch.tensor(0.01)),
    "adam_foreach": lambda p: optim.Adam(p, 0.01, foreach=True, weight_decay=0.1),
    "adamw_fused": lambda p: optim.AdamW(p, 0.01, fused=True),
    "nadam": lambda p: optim.NAdam(p, decoupled_weight_decay=True, weight_decay=0.1),
    "radam": lambda p: optim.RAdam(p, 0.1),
    "adamax": optim.Adamax,
    "adagrad": lambda p: optim.Adagrad(p, initial_accumulator_value=0.1),
    "rmsprop": lambda p: optim.RMSprop(p, momentum=0.9, centered=True),
    "asgd": lambda p: optim.ASGD(p, 0.1, t0=3, weight_decay=0.1),
    "adafactor": optim.Adafactor,
}


def trained(make, record, change=lambda optimizer, step: None):
    """Train 12 steps; return the parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
    model.register_parameter("scalar", nn.Parameter(torch.tensor(1.0)))
    first, second = [{"params": each.parameters()} for each in (model[0], model[2])]
    optimizer = make([first, second | {"params": [*second["params"], model.scalar]}])
    x, y = torch.randn(9, 6), torch.randn(9, 1)
    with record(model=model, optimizer=optimizer) as recording:
        for step in recording.steps(range(1, 13)):
            loss = descend(optimizer, nn.functional.mse_loss(model(x) * model.scalar, y))
            change(optimizer, step)
            recording.log(loss=loss)
    return [parameter.detach().clone() for parameter in model.parameters()]


def set_settings(optimizer, step):
    rate = optimizer.param_groups[1]["lr"]
    if isinstance(rate, torch.Tensor):
        rate.fill_(0.02 / step)
    else:
        optimizer.param_groups[1]["lr"] = 0.02 / step
    if step == 6 and type(optimizer.param_groups[0].get("weight_decay")) is float:
        optimizer.param_groups[0]["weight_decay"] = 0.3
    if step == 8 and "betas" in optimizer.defaults:
        optimizer.param_groups[0]["betas"] = 0.5, 0.6


def assert_as_unrecorded(make, place, change=lambda optimizer, step: None):
    """Assert that a recorded loop has the bits of the loop alone, and replays; return its run."""
    return as_alone(place, lambda record: trained(make, record, change))[0]


@pytest.mark.sweep(every=4)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_has_the_bits_of_the_loop_and_comes_back(name, tmp_path):
    run = assert_as_unrecorded(OPTIMIZERS[name], tmp_path / "run", set_settings)
    # The first step makes what the optimizer keeps; settings are numbers of the steps after it.
    assert len([*(tmp_path / "run" / "programs").iterdir()]) <= 2
    for number in (1, 7, 12):
        step = run[number]
        assert step.is_exact
        updates = [each.operation for each in step.operations if each.operation.phase == "update"]
        assert updates and all(each.operator.startswith("aten.") for each in updates)
    if name == "sgd":
        before, after, step = run.parameters(6), run.parameters(7), run[7]
        decayed = step.gradients["0.bias"].add(before["0.bias"], alpha=0.3)
        assert torch.equal(after["0.bias"], before["0.bias"].add(decayed, alpha=-0.1))
        rate = -0.02 / 6
        assert torch.equal(after["2.bias"], before["2.bias"].add(step.gradients["2.bias"], alpha=rate))


@pytest.mark.parametrize("closure", [None, lambda: 1.0])
def test_a_step_with_a_closure_or_none_of_a_wrapper_is_one_operation(closure, tmp_path):
    def make(groups):
        optimizer = optim.Adam(groups, 0.01)
        optimizer.step = functools.partial(optimizer.step, closure)
        return optimizer

    assert_as_unrecorded(make, tmp_path / "run")
    programs = [path.read_text() for path in (tmp_path / "run" / "programs").iterdir()]
    assert programs and all('"optim.Adam.step"' in each for each in programs)


def test_parameters_with_data_that_the_step_has_computed(tmp_path):
    # The data is the result of an operation that the optimizer calls, too.
    x, model = torch.randn(8, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer, states = everystep.GradientDescent(model.parameters(), lr=0.1), []
    with everystep.record(run=tmp_path / "run", model=model, optimizer=optimizer) as recording:
        for _ in recording.steps(range(3)):
            loss = model(x).square().mean() * 2
            loss.backward()
            model[0].weight.data = model[0].weight.data * 0.5 * 1.5
            optimizer.step()
            optimizer.zero_grad()
            recording.log(loss=loss)
            states.append({name: each.clone() for name, each in model.state_dict().items()})
    run = everystep.open(tmp_path / "run")
    assert run[2].is_exact and run[3].is_exact
    assert torch.equal(run[2].updates["1.weight"].after, states[1]["1.weight"])


@pytest.mark.sweep(every=4)
@pytest.mark.parametrize(("name", "setting"), [("adagrad", 0.2), *((name, None) for name in OPTIMIZERS)])
def test_an_optimizer_that_forgets_what_it_keeps_comes_back(name, setting, tmp_path):
    def change(optimizer, step):
        if step == 5:
            optimizer.state.clear()
        if setting is not None:
            optimizer.param_groups[0]["initial_accumulator_value"] = setting  # which torch does not read

    try:
        trained(OPTIMIZERS[name], unrecorded, change)
    except KeyError:
        pytest.skip("this torch's optimizer makes its state once, as it is created")
    assert_as_unrecorded(OPTIMIZERS[name], tmp_path / "run", change)


def test_a_step_that_raises_is_watched_again_from_the_next_one_on(tmp_path):
    def change(optimizer, step):
        if step % 4 == 0:
            rate = optimizer.param_groups[1]["lr"]
            optimizer.param_groups[1]["lr"] = None
            with contextlib.suppress(TypeError):
                optimizer.step()  # the first group is updated by then
            optimizer.param_groups[1]["lr"] = rate
            with contextlib.suppress(ZeroDivisionError):
                optimizer.step(lambda: 1 / 0)

    assert_as_unrecorded(OPTIMIZERS["sgd"], tmp_path / "run", change)


def test_a_rate_that_the_step_itself_computes(tmp_path):
    torch.manual_seed(0)
    model, rate = nn.Linear(6, 1), torch.tensor(0.1)
    optimizer = optim.Adam(model.parameters(), rate)
    x, y = torch.randn(9, 6), torch.randn(9, 1)
    with everystep.record(run=tmp_path / "run", model=model, optimizer=optimizer) as recording:
        for _ in recording.steps(range(4)):
            loss = nn.functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            rate.copy_(loss.detach() * 0.1)
            optimizer.step()
            recording.log(loss=loss)
    run = everystep.open(tmp_path / "run")
    assert run.verify(processes=1, progress=False).is_exact
    # What Adam computes depends on the rate, which is known in the step only.
    step = run[3]
    assert all(each.operation.operator.startswith("aten.") for each in step.operations)
    after = {name: t for each in step.operations for name, t in each.made.items()}
    assert torch.equal(after["parameter/weight"], run.parameters(3)["weight"])


def test_what_somebody_else_runs_in_a_step_is_watched(tmp_path):
    def make(groups):
        optimizer = optim.SGD(groups, 0.1)

        def halve(optimizer, *given):
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad.mul_(0.5)

        optimizer.register_step_pre_hook(halve)
        return optimizer

    assert_as_unrecorded(make, tmp_path / "run")


def patched_step(patch):
    step = optim.SGD.step

    @functools.wraps(step)
    def halved(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.grad.mul_(0.5)
        return step(self, closure)

    patch.setattr(optim.SGD, "step", halved)


def patched_function(patch):
    update = sgd_module.sgd

    def halved(parameters, gradients, *args, **keywords):
        update(parameters, [gradient * 0.5 for gradient in gradients], *args, **keywords)

    patch.setattr(sgd_module, "sgd", halved)


def patched_method(patch):
    collect = optim.SGD._init_group

    def halved(self, group, parameters, gradients, buffers):
        found = collect(self, group, parameters, gradients, buffers)
        gradients[:] = [gradient * 0.5 for gradient in gradients]
        return found

    patch.setattr(optim.SGD, "_init_group", halved)


@pytest.mark.sweep(every=2)
@pytest.mark.parametrize("is_from_the_start", [True, False])
@pytest.mark.parametrize("replace", [patched_step, patched_function, patched_method])
def test_what_somebody_has_put_in_the_place_of_torchs_code_is_watched(
    replace, is_from_the_start, tmp_path, monkeypatch
):
    def change(optimizer, step):
        if step == 5 and not is_from_the_start:
            replace(monkeypatch)

    def run(record):
        with monkeypatch.context() as patch:
            if is_from_the_start:
                replace(patch)
            found = trained(OPTIMIZERS["sgd"], record, change)
        monkeypatch.undo()
        return found

    _, found = as_alone(tmp_path / "run", run)  # which replays without what was replaced
    assert not all(map(torch.equal, found, trained(OPTIMIZERS["sgd"], unrecorded)))


CHANGES = {
    "a gradient of another shape": lambda each: each["arguments"][1][0].__setitem__(0, "loss"),
    "an unknown tensor": lambda each: each["arguments"][0][0].__setitem__(0, "nothing"),
    "a number for a tensor": lambda each: each["arguments"][0][0].__setitem__(0, 3),
    "too few gradients": lambda each: each["arguments"][1][0].pop(),
    "too few groups": lambda each: each["arguments"][1].pop(),
    "kept without a key": lambda each: each["arguments"][2][0][0].pop(0),
    "kept of another shape": lambda each: each["arguments"][2][0][0].__setitem__(3, "loss"),
    "an unknown setting": lambda each: each["keywords"].__setitem__("closure", [None, None]),
    "a setting too few": lambda each: each["keywords"].pop("lr"),
    "a setting for one group": lambda each: each["keywords"]["lr"].pop(),
    "no lists": lambda each: each["arguments"].__setitem__(0, "loss"),
    "a result that nothing makes": lambda each: each.__setitem__("results", ["loss"]),
    "a place that there is not": lambda each: each["arguments"][3].append([7, 0, {"text": "step"}]),
    "an argument too few": lambda each: each["arguments"].pop(),
    "another class": lambda each: each.__setitem__("operator", "optim.LBFGS.step"),
}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    place = tmp_path_factory.mktemp("program") / "run"
    trained(OPTIMIZERS["adamw_fused"], lambda **parts: everystep.record(run=place, **parts))
    return (place / "programs" / "2.json").read_text()


@pytest.mark.parametrize("name", CHANGES)
def test_a_program_that_somebody_has_changed_is_refused(name, program):
    Program.from_json(program)
    data = json.loads(program)
    (step,) = [each for each in data["operations"] if each["operator"].startswith("optim.")]
    CHANGES[name](step)
    with pytest.raises(ProgramError, match="not a valid program"):
        Program.from_json(json.dumps(data))
