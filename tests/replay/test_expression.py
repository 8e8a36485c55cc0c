"""Expressions: what they mean, what they refuse and how, and that nothing else comes of them."""

import math
import sys

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from everystep.errors import ExpressionError
from everystep.expression import Expression, Reference, parse

NAN, INF = math.nan, math.inf
W = torch.tensor([[1.0, -2.0, 3.0], [0.0, 5.0, -6.0]])
VALUES = {
    "loss": 3.5,
    "step": 137,
    "batch.x": torch.arange(6.0).reshape(2, 3),
    "batch.y": torch.tensor([1, 0]),
    "parameters['0.weight']": W,
    "buffers['1.running_mean']": torch.tensor([0.5, 1.5]),
    "gradients['0.weight']": W * 2,
    "activations['1']": torch.tensor([0.0, 0.0, 0.0, 4.0]),
    "updates['0.weight']": W * -0.1,
    "updates['0.weight'].before": W,
    "updates['0.weight'].after": W * 0.9,
    "measurements['lr']": 1e-3,
    "measurements['validation loss']": 0.25,
    "measurements['w']": W,
    "previous.loss": 7.0,
    "previous.step": 136,
    "previous.batch.x": torch.ones(2, 3),
    "previous.gradients['0.weight']": -W,
    "previous.updates['0.weight'].after": W,
    "previous.measurements['lr']": 1e-2,
    "gradients['one']": torch.tensor([2.0]),
    "gradients['scalar']": torch.tensor(4.0),
    "gradients['none']": torch.empty(0, 3),
    "gradients['bad']": torch.tensor([1.0, NAN, INF, -INF]),
    "gradients['half']": torch.full((100, 100), 300.0, dtype=torch.float16),
    "gradients['brain']": torch.full((300,), 1.0, dtype=torch.bfloat16),
    "gradients['whole']": torch.tensor([1, 2, 3, 6]),
    "gradients['large']": torch.tensor([2**24 + 1]),
    "gradients['truths']": torch.tensor([True, False, True, True]),
    "gradients['complex']": torch.tensor([3 + 4j]),
    "gradients['tiny']": torch.full((4,), 1e-30),
}


def value_of(reference):
    return VALUES[str(reference)]


def evaluate(text, measurements=("lr",)):
    return parse(text, measurements).evaluate(value_of)


def number(text):
    return parse(text, ["lr"]).number(value_of)


def same(value, expected):
    if isinstance(expected, torch.Tensor):
        return isinstance(value, torch.Tensor) and torch.equal(value, expected)
    return not isinstance(value, torch.Tensor) and (
        value == expected or (math.isnan(value) and math.isnan(expected))
    )


def fault(text, measurements=()):
    with pytest.raises(ExpressionError) as caught:
        parse(text, measurements)
    return str(caught.value)


