"""Experiment files with random mistakes: each reads back as the same, or is refused in words."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import tomli_w
from hypothesis import strategies as st

from everystep.errors import ExperimentError
from everystep.experiment.specification import built_in, load

__all__ = ["EXPERIMENTS", "load_and_compare"]

WHOLE = [load(name).model_dump(exclude_none=True) for name in built_in()]

_plain = st.one_of(
    st.booleans(),
    st.integers(-3, 10),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(st.characters(codec="utf-8"), max_size=12),
    st.sampled_from(
        ["Linear(4, 3)", "ReLU()", "Linear(1e9, 3)", "Linear(", "os.system('a')", "cpu", "cuda:99"]
    ),
    st.sampled_from(
        ["Adam", "SGD", "MSELoss", "CrossEntropyLoss", "StepLR", "LambdaLR", "table", "random"]
    ),
    st.dates(),
)
_values = st.recursive(
    _plain,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("ab_.\u00e9", max_size=3), inner, max_size=2)
    ),
    max_leaves=6,
) | st.integers(1, 60).map(lambda depth: _deep(depth))
_keys = st.sampled_from(
    [
        *("steps", "epochs", "seed", "threads", "batch_size", "lr", "name", "source", "N", "D_in"),
        *("target", "layers", "scheduler", "data", "model", "loss", "optimizer", "validation"),
        *("momentum", "betas", "reduction", "stepz"),
    ]
)


def _deep(depth: int) -> Any:
    found: Any = 1
    for _ in range(depth):
        found = [found]
    return found


@st.composite
def _experiments(draw: st.DrawFn) -> dict[str, Any]:
    whole: dict[str, Any] = copy.deepcopy(draw(st.sampled_from(WHOLE)))
    for _ in range(draw(st.integers(0, 3))):
        sections = [whole, *(each for each in whole.values() if isinstance(each, dict))]
        section = draw(st.sampled_from(sections))
        key = draw(st.sampled_from(sorted(section)) if section and draw(st.booleans()) else _keys)
        match draw(st.sampled_from(["set", "set", "remove", "double"])):
            case "set":
                section[key] = draw(_values)
            case "remove":
                section.pop(key, None)
            case "double" if isinstance(section.get(key), int | float | list):
                section[key] = section[key] * 2
    return whole


#: Random experiments, as data.
EXPERIMENTS = _experiments()


def load_and_compare(raw: dict[str, Any], folder: Path) -> str:
    """Load an experiment from its file; return "refused", or "read": written again, it is the same.

    Raises:
        AssertionError: it is another one, or an error is not in words.
    """
    path = folder / "experiment.toml"
    path.write_bytes(tomli_w.dumps(raw).encode())
    try:
        experiment = load(path)
    except ExperimentError as error:
        assert error.faults and all(fault.problem for fault in error.faults)
        assert len({*error.faults}) == len(error.faults), error
        assert "Traceback" not in str(error) and "pydantic" not in str(error)
        return "refused"
    (folder / "again.toml").write_text(experiment.to_toml(), encoding="utf-8")
    again = load(folder / "again.toml")
    assert again.to_toml() == experiment.to_toml()  # as text, NaN is itself
    return "read"
