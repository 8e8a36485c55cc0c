"""Where a number comes from: every line by hand, the steps before, NaN with its rows, and bad input.

`python -m benchmarks.why` does the first for 200 numbers of eight networks; here it is a sample.
"""

import copy
import json
import math
import random
from functools import partial

import pytest
import torch
from benchmarks.why import NETWORKS, asked, followed
from benchmarks.why_by_hand import ALL, complaints
from tests.descent import looped, trained
from torch import nn

import everystep
from everystep import ExpressionError, UsageError
from everystep.answers.why import Why
from everystep.recording.texts import shortest


@pytest.mark.sweep(every=4)
@pytest.mark.parametrize("name", NETWORKS)
def test_each_line_is_what_it_says_computed_by_hand(name, tmp_path):
    torch.manual_seed(0)
    run, chance = NETWORKS[name](tmp_path / "run"), random.Random(name)
    lines = 0
    for _ in range(3):
        step = run[chance.randint(2, len(run))]
        for line in followed(step.why(asked(step, chance), terms=ALL), chance):
            assert complaints(line) == []
            lines += 1
    assert lines > 9


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a small network; no test may change it."""
    torch.manual_seed(1)
    x, y = torch.randn(20, 4), torch.randn(20, 2)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    place = tmp_path_factory.mktemp("why") / "run"
    trained(model, (x, y), optimizer=optimizer, steps=20, batch_size=5, run=place)
    return everystep.open(place)


def test_a_gradient_is_followed_to_the_rows_of_the_data(run):
    step = run[7]
    answer = run.why(7, "gradients['0.weight'][3, 1]", terms=2)
    assert answer.number.value == step.gradients["0.weight"][3, 1].item()
    (group,) = answer.groups
    assert (group.count, len(group.terms)) == (5, 2)
    by_hand = [
        (term.numbers["self"].value * term.numbers["mat2"].value, term.value) for term in group.terms
    ]
    assert all(product == value for product, value in by_hand)
    assert abs(group.terms[0].value) >= abs(group.terms[1].value)
    total = math.fsum([*(term.value for term in group.terms), group.rest])
    assert total == pytest.approx(answer.number.value, rel=1e-5)
    for term in group.terms:
        assert term.numbers["mat2"].row in step.batch.rows.tolist()


def test_a_transposed_view_is_followed_to_the_number_that_was_written(run):
    answer = run.why(7, "gradients['0.weight'][3, 1]", terms=1)
    factor = answer.groups[0].terms[0].numbers["self"]
    made = factor.why()
    assert made.number.value == factor.value
    assert made.observed.operation.name == "tanh_backward"


def test_a_parameter_is_followed_through_the_updates_before(run):
    answer = run.why(9, "parameters['2.bias'][0]", back=3, terms=9)
    values, steps = [], []
    while answer.causes:
        answer = answer.causes[0]
        values.append(answer.number.value)
        steps.append(answer.number.step)
        assert answer.is_equal or answer.recomputed is not None
    assert steps == [8, 7, 6]
    assert values == [run[t].updates["2.bias"].after[0].item() for t in steps]


def test_an_update_is_the_difference_of_two_numbers(run):
    answer = run.why(9, "updates['2.bias'][0]")
    after, before = answer.numbers
    update = run[9].updates["2.bias"]
    assert (after.value, before.value) == (update.after[0].item(), update.before[0].item())
    assert answer.causes[0].number.value == after.value


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_update_is_computed_in_the_dtype_of_the_parameter(tmp_path, dtype):
    torch.manual_seed(0)
    batches = [torch.randn(8, 3, dtype=dtype) for _ in range(2)]
    run = looped(
        nn.Linear(3, 1, dtype=dtype),
        batches,
        lambda model, x: model(x).square().mean(),
        run=tmp_path / "a",
    )
    change = run[2].updates["weight"].change
    for place in range(3):
        assert run.why(2, f"updates['weight'][0, {place}]").number.value == change[0, place].item()


def test_the_numbers_of_an_answer_are_expressions(run):
    answer = run.why(7, "loss")
    for number in answer.numbers:
        again = run.why(7, number.name)
        assert again.number.value == number.value
    assert run.why(8, "previous.loss").number.value == answer.number.value


def test_a_step_of_the_first_state_ends_there(run):
    answer = run.why(1, "parameters['0.weight'][0, 0]", back=5)
    assert answer.note == "the state before the first step"
    assert not answer.causes
    assert run.why(3, "parameters['0.weight'][0, 0]").note == "the state after step 2"


def test_a_change_between_two_steps_is_not_taken_for_an_update(tmp_path):
    model = nn.Linear(2, 1)

    def batches():
        for number in range(4):
            if number == 2:
                with torch.no_grad():
                    model.bias.add_(5)
            yield torch.ones(3, 2)

    opened = looped(model, batches(), lambda model, x: model(x).square().sum(), run=tmp_path / "run")
    (cause,) = opened.why(3, "parameters['bias'][0]", back=1).causes
    assert cause.origin == "state"
    assert "not what step 2 left" in cause.note
    (cause,) = opened.why(4, "parameters['bias'][0]", back=1).causes
    assert (cause.origin, cause.number.step) == ("operation", 3)


def test_nan_is_followed_to_the_row_that_brought_it(small, tmp_path, monkeypatch):
    model, x, y = small
    x[13, 2] = math.nan
    trained(model, (x, y), steps=30, batch_size=5, run=tmp_path / "run")
    opened = everystep.open(tmp_path / "run")
    first = opened.first_nonfinite()
    answer = opened.why(30, "parameters['2.weight'][0, 0]")
    assert answer.began.origin == "batch"
    assert (answer.began.number.row, answer.began.number.step) == (13, first.step.number)
    assert answer.began.rows == (13,)
    assert "row 13 of the data" in answer.to_text()
    # Of a long way both ends are kept, and the number of what is left out.
    assert answer.left_out
    monkeypatch.setattr("everystep.answers.why.answer.LONGEST", 1000)
    whole = opened.why(30, "parameters['2.weight'][0, 0]")
    assert len(whole.causes) == len(answer.causes) + answer.left_out
    assert whole.began.number.name == answer.began.number.name


class Logarithm(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2, bias=False)

    def forward(self, x):
        return self.layer(x).log()


def test_nan_that_an_operation_makes_has_the_rows_behind_it(small, tmp_path):
    _, x, y = small
    x = x.abs() + 1
    x[11] *= -1
    model = Logarithm()
    with torch.no_grad():
        model.layer.weight.fill_(0.5)
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    trained(model, (x, y), optimizer=still, steps=4, batch_size=5, run=tmp_path / "run")
    opened = everystep.open(tmp_path / "run")
    found = opened.first_nonfinite()
    answer = opened.why(found.step.number, "loss")
    began = answer.began
    assert (found.why.number.spot, found.why.rows) == (began.number.spot, (11,))
    assert began.to_text().partition("\n")[2].rstrip() in found.to_text()
    assert began.observed.operation.name == "log"
    assert began.number.step == found.step.number
    assert began.rows == (11,)
    assert all(math.isfinite(number.value) for number in began.numbers)


def test_infinity_of_a_sum_has_the_row_of_its_largest_term(small):
    model, x, y = small
    y[7] = 1e20  # its square is beyond float32
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    run = trained(model, (x, y), optimizer=still, steps=2)
    found = run.first_nonfinite()
    assert (found.name, found.rows) == ("loss", ())
    largest = found.why.groups[0].terms[0]
    assert [number.row for number in largest.numbers.values()] == [None, 7]
    assert "row 7" in found.to_text()


def test_the_mean_of_nothing_is_followed(tmp_path, everystep_command):
    torch.manual_seed(0)
    x, y = torch.randn(12, 4), torch.full((12,), -100)
    run = trained(nn.Linear(4, 3), (x, y), loss=nn.CrossEntropyLoss(), steps=3, run=tmp_path / "run")
    answer = run.why(1, "loss")
    assert math.isnan(answer.recomputed) and "0" in answer.formula
    code, out, _ = everystep_command("first-nonfinite", run.directory)
    assert code == 0 and "loss" in out


def test_batch_norm_that_does_not_train_has_the_formula_that_is_computed():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(2).eval()
    norm.running_var.fill_(4.0)
    model = nn.Sequential(nn.Linear(5, 2), norm)
    batch = torch.randn(3, 5), torch.randn(3, 2)
    run = looped(model, [batch], lambda model, given: ((model(given[0]) - given[1]) ** 2).mean())
    answer = run.why(1, "gradients['1.weight'][0]")
    assert "/ sqrt(running_var + 1e-05)" in answer.formula
    (group,) = answer.groups
    numbers = [{key: n.value for key, n in term.numbers.items()} for term in group.terms]
    total = sum(
        n["grad_out"] * (n["input"] - n["running_mean"]) / math.sqrt(n["running_var"] + 1e-5)
        for n in numbers
    )
    assert total == pytest.approx(answer.number.value, rel=1e-6)


_NAN = torch.tensor([math.nan, -3.0, 0.5, 3.0])


@pytest.mark.parametrize(
    ("name", "compute", "x"),
    [
        # 0.1 in single precision is more than 0.1 in double precision.
        *(
            (name, partial(getattr(torch, name), other=0.1), torch.tensor([0.1, 0.3]))
            for name in ("eq", "le")
        ),
        ("ge", partial(torch.ge, other=0.7), torch.tensor([0.7, 0.3])),
        ("ne", partial(torch.ne, other=0.1), torch.tensor([0.1, 0.3]).bfloat16()),
        # The quotient of 1 and 0.1 is 10 in double precision, but 0.1 is a little more than a tenth.
        (
            "floor_divide",
            lambda x: torch.floor_divide(x.detach(), 0.1),
            torch.tensor([1.0, 5.0]).double(),
        ),
        (
            "div",
            partial(torch.div, other=0.1, rounding_mode="floor"),
            torch.tensor([-1.0, 5.0]).double(),
        ),
        ("elu_backward", nn.functional.elu, _NAN),
        ("hardswish_backward", nn.functional.hardswish, _NAN),
        ("sgn", torch.sgn, _NAN),
        # In the place of a tensor, 0.3 is rounded to bfloat16; as a factor, to float32.
        *(
            (name, partial(getattr(torch, name), other=0.3), torch.tensor([0.25, 0.7, 3.0]).bfloat16())
            for name in ("add", "sub", "fmod", "mul", "div")
        ),
        ("pow", lambda x: torch.pow(x, 0.3), torch.tensor([0.25, 0.7, 3.0]).bfloat16()),
        ("logsumexp", lambda x: x[:0].logsumexp(0), _NAN),
        (
            "_scaled_dot_product_flash_attention_for_cpu",
            lambda x: nn.functional.scaled_dot_product_attention(
                x, x, x, torch.tensor([[True, True], [False, False]])
            ),
            torch.arange(4.0).reshape(1, 1, 2, 2),
        ),
        ("native_dropout", lambda x: torch.native_dropout(x, 0.5, False)[0], torch.tensor([1.0, 2.0])),
        ("_softmax_backward_data", partial(torch.softmax, dim=0), torch.tensor(2.0)),
        ("_log_softmax_backward_data", partial(torch.log_softmax, dim=-1), torch.tensor(2.0)),
        (
            "nll_loss_forward",
            lambda x: nn.functional.cross_entropy(x, torch.tensor(-100)),
            torch.tensor([1.0, 2.0]),
        ),
    ],
)
def test_edges_of_an_operator_have_the_bits_that_their_formula_gives(name, compute, x):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones((), dtype=x.dtype))

    def loss(model, x):
        return (compute(x * model.weight).to(x.dtype) * model.weight).sum()

    step = looped(Scaled(), [x], loss)[1]
    numbers = [n for n, seen in enumerate(step.operations) if seen.operation.name == name]
    assert numbers
    for number in numbers:
        (tensor, *_) = step.operations[number].made.values()
        for index in torch.ones(tensor.shape).nonzero().tolist():
            answer = step.why(f"#{number}{index or ''}")
            assert answer.is_equal or answer.number.value == pytest.approx(answer.recomputed, rel=1e-6)
            assert not isinstance(answer.number.value, bool) or answer.is_equal


class Sampled(nn.Module):
    """Numbers between those of images."""

    def forward(self, x):
        grid = torch.full((len(x), 3, 3, 2), 0.1)
        return nn.functional.grid_sample(x, grid, align_corners=False)


def test_an_operator_without_a_rule_says_so(tmp_path):
    torch.manual_seed(0)
    x, y = torch.randn(12, 1, 6, 6), torch.randint(0, 3, (12,))
    model = nn.Sequential(Sampled(), nn.Flatten(), nn.Linear(9, 3))
    opened = trained(model, (x, y), loss=nn.CrossEntropyLoss(), steps=5, run=tmp_path / "run")
    answer = opened.why(5, "activations['0'][0, 0, 1, 1]")
    assert answer.unknown and not answer.groups
    assert "which numbers it used is unknown" in answer.to_text()


def test_a_number_of_an_lstm_has_the_row_that_it_was_made_from(tmp_path):
    torch.manual_seed(0)
    opened = NETWORKS["LSTM, Adam"](tmp_path / "run")
    names = [seen.operation.name for seen in opened[5].operations]
    place = next(n for n, name in enumerate(names) if "lstm" in name or "rnn" in name)
    answer = opened.why(5, f"#{place}[2, 3, 0]")
    assert (answer.formula, answer.note) == ("", "an LSTM's output after time 0 to 2")
    assert not answer.unknown and answer.recomputed is None
    given = answer.groups[0]
    assert given.text == "input"
    assert {number.spot.index[1] for term in given.terms for number in term.numbers.values()} == {3}


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("gradients['0.weight'][8, 0]", r"shape \(8, 4\)"),
        ("gradients['0.weight']", "32 numbers"),
        ("gradients['0.wieght'][0, 0]", "did you mean 0.weight"),
        ("norm(gradients['0.weight'])", "not a computation"),
        ("loss + 1", "not a computation"),
        ("step", "no operation of step 7 makes step"),
        ("measurements['lr']", "no operation of step 7 makes"),
        ("#99[0]", "no operation #99"),
        ("#0.7[0, 0]", "no such result"),
        ("tensors['optimizer/0.weight/momentum'][0, 0]", "did you mean"),
        ("gradients['0.weight'][0, 0", "never closed"),
        ("", "empty"),
    ],
)
def test_what_is_not_a_number_of_the_step_is_an_error(run, expression, message):
    with pytest.raises(ExpressionError, match=message):
        run.why(7, expression)


@pytest.mark.parametrize("wrong", [{"back": -1}, {"depth": 0}, {"terms": 0}, {"depth": 1.5}])
def test_wrong_options_are_errors(run, wrong):
    with pytest.raises(UsageError, match="must be an integer of at least"):
        run.why(7, "loss", **wrong)


def test_a_step_that_is_not_there_is_an_error(run):
    with pytest.raises(everystep.StepError, match="it has steps 1 to 20"):
        run.why(99, "loss")


def test_gradients_that_no_optimizer_takes_are_known_where_backward_left_them(small, tmp_path):
    model, x, _ = small
    with everystep.record(run=tmp_path / "run", model=model) as recording:
        for number, batch in enumerate(recording.steps([x, x])):
            loss = model(batch).square().sum()
            if not number:
                loss.backward()
            recording.log(loss=loss)
    answer = recording.run.why(1, "gradients['0.weight'][0, 0]")
    assert answer.number.value == float(model[0].weight.grad[0, 0])
    assert answer.groups
    with pytest.raises(ExpressionError, match=r"step 2 has no gradients; #N is"):
        recording.run.why(2, "gradients['0.weight'][0, 0]")


def test_a_parameter_that_no_program_computes_has_its_number_and_says_so(tmp_path):
    """A sparse step is kept by content, after which nothing in the step reads the parameter."""
    table, rows = nn.Embedding(5, 2, sparse=True), torch.tensor([[1], [3]])
    sparse = {"run": tmp_path / "run", "optimizer": torch.optim.SparseAdam}
    run = looped(table, rows, lambda table, row: table(row).square().sum(), **sparse)
    for step, name, back in ((2, "updates['weight'].after", 0), (2, "parameters['weight']", 1)):
        answer = run.why(step, f"{name}[1, 0]", back=back)
        assert answer.number.value == float(table.weight.detach()[1, 0])
        last = answer.causes[-1] if back else answer
        assert "computed by an operation with recorded results only" in last.note


def test_a_loss_that_no_operation_of_the_step_makes_is_said_to_be_one(small, tmp_path):
    """It was logged as a number, or computed while the recording was paused."""
    model, x, _ = small
    with everystep.record(run=tmp_path / "run", model=model) as recording:
        for number, batch in enumerate(recording.steps([x, x])):
            loss = model(batch).square().sum()
            with recording.paused():
                total = torch.stack([loss, loss]).sum()
            recording.log(loss=total if number else 0.25)
    for step in (1, 2):
        with pytest.raises(ExpressionError, match=f"no operation of step {step} makes its loss"):
            recording.run.why(step, "loss")


class Unreadable(torch.optim.SGD):
    def step(self, closure=None):
        print(end="")
        return super().step(closure)


def test_a_step_that_python_took_needs_no_objects(small, tmp_path):
    model, x, y = small
    trained(
        model,
        (x, y),
        loss=lambda prediction, target: (prediction - target).square().sum() * float(len(x)),
        optimizer=Unreadable(model.parameters(), lr=0.001),
        **{"steps": 3, "run": tmp_path / "run", "engine": "eager"},
    )
    run = everystep.open(tmp_path / "run")
    found = run.why(2, "loss")
    assert found.is_equal and found.number.value == run.losses["loss"][1]


def test_a_step_that_python_replays_is_followed_too(small):
    model, x, y = small
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    opened = trained(model, (x, y), optimizer=adam, steps=4, engine="eager")
    chance = random.Random(0)
    for expression in ("gradients['0.weight'][3, 1]", "activations['1'][2, 3]", "loss"):
        step = opened[3]
        for line in followed(step.why(expression, terms=ALL), chance):
            assert complaints(line) == []


def test_the_command_prints_what_python_returns(run, everystep_command):
    command = "why", str(run.directory), "7"
    code, out, err = everystep_command(*command, "gradients['0.weight'][3, 1]", "--terms", "2")
    assert code == 0
    answer = run.why(7, "gradients['0.weight'][3, 1]", terms=2)
    assert out.split("\n", 1)[1] == answer.to_text().split("\n", 1)[1]
    assert "everystep why" in err
    code, out, _ = everystep_command(*command, "loss", "--json", "--depth", "2")
    data = json.loads(out)
    assert data["number"]["value"] == run[7].loss
    assert data["causes"][0]["observed"]["operator"].startswith("aten.")
    code, _, err = everystep_command(*command, "gradients['0.weight'][9, 9]")
    assert code == 2
    assert "shape (8, 4)" in err


def test_an_answer_shows_itself(run):
    answer = run.why(7, "loss")
    assert isinstance(answer, Why)
    assert repr(answer).startswith("<step 7: ")
    assert "the sum of 10 terms" in answer._repr_html_()
    assert "(forward of 2)" in answer.numbers[0].why()._repr_html_()
    assert answer.to_text() == run[7].why("loss").to_text()


class Complex(nn.Module):
    """Complex numbers in each way that models have them."""

    def __init__(self):
        super().__init__()
        self.pairs = nn.Parameter(torch.randn(3, 2))
        self.filter = nn.Parameter(torch.randn(3, dtype=torch.cfloat))
        self.inside = nn.Linear(4, 4)

    def forward(self, x):
        filtered = torch.fft.rfft(self.inside(x)) * torch.view_as_complex(self.pairs)
        turned = (filtered + self.filter) * torch.polar(x[:, :3].abs(), x[:, 1:])
        turned.imag[:, 1] = x[:, 0]
        halves = torch.view_as_real(turned).flatten(1)
        return halves.sum(1) + turned.real.square().mean(1) + torch.fft.irfft(turned).abs().sum(1)


@pytest.fixture(scope="module")
def complex_run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("complex") / "run"
    torch.manual_seed(0)
    model, adam = Complex(), partial(torch.optim.Adam, lr=1e-2)
    batches = [torch.randn(5, 4) for _ in range(4)]
    return looped(
        model, batches, lambda model, x: (model(x) - 1).pow(2).mean(), run=directory, optimizer=adam
    )


def test_a_complex_number_is_its_two_parts_and_a_part_is_one_of_them(complex_run):
    run, step = complex_run, complex_run[3]
    for place in ((1, 0), (1, 1)):
        answer = run.why(3, f"gradients['pairs'][{place[0]}, {place[1]}]")
        assert answer.number.value == step.gradients["pairs"][place].item()
    update = step.updates["filter"].after[1].item()
    answer = run.why(3, "updates['filter'].after[1]")
    assert answer.number.value == update
    if answer.origin == "parts":
        assert [each.value for each in answer.numbers] == [update.real, update.imag]
    assert run.why(3, "updates['filter'].after[1].imag").number.value == update.imag
    change = step.updates["filter"].change[1].item()
    assert run.why(3, "updates['filter'][1]").number.value == change
    earlier = run.why(3, "parameters['filter'][1].real", back=1)
    assert earlier.causes[0].number.step == 2
    with pytest.raises(UsageError, match="not complex"):
        run.why(3, "parameters['inside.weight'][1, 1].real")


def test_each_number_of_complex_operations_is_the_one_that_is_recorded(complex_run):
    step = complex_run[3]
    looked = 0
    for index, seen in enumerate(step.operations):
        for place, (name, tensor) in enumerate(seen.results.items(), start=1):
            at = tuple(size - 1 for size in tensor.shape)
            answer = step.why(f"#{index}.{place}{list(at) if at else ''}")
            for number in (answer.number, *answer.numbers):
                asked = number.why()
                assert asked.number == number
            if answer.origin == "operation" and not isinstance(tensor[at].item(), bool):
                assert answer.number.value == tensor[at].item() or name in seen.written
                assert answer.recomputed is None or answer.recomputed == pytest.approx(
                    answer.number.value, rel=1e-4, abs=1e-6
                )
            looked += 1
    assert looked > 40


def test_what_is_written_through_a_conjugate_is_read_through_it_and_without_it(tmp_path):
    with everystep.record(run=tmp_path / "run", state=torch.zeros(1)) as recording:
        for x in recording.steps([torch.tensor([1 + 2j, 3 - 1j])]):
            conjugate = x.clone().conj()
            conjugate.copy_(x + 1)
            recording.log(loss=(conjugate.abs() + (conjugate.conj() * 2).abs()).sum())
    step = recording.run[1]
    found = {}
    for index, seen in enumerate(step.operations[:-1]):
        answer = step.why(f"#{index}[1]", depth=3)
        assert answer.number.value == next(iter(seen.made.values()))[1].item()
        assert all(number.why().number == number for number in answer.numbers)
        found[seen.operation.operator] = answer
    assert [each.value for each in found["aten.mul.Tensor"].numbers] == [4 + 1j]
    assert [each.value for each in found["aten.clone.default"].numbers] == [4 - 1j]


def test_complex_numbers_are_plain_data_and_text(complex_run, everystep_command):
    asked = ["why", str(complex_run.directory), "3"]
    _, given, _ = everystep_command(*asked, "updates['filter'].after[1]", "--json")
    answer = json.loads(given)
    assert complex(answer["number"]["value"]) == complex_run[3].updates["filter"].after[1].item()
    _, text, _ = everystep_command(*asked, "gradients['pairs'][1, 1]")
    assert f"  {shortest(complex_run[3].gradients['pairs'][1, 1].item())}  " in text


@pytest.mark.parametrize(
    ("read", "dtype"),
    [
        (lambda x: (x.view(torch.int32) & -65536).view(torch.float32), "int32"),
        (copy.deepcopy, "uint8"),  # which copies the memory of a tensor as bytes
    ],
)
def test_bits_that_are_read_as_another_dtype_are_said_to_be_bits(read, dtype):
    batches = [torch.randn(6, 4) for _ in range(2)]
    step = looped(nn.Linear(4, 2), batches, lambda model, x: model(read(x)).square().mean())[2]
    (x,) = step.batch
    at = [seen.operation.name for seen in step.operations].index("addmm")
    for term in step.why(f"#{at}[5, 0]", terms=9).groups[-1].terms:
        factor = term.numbers["mat1"]
        assert factor.value in read(x[5]).tolist()
        made = factor.why()
        assert (made.number, made.recomputed) == (factor, None)
        assert made.note == f"it wrote {dtype} there, and these are some of its bits"