# ---------------------------------------------------------------- what it means


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("loss > 2 * previous.loss", False),
        ("measurements['validation loss'] < 0.3 and step > 10", True),
        ("zeros(activations['1']) > 0.7", True),
        ("zeros(activations['1'])", 0.75),
        ("max(abs(updates['0.weight'].before)) / max(abs(gradients['0.weight']))", 0.5),
        ("mean(batch.x)", 2.5),
        ("mean(batch.y)", 0.5),
        ("norm(gradients['0.weight'])", (W * 2).norm().item()),
        ("parameters['0.weight']", W),
        ("parameters['0.weight'][0, :2]", W[0, :2]),
        ("parameters['0.weight'][-1]", W[-1]),
        ("parameters['0.weight'][:, ::2][1]", W[:, ::2][1]),
        ("parameters['0.weight'] > 0", W > 0),
        ("-1 < parameters['0.weight'] <= 3", (W > -1) & (W <= 3)),
        ("3 > 2 > previous.loss", False),
        ("1 < 2 < 3 != 4", True),
        ("(parameters['0.weight'] - 1) ** 2 % 3", (W - 1) ** 2 % 3),
        ("parameters['0.weight'][0] @ batch.x[1]", W[0] @ VALUES["batch.x"][1]),
        ("1 / activations['1']", 1 / VALUES["activations['1']"]),
        ("clip(parameters['0.weight'], -1, 2)", W.clamp(-1, 2)),
        ("clip(parameters['0.weight'], -inf, gradients['one'])", W.clamp(max=2)),
        ("isnan(clip(gradients['bad'], -1, 2))", torch.tensor([False, True, False, False])),
        ("clip(loss, 4, 5)", 4),
        ("clip(7, -5, loss)", 3.5),
        ("clip(nan, 0, 1)", NAN),
        ("where(parameters['0.weight'] > 0, parameters['0.weight'], 0)", W.clamp(min=0)),
        ("where(parameters['0.weight'], 1.5, loss)", torch.where(W != 0, 1.5, 3.5).double()),
        ("where(loss > 3, 1, 2)", 1),
        ("-buffers['1.running_mean']", torch.tensor([-0.5, -1.5])),
        ("sqrt(gradients['scalar'])", torch.tensor(2.0)),
        ("loss if step > 200 else -loss", -3.5),
        ("0 or loss", 3.5),
        ("step > 1 and loss", 3.5),
        ("not gradients['one']", False),
        ("pi * True", math.pi),
        ("  loss >\n\t1 ", True),
        ("loss" + " + loss" * 500, 3.5 * 501),
    ],
)  # fmt: skip
def test_it_means_what_it_says(text, expected):
    assert same(evaluate(text), expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sum(w)", W.sum().item()),
        ("min(w)", -6),
        ("max(w)", 5),
        ("std(w)", W.std().item()),
        ("var(w)", W.var().item()),
        ("median(w)", 0),
        ("quantile(w, 0.5)", 0.5),
        ("rms(w)", math.sqrt(75 / 6)),
        ("numel(w)", 6),
        ("any(w > 4)", True),
        ("all(w > 4)", False),
        ("dot(w, 2 * w)", 150),
        ("cosine(w, 2 * w)", 1),
        ("nonfinite(gradients['bad'])", 3),
        ("sum(isnan(gradients['bad']))", 1),
        ("sum(sign(w))", 1),
        ("sum(exp(log(abs(w[0]))))", 6),
        ("sum(log10(abs(w[0])))", math.log10(6)),
        ("max(norm(w), loss, 99)", 99),
        ("max(1, nan, 2)", NAN),
        ("cosine(gradients['tiny'], gradients['tiny'])", 1),
        ("norm(gradients['half'])", 30000),
        ("sum(gradients['half'])", 3e6),
        ("dot(gradients['half'], gradients['half'])", 9e8),
        ("sum(gradients['brain'])", 300),
        ("mean(gradients['whole'])", 3),
        ("norm(gradients['whole'])", math.sqrt(50)),
        ("median(gradients['whole'])", 2),
        ("median(gradients['large'])", 2**24 + 1),
        ("mean(gradients['truths'])", 0.75),
        ("norm(gradients['complex'])", 5),
        ("mean(gradients['none'])", NAN),
        ("median(gradients['none'])", NAN),
        ("quantile(gradients['none'], 0)", NAN),
        ("var(gradients['none'])", NAN),
        ("norm(gradients['none'])", 0),
        ("sum(gradients['none'])", 0),
        ("cosine(gradients['none'], gradients['none'])", NAN),
        ("cosine(0 * w, w)", NAN),
    ],
)  # fmt: skip
def test_functions_of_all_elements_give_plain_numbers(text, expected):
    value = evaluate(text, ["w"])
    assert not isinstance(value, torch.Tensor)
    assert value == pytest.approx(expected, rel=1e-6, nan_ok=True)


UNARY = (
    *("abs", "sqrt", "exp", "log", "log10", "sign", "isnan", "isinf", "isfinite"),
    *("sum", "mean", "min", "max", "median", "norm", "rms", "std", "var"),
    *("zeros", "nonfinite", "numel", "any", "all"),
)


