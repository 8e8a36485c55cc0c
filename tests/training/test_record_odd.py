"""What a run cannot hold or replay of a recorded loop is refused, or reported in its place."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.descent import as_alone, bits, descend, looped, recorded_as_it_is
from tests.snapshots import take_snapshots_every
from tests.step.loops_to_mistake import batches, network, update
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import everystep


def mean_square(model, batch):
    return functional.mse_loss(model(batch[0]), batch[1])


#: What torch itself warns of in such loops.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("batch", "kind"),
    [
        (lambda: torch.quantize_per_tensor(torch.randn(4, 6), 0.1, 0, torch.qint8), "qint8"),
        (lambda: torch.zeros(4, dtype=torch.uint16), "uint16"),
        (lambda: torch.zeros(4).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), "float32"),
        (lambda: torch.zeros(4, device="meta"), "float32"),
        (lambda: torch.eye(4).to_sparse(), "float32"),
    ],
)
def test_what_a_run_cannot_hold_of_a_batch_is_said_in_its_place(batch, kind):
    given = [{"odd": batch(), "pair": batches()[0]}] * 3
    run = looped(network(), given, lambda model, each: mean_square(model, each["pair"]))
    assert run.verify(processes=1, progress=False).is_exact
    assert run[2].batch.nested["odd"] == f"<Tensor of torch.{kind}>"


def test_arrays_of_any_kind_may_be_in_a_batch():
    long, masked = np.ones(2, np.longdouble), np.ma.array([1.0, 2.0], mask=[False, True])
    arrays = {"big": np.array([1.5, 2.0], ">f4"), "one": np.array(3), "long": long, "masked": masked}
    given = [arrays | {"pair": batches()[0]}] * 3
    batch = looped(network(), given, lambda model, each: mean_square(model, each["pair"]))[2].batch
    assert batch.tensors["big"].tolist() == [1.5, 2.0]
    assert batch.tensors["one"].shape == ()
    assert batch.nested["long"] == f"<ndarray of {long.dtype}>"
    assert batch.nested["masked"] == "<MaskedArray of float64>"


@pytest.mark.parametrize(
    "attribute",
    [
        lambda: torch.eye(4).to_sparse(),
        lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        lambda: torch.zeros(4, device="meta"),
        lambda: torch.randn(4, dtype=torch.complex64).conj(),
    ],
    ids=["sparse", "nested", "meta", "conjugated"],
)
def test_a_model_may_have_an_attribute_that_no_run_holds(attribute):
    model = network()
    model.attribute, model.listed = attribute(), [attribute()]
    assert looped(model, batches(), mean_square).verify(processes=1, progress=False).is_exact


def within_itself():
    """Return a list that has no end."""
    found = []
    found.append(found)
    return found


@pytest.mark.parametrize(
    "value",
    [
        lambda: torch.ones(2, dtype=torch.complex128),
        lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        lambda: np.longdouble(1) / 3,
        within_itself,
    ],
    ids=["complex128", "quantized", "long double", "within itself"],
)
@pytest.mark.parametrize("is_early", [False, True])
def test_a_model_of_yours_may_get_an_attribute_that_no_run_holds(value, is_early, tmp_path):
    class Holding(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.held = network(), value() if is_early else None

        def forward(self, x):
            self.held = self.inner[0].held = value()
            return self.inner(x)

    run = looped(Holding(), batches(), mean_square, run=tmp_path / "run")
    assert run.status == "finished" and run.verify(processes=1, progress=False).is_exact


class Spectral(nn.Module):
    """A Fourier layer and a rotation of pairs, which read conjugates of a weight and of a result."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 2, 4, dtype=torch.complex64))
        self.register_buffer("turn", torch.polar(torch.ones(4), torch.arange(4.0)))

    def forward(self, x):
        found = torch.einsum("bix,iox->box", torch.fft.rfft(x)[..., :4], self.weight)
        turned = torch.view_as_complex(x.unflatten(-1, (4, 2))) * self.turn
        return torch.fft.irfft(found * turned.conj(), n=8)