@pytest.mark.sweep(every=4)
@pytest.mark.parametrize("name", UNARY)
@given(x=st.floats(width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 3e38]))
def test_a_plain_number_is_what_a_tensor_of_one_element_would_be(name, x):
    asked = parse(f"{name}(loss)")
    plain = asked.number(lambda _: x)
    tensor = asked.number(lambda _: torch.tensor(x, dtype=torch.float64))
    assert plain == pytest.approx(tensor, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("sign", ["+", "-", "*", "/", "%", "**"])
@given(
    a=st.floats() | st.sampled_from([0.0, -0.0, INF, NAN, -8.0, 1e308]),
    b=st.floats() | st.sampled_from([0.0, -0.0, INF, NAN, -1.0, 3.0, 1 / 3, -1e300]),
)
def test_arithmetic_never_fails_but_gives_inf_and_nan_as_tensors_do(sign, a, b):
    asked = parse(f"loss {sign} previous.loss")
    plain = asked.evaluate(lambda reference: b if reference.is_previous else a)
    wrapped = [torch.tensor(value, dtype=torch.float64) for value in (a, b)]
    tensor = asked.evaluate(lambda reference: wrapped[reference.is_previous])
    if sign == "%" and (math.isinf(b) or (a and b and abs(a / b) > 1e15)):
        return  # torch and Python differ in how they round these
    assert plain == pytest.approx(tensor.item(), rel=1e-12, nan_ok=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1 / 0", INF), ("-1 / 0", -INF), ("0 / 0", NAN), ("1 / -0.0", -INF), ("nan / 0", NAN),
        ("1 // 0", INF),
        ("5 % 0", NAN), ("0 ** -1", INF), ("(-0.0) ** -1", -INF), ("(-8) ** (1 / 3)", NAN),
        ("(-10) ** 309", -INF), ("(-10) ** 400", INF), ("10.0 ** 309", INF), ("1e200 * 1e200", INF),
        ("exp(1000)", INF), ("log(0)", -INF), ("log(-1)", NAN), ("sqrt(-1)", NAN), ("inf - inf", NAN),
        ("9 ** 9 ** 9", INF), ("2 ** 10", 1024), ("9223372036854775807 + 1", 2.0**63),
        ("0x" + "f" * 9000, INF), ("4611686018427387904 * 4611686018427387904", 2.0**124),
        ("-0x" + "f" * 9000, -INF), ("norm(-3)", 3), ("quantile(7, 0.1)", 7), ("dot(2, 3)", 6),
        ("cosine(2, -3)", -1), ("cosine(0, 1)", NAN), ("rms(-2)", 2), ("numel(5)", 1), ("sum(True)", 1),
    ],
)  # fmt: skip
def test_plain_numbers_have_no_exceptions_and_do_not_grow(text, expected):
    value = evaluate(text)
    assert same(value, expected)
    assert isinstance(value, float) or abs(value) < 2**63


def test_a_large_integer_of_many_powers_is_infinite():
    """As Python's integers, the powers would take longer than a test may."""
    text = "(" * 50 + "9" + " ** 99999999)" * 50 + "** 9 ** 9 ** 9 * 0x" + "f" * 4000
    assert evaluate(text) == INF


# ---------------------------------------------------------------- numbers, truths, names


@pytest.mark.parametrize(
    "text", ["gradients['one']", "gradients['one'] * 1", "2", "parameters['0.weight'][0, 1] + 4"]
)
def test_one_element_is_a_number_and_a_condition(text):
    asked = parse(text)
    assert asked.number(value_of) == 2.0 and type(asked.number(value_of)) is float
    assert asked.truth(value_of) is True


@pytest.mark.parametrize("name", ["0.weight", "none"])
def test_several_elements_or_none_are_no_number(name):
    asked = parse(f"gradients['{name}']")
    with pytest.raises(ExpressionError, match=r"shape \(\d, 3\); use its mean, norm, max"):
        asked.number(value_of)
    with pytest.raises(ExpressionError, match=r"use any\(\.\.\.\) or all\(\.\.\.\)"):
        asked.truth(value_of)


def test_a_complex_number_is_none():
    for text in ("gradients['complex']", "sum(gradients['complex'])", "min(gradients['complex'])"):
        with pytest.raises(ExpressionError):
            parse(text).number(value_of)


def test_nan_holds_as_in_python():
    assert parse("nan").truth(value_of) is True
    assert parse("loss - loss").truth(value_of) is False


@pytest.mark.parametrize("text", ["{} and 1", "0 or {}  and 1", "not {}", "1 if {} else 0"])
def test_a_condition_of_several_elements_is_marked(text):
    condition = "parameters['0.weight'] > 0"
    with pytest.raises(ExpressionError, match="any") as caught:
        evaluate(text.format(f"({condition})"))
    _, shown, marks = str(caught.value).splitlines()
    if not text.startswith("not"):
        assert shown[marks.index("^") :].startswith(condition)
        assert marks.count("^") == len(condition)


def test_only_what_is_needed_is_asked_for():
    def at_the_first_step(reference):
        if reference.is_previous:
            raise KeyError("there is no step 0")
        return {"step": 1, "loss": 2.0}[reference.kind]

    assert parse("step > 1 and loss > previous.loss").truth(at_the_first_step) is False
    assert parse("loss / previous.loss if step > 1 else 1").number(at_the_first_step) == 1.0
    with pytest.raises(KeyError, match="step 0"):
        parse("loss > previous.loss").truth(at_the_first_step)