def test_conjugated_tensors_are_in_the_program(tmp_path):
    def body(record):
        data, model, losses = torch.randn(5, 2, 3, 2, 8), Spectral(), []
        with record(model=model) as recording:
            for x, y in recording.steps(data):
                loss = (model(x) - y).square().sum()
                loss.backward()
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter -= 1e-4 * parameter.grad.conj().conj()
                        parameter.grad = None
                recording.log(loss=loss)
                losses.append(loss.item())
        return losses

    run, losses = as_alone(tmp_path / "run", body)
    assert run.losses["loss"].to_list() == losses
    assert not run.facts.training.loop.unseen
    step = run[3]
    conjugated = {name for name, spec in step.places.tensors.items() if spec.is_conjugated}
    readers = [n for n, seen in enumerate(step.operations) if conjugated & seen.inputs.keys()]
    assert len(readers) > 1
    for number in readers:
        seen = step.operations[number]
        name = next(iter(conjugated & seen.inputs.keys()))
        assert not torch.equal(seen.inputs[name], seen.inputs[name].conj())
        made = next(iter(seen.results.values()))
        found = step.why(f"#{number}{[1] * made.dim()}")
        assert found.recomputed == pytest.approx(found.number.value, rel=1e-4)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (lambda: nn.LazyLinear(3), "has no shape yet"),
        (lambda: nn.Linear(3, 3, device="meta"), "on the meta device"),
        (lambda: nn.Linear(3, 3, dtype=torch.complex128), "is complex128"),
        (lambda: {"queue": torch.eye(3).to_sparse()}, "sparse, nested or"),
    ],
)
def test_what_a_run_cannot_hold_of_the_parts_is_refused(part, message, tmp_path):
    hooks = len(torch.nn.modules.module._global_forward_hooks)
    with (
        pytest.raises(everystep.UsageError, match=message),
        everystep.record(run=tmp_path / "run", model=part()),
    ):
        pass
    assert not (tmp_path / "run").exists()
    assert len(torch.nn.modules.module._global_forward_hooks) == hooks


def test_a_step_without_a_program_is_a_problem_and_not_the_end_of_verifying(tmp_path, monkeypatch):
    from everystep.step.build import NotCapturableError
    from everystep.training import watched_steps as steps

    build = steps.build_path
    monkeypatch.setattr(
        steps, "build_path", lambda *given: (_ for _ in ()).throw(NotCapturableError("it is not"))
    )
    model = network()
    with everystep.record(run=tmp_path / "run", model=model) as recording:
        for number, (x, _) in enumerate(recording.steps(batches())):
            recording.log(loss=model(x[number % 2 :]).sum())
            if number:
                monkeypatch.setattr(steps, "build_path", build)
    found = recording.run.verify(processes=1, progress=False)
    assert not found.is_exact and "step 1 of run cannot be replayed: it did" in found.problems[0]


def test_steps_that_cannot_be_replayed_do_not_count_as_verified(tmp_path, everystep_command):
    given = [(torch.full((8, 6), float(n)), n) for n in range(1, 31)]

    def loss_of(model, batch):
        return model(batch[0]).sum()

    looped(network(), given, loss_of, run=tmp_path / "run", optimizer=None)
    file = tmp_path / "run/batches/1.bin"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    run = everystep.open(tmp_path / "run")
    found = run.verify(progress=False)
    assert (found.steps, found.all_steps, sum(found.threads.values())) == (29, 30, 29)
    assert not found.is_exact and found.different_steps == 0
    code, out, _ = everystep_command("verify", run.directory)
    assert code == 1 and "1 of 30 could not be" in out and "29 of 30 bit-identical" in out
    data = json.loads(everystep_command("verify", run.directory, "--json")[1])
    assert (data["steps"], data["all_steps"]) == (29, 30)
    question = "max(activations['4']) > 1e9"
    assert run.when(question, progress=False).inexact == (30,)
    code, _, err = everystep_command("when", run.directory, question)
    assert code == 1 and "steps from 30 on are skipped, because they cannot be replayed" in err
    measured = run.measure("max(activations['4'])", name="most", progress=False)
    assert len(measured.values) == 29 and measured.left_out == (30,)
    with pytest.raises(everystep.RunError, match="step 30, or ends there"):
        run.first_nonfinite(progress=False)


class InPlace(nn.Module):
    """Its inner modules pass on what they are given, which is written into in between."""

    def __init__(self):
        super().__init__()
        self.first, self.dropout, self.identity = nn.Linear(4, 4), nn.Dropout(0.0), nn.Identity()

    def forward(self, x):
        x = self.first(x)
        x += 1
        x = self.dropout(x)
        x *= 2
        x = self.identity(x)
        x -= 3
        return x


def test_an_output_is_shown_as_it_was_when_its_module_returned(tmp_path):
    model, outputs = InPlace(), {}
    for name, module in model.named_children():
        module.register_forward_hook(
            lambda _, given, output, name=name: outputs.setdefault(name, []).append(output.tolist())
        )
    with everystep.record(run=tmp_path / "run", model=model) as recording:
        for x in recording.steps(torch.randn(3, 2, 4)):
            loss = model(x).square().mean()
            loss.backward()
            recording.log(loss=loss)
    run = recording.run
    for name, each in outputs.items():
        assert [step.activations[name].tolist() for step in run] == each
        largest = run.measure(f"max(activations['{name}'])", name=name, progress=False).values
        assert [*largest.values()] == [max(map(max, output)) for output in each]


def test_modules_that_come_and_go_have_their_outputs(tmp_path):
    """What a step makes may get the id of a module that is gone."""
    model = nn.ModuleDict({"body": nn.Linear(4, 6), "aux": nn.Linear(4, 6), "head": nn.Linear(6, 2)})
    optimizer, outputs = torch.optim.SGD(model.parameters(), lr=1e-5), []
    with everystep.record(model=model, optimizer=optimizer, run=tmp_path / "run") as recording:
        for number, x in enumerate(torch.randn(6, 3, 4)):
            if number == 2:
                del model["aux"]
            if number == 4:
                model["head"], model["more"] = nn.Linear(6, 2), nn.Linear(2, 2)
                optimizer.param_groups[0]["params"] = [*model.parameters()]
            with recording.step(x):
                losses = [nn.MSELoss() for _ in range(20)]
                hidden = model["body"](x) + (model["aux"](x) if "aux" in model else 0)
                out = model["head"](hidden)
                out = model["more"](out) if "more" in model else out
                outputs.append(out.detach().clone())
                total = sum(loss(out * place, out.detach()) for place, loss in enumerate(losses))
                recording.log(loss=descend(optimizer, total))
    steps = [*recording.run]
    later = {"body", "head", "more"}
    assert [{*step.activations} for step in steps] == [{"body", "aux", "head"}] * 2 + [
        *[{"body", "head"}] * 2,
        *[later] * 2,
    ]
    for step, out in zip(steps, outputs, strict=True):
        assert torch.equal(step.activations["more" if "more" in step.activations else "head"], out)
    assert {seen.operation.module for seen in steps[5].operations if seen.operation.module} == later
    assert recording.run.diff(recording.run).is_same


def test_a_compiled_module_that_is_called_is_refused(tmp_path):
    model = network()
    compiled = torch.compile(model, backend="eager")
    with (
        pytest.raises(
            everystep.UsageError, match="uncompiled while everystep watches, with different results"
        ),
        everystep.record(run=tmp_path / "two", model=model) as recording,
    ):
        for x, _ in recording.steps(batches()):
            compiled(x)
    assert (len(recording.run), recording.run.status) == (0, "failed")


@pytest.mark.parametrize("is_whole", [False, True])
def test_a_compiled_function_is_said(is_whole, capsys):
    compiled = torch.compile(functional.mse_loss, backend="eager", fullgraph=is_whole)
    compiled(*batches()[0][:1] * 2)

    def loss_of(model, batch):
        return compiled(model(batch[0]), batch[1])

    run = looped(network(), batches(), loss_of, optimizer=None)
    assert capsys.readouterr().err.count("calls a torch.compile function") == 1
    assert run.verify(processes=1, progress=False).is_exact