def test_an_error_of_what_gives_the_values_passes_through():
    def broken(reference):
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone") as caught:
        parse("norm(gradients['a']) + 1 > 2 and not batch.x[0]").evaluate(broken)
    assert not isinstance(caught.value, ExpressionError)


def test_a_bare_name_means_the_language_first():
    asked = parse("loss + ok", ["loss", "norm", "ok", "a b", "if"])
    assert asked.references == {Reference("loss", "", False), Reference("measurements", "ok", False)}
    assert "norm is a function" in fault("norm + 1", ["norm"])
    assert parse("measurements['norm']", ["norm"]).references == {
        Reference("measurements", "norm", False)
    }


def test_all_unknown_names_are_said_at_once():
    asked = parse(
        "norm(gradients['0.wieght']) + lr + previous.activations['9'][0] + loss + mean(batch.y)", ["lr"]
    )
    asked.check(
        {"gradients": ["0.wieght"], "measurements": ["lr"], "activations": ["9"], "batch": ["y"]}
    )
    asked.check({})
    with pytest.raises(ExpressionError) as caught:
        asked.check(
            {
                "gradients": ["0.weight", "0.bias"],
                "measurements": ["lr"],
                "activations": {"0": 1, "1": 2},
                "batch": [],
            }
        )
    assert list(map(str, caught.value.faults)) == [
        "previous.activations['9']: unknown name; known here: 0, 1",
        "batch.y: unknown name; the run has none",
        "gradients['0.wieght']: unknown name; did you mean 0.weight?",
    ]
    assert "3 errors in norm(gradients" in str(caught.value)


# ---------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("text", "message", "marked"),
    [
        ("", "the expression is empty", None),
        ("loss = 3", "to compare, write ==", "="),
        ("loss > 1 and lr = 3", "to compare, write ==", "="),
        ("loss > 1 && step", "and, or, not", "&"),
        ("loss > ", "something is missing after >", ">"),
        ("gradients[0.weight][3,5]", "a name needs quotes", "gradients[0.weight]"),
        ("(loss", "'(' was never closed", "("),
        ("import os", "the expression is invalid", "i"),
        ("eval('1')", "eval is not a function", "eval"),
        ("__import__('os')", "__import__ is not a function", "__import__"),
        ("nrom(batch.x)", "nrom is not a function; did you mean norm?", "nrom"),
        ("xyzzy(1)", "known functions: abs sqrt exp", "xyzzy"),
        ("loss(1)", "loss is not a function", "loss"),
        ("batch.x.norm()", "write norm(...) around the value", "batch.x.norm"),
        ("parameters['w'].grad", "unknown attribute .grad", "parameters['w'].grad"),
        ("(lambda: 1)()", "this is not a function", "lambda: 1"),
        ("lambda: 1", "lambda is not supported", "lambda: 1"),
        ("[i for i in loss]", "comprehension", "[i for i in loss]"),
        ("f'{loss}'", "f-string", "f'{loss}'"),
        ("gradients[f'{1}']", "expected a name in quotes", "f'{1}'"),
        ("'loss'", "text is only supported as a name in brackets", "'loss'"),
        ("1j", "not a supported number", "1j"),
        ("1, 2", "an expression is a single value", "1, 2"),
        ("max(*batch.x)", "Starred", "*batch.x"),
        ("loss is 1", "write == or !=", "loss is 1"),
        ("loss & 1", "supported operators", "loss & 1"),
        ("~loss", "negate a condition with not", "~loss"),
        ("norm()", "norm takes 1 argument, not 0", "norm()"),
        ("sum(batch.x, dim=0)", "no keyword arguments", "0"),
        ("norm + 1", "norm is a function; write norm(...)", "norm"),
        ("gradients", "write gradients['0.weight']", "gradients"),
        ("previous.gradients[0]", "gradients['0.weight']", "0"),
        ("batch > 1", "batch.x or batch.y", "batch"),
        ("batch.z", "batch.x, batch.y", "batch.z"),
        ("previous", "write previous.loss", "previous"),
        ("previous.previous.loss", "previous.previous is not supported", "previous.previous.loss"),
        ("previous.nan", "unknown name nan", "previous.nan"),
        ("los > 1", "did you mean loss", "los"),
        ("fc1 > 1", "gradients['0.weight']", "fc1"),
        ("gradients['a'].before", "unknown attribute .before", "gradients['a'].before"),
        ("batch.x[loss]", "integers and slices", "loss"),
        ("batch.x[99999999999999999999]", "integers and slices", "99999999999999999999"),
        ("loss > 1 # high", "comments are not supported", "# high"),
        ("'é' > é.x", "text is only supported", "'é'"),
        ("1 > é.x", "unknown attribute .x", "é.x"),
        ("9" * 5000, "Exceeds the limit", None),
        ("1" * 10_001, "10,000 characters", None),
        ("loss\0", "", None),
        ("\ud800", "the expression is invalid", None),
        ("-" * 5000 + "1", "nested too deeply", None),
        ("abs(" * 150 + "1" + ")" * 150, "nested too deeply", None),
        ("loss" + "**loss" * 150, "nested too deeply", None),
    ],
)  # fmt: skip
def test_it_says_what_is_wrong_and_where(text, message, marked):
    said = fault(text)
    assert message in said
    said.encode()
    if marked:
        _, shown, marks = said.splitlines()
        start = marks.index("^")
        assert shown[start : start + marks.count("^")] == marked