class OfOthers(torch.optim.SGD):
    """Keeps its state in tensors that have their numbers in others, as those of few bits do."""

    @torch.no_grad()
    def step(self):
        for parameter in self.param_groups[0]["params"]:
            if parameter not in self.state:
                pair = torch.zeros_like(parameter), torch.zeros_like(parameter)
                self.state[parameter]["average"] = TwoTensor(*pair)
            average = self.state[parameter]["average"]
            average.mul_(0.9).add_(TwoTensor(parameter.grad, parameter.grad))
            parameter.sub_(average.a, alpha=0.1)


def test_the_state_of_an_optimizer_may_be_made_of_other_tensors(tmp_path, capsys, monkeypatch):
    take_snapshots_every(monkeypatch, 4)

    def trained(**settings):
        model = network()
        optimizer = OfOthers(model.parameters(), lr=0.1)
        with everystep.record(
            run=tmp_path / "run", model=model, optimizer=optimizer, **settings
        ) as recording:
            for batch in recording.steps(batches()):
                recording.log(loss=update(model, optimizer, *batch))
        return recording.run

    run = trained()
    assert run.verify(processes=1, progress=False).is_exact
    assert "values of TwoTensor, which a run cannot keep" in capsys.readouterr().err
    with pytest.raises(
        everystep.RunError, match=r"optimizer\.state\.0\.weight\.average.* cannot be made"
    ):
        trained(resume=True)


def test_memory_that_a_generator_of_the_loops_own_fills_again_is_kept_again(tmp_path):
    """Each of these draws writes into memory that the step has read already."""
    generator, noise = torch.Generator(), torch.zeros(4, 3)

    def body(record):
        generator.manual_seed(0)
        weight = torch.ones(3, requires_grad=True)
        optimizer = torch.optim.SGD([weight], lr=0.1)
        with record(weights={"weight": weight}, optimizer=optimizer) as recording:
            for _ in recording.steps(range(4)):
                first = weight + noise.normal_(generator=generator)
                second = weight - noise.uniform_(generator=generator)
                third = torch.rand(4, 3, generator=generator, out=torch.zeros(4, 3))
                loss = (first + second * third).square().mean()
                recording.log(loss=descend(optimizer, loss))
        return weight

    as_alone(tmp_path / "run", body)


def test_an_assertion_on_the_device_leaves_nothing_to_report(capsys):
    def loss_of(model, batch):
        torch._assert_async(batch[0].sum() < 1e9, "the batch is too large")
        return mean_square(model, batch)

    assert looped(network(), batches(), loss_of).verify(processes=1, progress=False).is_exact
    assert capsys.readouterr().err == ""