def test_the_error_of_a_long_expression_shows_the_place_in_it():
    said = fault(" + ".join(["loss"] * 300 + ["lsos"] + ["loss"] * 300))
    problem, shown, marks = said.splitlines()
    assert problem == "unknown name lsos; did you mean loss?"
    assert shown[marks.index("^") :].startswith("lsos") and len(shown) < 120
    assert shown.startswith("  ...") and shown.endswith("...")


@pytest.mark.parametrize(
    ("text", "message", "marked"),
    [
        ("1 + sum(batch.x @ batch.x)", "mat1 and mat2", "batch.x @ batch.x"),
        ("mean(batch.x + batch.y)", "must match the size", "batch.x + batch.y"),
        ("batch.x[7]", "out of", "batch.x[7]"),
        ("batch.x[0, 0, 0]", "too many indices", "batch.x[0, 0, 0]"),
        ("batch.x[::0]", "step", "batch.x[::0]"),
        ("loss[0]", "a single number", "loss[0]"),
        ("loss @ loss", "unsupported operand", "loss @ loss"),
        ("min(gradients['none'])", "empty and has no min", "min(gradients['none'])"),
        ("max(loss, batch.x)", "expected one number", "max(loss, batch.x)"),
        ("quantile(batch.x, 2)", "between 0 and 1", "quantile(batch.x, 2)"),
        ("dot(batch.x, batch.y)", "the shapes (2, 3) and (2,) do not match", "dot(batch.x, batch.y)"),
        ("-gradients['truths']", "Negation", "-gradients['truths']"),
        ("gradients['whole'] // 0", "ZeroDivision", "gradients['whole'] // 0"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_are_marked(text, message, marked):
    asked = parse(text)
    with pytest.raises(ExpressionError) as caught:
        asked.evaluate(value_of)
    problem, shown, marks = str(caught.value).splitlines()
    assert message in problem
    start = marks.index("^")
    assert shown[start : start + marks.count("^")] == marked


WORDS = r"""
loss step lr previous . batch x gradients ['one'] [0] [ ] ( ) ' parameters['0.weight'] updates
['0.weight'] .before norm max quantile cosine , + - * ** / // % @ < > = == & ~ : := ! # \ and or not if
else in is for lambda eval None True await yield 1 0 9 1e308 0x 1_0 2j nan inf é … f'{ }
"""
TOKENS = [*WORDS.split(), '"' * 3, "\n", "\0", "\x1b", "\ud800"]


@given(st.lists(st.sampled_from(TOKENS), max_size=12), st.sampled_from(["", " "]))
@example(["é", ":="], " ")
def test_any_text_is_an_expression_or_an_expression_error(tokens, between):
    try:
        asked = parse(between.join(tokens), ["lr"])
    except ExpressionError as error:
        str(error).encode()
        return
    assert isinstance(asked, Expression)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "VALUES", VALUES | {"previous.lr": 1.0})
        try:
            asked.evaluate(lambda reference: VALUES.get(str(reference), W))
        except ExpressionError as error:
            str(error).encode()


# ---------------------------------------------------------------- what it leaves alone


def test_tensors_are_not_changed_and_no_graph_grows():
    weight = torch.nn.Parameter(W.clone())
    before = weight.detach().clone()
    for name in UNARY:
        for text in (f"{name}(w)", f"-w + {name}(w) * w ** 2 / w // w % w - w", f"{name}(w[0])"):
            value = parse(text, ["w"]).evaluate(lambda _: weight)
            assert not getattr(value, "requires_grad", False)
    assert torch.equal(weight, before) and weight.grad is None