def test_a_resume_names_what_a_part_lacks_that_the_training_added(tmp_path, monkeypatch):
    take_snapshots_every(monkeypatch, 1)

    def trained(**options):
        model = nn.Sequential(nn.Linear(3, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        parts = {"model": model, "optimizer": optimizer}
        with everystep.record(run=tmp_path / "run", **parts, **options) as recording:
            for number, x in enumerate(recording.steps(torch.randn(4, 2, 3))):
                if number == 2:
                    model.append(added := nn.Linear(3, 1))
                    optimizer.add_param_group({"params": [*added.parameters()]})
                recording.log(loss=descend(optimizer, model(x).square().mean()))

    trained()
    with pytest.raises(
        everystep.RunError, match=r"it lacks .*; build the parts as they were after step 3"
    ):
        trained(resume=True)


def test_what_a_step_adds_to_the_state_dict_is_in_the_states_after_it(tmp_path):
    states = []

    def loss_of(model, x):
        states.append({name: bits(each) for name, each in model.state_dict().items()})
        if len(states) == 3:
            prune.l1_unstructured(model[0], "weight", 0.3)
        if len(states) == 5:
            model.append(nn.BatchNorm1d(1))
        return model(x).square().mean()

    batches = torch.randn(8, 4, 3)
    run = looped(nn.Sequential(nn.Linear(3, 1)), batches, loss_of, run=tmp_path / "run")
    for step, state in enumerate(states):
        assert {name: bits(each) for name, each in run.parameters(step).items()} == state, step


def test_tensors_on_one_memory_change_together_between_steps(tmp_path, monkeypatch):
    """A sharpness-aware optimizer puts back the weights that it kept, so both lie on one memory."""
    take_snapshots_every(monkeypatch, 1)
    torch.manual_seed(0)
    model, kept, seen = nn.Linear(3, 1), {}, []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    begun = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parts = {"model": model, "optimizer": optimizer, "kept": kept}
    with everystep.record(run=tmp_path / "run", **parts) as recording:
        for epoch in range(3):
            for x in recording.steps(torch.randn(2, 4, 3)):
                if kept:
                    seen.append(kept["old"].clone())
                    model.bias.data.add_(kept["old"].sum())
                kept["old"] = model.weight.data.clone()
                with torch.no_grad():
                    model.weight.add_(0.1)
                loss = descend(optimizer, model(x).square().mean())
                model.weight.data = kept["old"]
                optimizer.step()
                recording.log(loss=loss)
            if epoch < 2:
                model.load_state_dict(begun)
    run = everystep.open(tmp_path / "run")
    assert run.verify(processes=1, progress=False).is_exact
    for number in range(2, 7):
        assert torch.equal(run[number].state["part/kept.old"], seen[number - 2])


def test_a_step_of_more_operations_than_a_run_may_have_is_recorded_without_them(monkeypatch, capsys):
    monkeypatch.setattr("everystep.step.build.MOST_ENTRIES", 20)
    torch.manual_seed(0)

    def loss_of(model, repeats):
        return sum(model(torch.ones(2, 3)).square().mean() for _ in range(repeats))

    run = looped(nn.Linear(3, 1), [1, 30], loss_of)
    assert "step 2 cannot be replayed without your code: it has" in capsys.readouterr().err
    assert len(run.losses) == 2
    assert run[1].gradients
    with pytest.raises(everystep.EverystepError, match="step 2"):
        run[2].gradients  # noqa: B018


class Normalized(nn.Module):
    """Every layer of torch's that keeps more for backward than it returns."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3), nn.Linear(16, 3)
        self.of_channels, self.of_groups = nn.BatchNorm2d(4), nn.GroupNorm(2, 4)
        self.of_layers = nn.LayerNorm(4)

    def forward(self, x):
        h = functional.max_pool2d(self.of_groups(self.of_channels(self.first(x))), 2)
        h = functional.adaptive_max_pool2d(functional.dropout(h, 0.2), 2).flatten(2).transpose(1, 2)
        h = functional.scaled_dot_product_attention(*[self.of_layers(h)[:, None]] * 3)
        return self.last(h.flatten(1))


def test_a_step_that_turns_elsewhere_keeps_what_only_autograd_knows(tmp_path):
    torch.manual_seed(0)
    model = Normalized()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    data = [(torch.randn(6, 1, 8, 8), torch.randint(0, 3, (6,))) for _ in range(12)]
    with everystep.record(run=tmp_path / "run", model=model, optimizer=optimizer) as recording:
        for number, (x, y) in recording.steps(enumerate(data, 1)):
            loss = functional.cross_entropy(model(x), y)
            if number % 5 == 0:
                recording.log(size=loss.detach().abs().max().item())
            if number > 7:
                loss = loss + 0.1 * model.last.weight.square().sum()
            descend(optimizer, loss)
            recording.log(loss=loss)
    run = everystep.open(tmp_path / "run")
    assert run.verify(progress=False).is_exact
    for number in (5, 8, 10):
        for seen in run[number].operations:
            assert not [name for name in seen.inputs if name.startswith("input")], seen
    found = run.rerun(precision="float64", progress=False)
    assert len(found.losses) == 12 and found.losses == pytest.approx(found.recorded, rel=1e-4)


def test_a_part_may_hold_single_numbers_with_any_stride():
    held = {"first": torch.arange(3.0)[:1:3].as_strided((1,), (3,))}

    def loss_of(model, batch):
        return mean_square(model, (batch[0] * held["first"].add_(1), batch[1]))

    run = looped(network(), batches()[:3], loss_of, held=held)
    assert run.verify(processes=1, progress=False).is_exact
    assert run[3].end["part/held.first"].item() == 3.0


def test_a_setting_of_torch_that_everystep_does_not_know_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.opt_einsum, "strategy", "telepathy")
    with (
        pytest.raises(everystep.UsageError, match=r"opt_einsum\.strategy cannot be 'telepathy'"),
        everystep.record(run=tmp_path / "run", model=network()),
    ):
        pass


def test_decompositions_of_matrices_replay_in_the_memory_of_a_program(monkeypatch):
    """torch takes results of `qr` on one storage for one tensor; those of a bound program are on one."""
    take_snapshots_every(monkeypatch, 4)
    torch.manual_seed(0)

    def loss_of(model, batch):
        turned = torch.linalg.qr(model.weight)[0]
        factor = torch.linalg.cholesky(model.weight @ model.weight.T + torch.eye(6))
        solved = torch.linalg.solve_triangular(factor, batch.T, upper=False)
        return (batch @ turned - batch).square().mean() + solved.mean()

    run = looped(nn.Linear(6, 6), [torch.randn(16, 6)] * 24, loss_of)
    assert run.verify(processes=1, progress=False).is_exact


class Adds(TorchDispatchMode):
    """Changes what an operator returns, and counts the calls that it sees."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += func is torch.ops.aten.addmm.default
        result = func(*args, **(kwargs or {}))
        return result + 0.1 if func is torch.ops.aten.addmm.default else result


def test_a_mode_around_the_recording_does_what_it_does_within_a_step(tmp_path):
    """What it does with a call is seen, and not its result alone."""

    def body(record):
        model, mode = network(), Adds()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with mode, record(model=model) as recording:
            for pair in recording.steps(batches(6)):
                recording.log(loss=update(model, optimizer, *pair))
        return [*model.parameters(), mode.seen]

    as_alone(tmp_path / "run", body)


def test_a_mode_may_be_entered_in_one_step_and_left_in_a_later_one(tmp_path):
    model, mode = network(), Adds()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with everystep.record(run=tmp_path / "run", model=model, optimizer=optimizer) as recording:
        for number, pair in enumerate(recording.steps(batches(6))):
            if number == 1:
                mode.__enter__()
            recording.log(loss=update(model, optimizer, *pair))
            if number == 3:
                mode.__exit__(None, None, None)
    assert torch._C._len_torch_dispatch_stack() == 0
    assert everystep.open(tmp_path / "run").verify(processes=1, progress=False).is_exact


def test_all_that_no_program_holds_is_in_the_facts_and_some_of_it_is_reported(tmp_path, capsys):
    own = torch.Generator()
    with everystep.record(run=tmp_path / "run", model=nn.Linear(1, 1)) as recording:
        for _ in recording.steps(range(2)):
            torch.rand(1, generator=own), torch.randn(1, generator=own)
            torch.randperm(3, generator=own), torch.randint(5, (2,), generator=own)
    named = "aten.rand.generator", "aten.randn.generator", "aten.randperm.generator"
    expected = [f"{each} takes a Generator" for each in (*named, "aten.randint.generator")]
    assert [*recording.run.facts.training.loop.unseen] == sorted(expected)
    assert capsys.readouterr().err.count("takes a Generator") == 3


@torch.library.custom_op("everystep_tests::halved", mutates_args=())
def halved(x: torch.Tensor) -> torch.Tensor:
    """An operator of another package."""
    return x / 2


def test_a_reason_that_no_program_holds_an_operation_is_true(tmp_path):
    x = torch.nested.nested_tensor([torch.ones(2, 1), torch.ones(3, 1)], layout=torch.jagged)
    with everystep.record(run=tmp_path / "run", model=(model := nn.Linear(1, 1))) as recording:
        for _ in recording.steps(range(2)):
            halved(model.weight), model(x)
    unseen = " ".join(recording.run.facts.training.loop.unseen)
    assert "everystep_tests.halved.default is not an ATen operator of this torch (" in unseen
    assert "aten.linear.default takes a nested tensor" in unseen
    assert "sparse" not in unseen


class Named(nn.Parameter):
    """A parameter of a class that leaves torch's functions as they are."""


def test_parameters_of_a_class_derived_from_torchs_are_parameters():
    model = network()
    model[0].weight = Named(model[0].weight.detach().clone())
    run = looped(model, batches(6), mean_square, optimizer=torch.optim.Adam)
    assert not run.facts.training.loop.unseen
    assert run.verify(processes=1, progress=False).is_exact
    assert torch.equal(run[6].end["parameter/0.weight"], model[0].weight.detach())


def test_a_part_may_hold_modules_of_python(tmp_path):
    """Such as the library of arrays that it computes with."""
    counter = SimpleNamespace(library=torch, other=everystep, count=0)
    for _ in range(2):
        with everystep.record(run=tmp_path / "run", resume=True, counter=counter) as recording:
            for x in recording.steps(torch.ones(len(recording.run) + 2, 1)):
                counter.count += 1
                recording.log(loss=x)
    assert counter.count == 4 and counter.library is torch


def test_a_part_may_hold_a_view_at_which_autograd_refuses_to_look():
    """It was made without autograd, of a memory that a step writes with it."""
    state = {}

    def loss_of(model, batch):
        x, y = batch
        memory = torch.zeros(2, *y.shape)
        with torch.no_grad():
            state["newest"] = memory[0]
        memory[0] = model(x)
        return functional.mse_loss(memory.sum(0), y)

    run = looped(network(), batches(4), loss_of, state=state)
    with pytest.raises(RuntimeError, match="no_grad mode"):
        _ = state["newest"].grad_fn
    assert run.verify(processes=1, progress=False).is_exact


def test_nested_tensors_are_kept_by_content():
    def loss_of(model, batch):
        x, y = batch
        nested = torch.nested.nested_tensor([x[:2], x[:5], x[2:3]], layout=torch.jagged)
        means = torch.stack([each.mean(0) for each in model(nested).unbind()])
        return functional.mse_loss(means, y[:3])

    run = looped(nn.Linear(6, 3), batches(4), loss_of)
    assert run.verify(processes=1, progress=False).is_exact


def test_the_different_numbers_of_a_tensor_are_in_the_program(tmp_path):
    """A loop that has a mean of each class; steps with as many classes share a program."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    counts = (3, 3, 2, 3, 2)
    with everystep.record(run=tmp_path / "run", model=model, optimizer=optimizer) as recording:
        for count, (x, _) in recording.steps(zip(counts, batches(5), strict=True)):
            labels = torch.arange(len(x)) % count
            _, places, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
            found = model(x)
            means = torch.zeros(len(sizes), found.shape[1]).index_add(0, places, found) / sizes[:, None]
            runs = torch.unique_consecutive(labels.sort().values), torch.unique(labels, dim=0)
            assert len(runs[0]) == len(runs[1]) == count
            recording.log(loss=descend(optimizer, (found - means[places]).square().sum() + runs[1][0]))
    run = recording.run
    assert not run.facts.training.loop.unseen
    assert run.facts.training.loop.programs <= 4  # the first step has no pending gradients
    assert run.verify(processes=1, progress=False).is_exact


def test_sequences_of_several_lengths_are_packed_in_the_program(tmp_path):
    """Steps with the same lengths share a program."""

    def make():
        model = nn.ModuleDict({"cells": nn.LSTM(6, 5, batch_first=True), "head": nn.Linear(5, 2)})
        lengths = [torch.tensor([4, 2, 3]), torch.tensor([1, 4, 4])]
        data = [(torch.randn(3, 4, 6), torch.randn(3, 2), lengths[i in (2, 5)]) for i in range(7)]
        return model, torch.optim.SGD(model.parameters(), lr=0.05), data, loss_of

    def loss_of(model, batch, number):
        x, y, lengths = batch
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, True, enforce_sorted=False)
        (last,) = model["cells"](packed)[1][0]
        return functional.mse_loss(model["head"](last), y)

    run = recorded_as_it_is(tmp_path / "run", make)
    assert not run.facts.training.loop.unseen
    assert run.facts.training.loop.programs <= 4
