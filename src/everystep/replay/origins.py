"""Where what an operation is given began to differ: in the data, in a state, in a random generator."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from everystep.recording.texts import shortest
from everystep.replay.evidence import Evidence
from everystep.replay.given import name_in_words
from everystep.replay.operations import OperationDifference, TensorDifference, tensor_difference
from everystep.step.check import same_bits

__all__ = ["of_batch", "of_draw", "of_outside", "of_state"]

#: Rows that are named.
MOST_ROWS = 6


def of_batch(name: str, found: OperationDifference, evidence: Evidence) -> Iterator[str]:
    """Yield why a tensor of the batch differs: other rows, or other numbers in them."""
    one, other = (step.batch.tensors.get(name) for step in evidence.steps)
    assert one is not None
    if other is not None and same_bits(one, other):  # something wrote into it that no program shows
        return
    difference = tensor_difference(name, one, other)
    are_same_rows = found.rows and all(a == b for _, a, b in found.rows)
    if difference.positions and are_same_rows and evidence.has_rows:
        set_by = [e for e in evidence.settings if e.kind == "data" and e.name not in ("digest", "path")]
        set_by += [e for e in evidence.settings if e.kind == "seed" and evidence.is_data_drawn]
        yield from map(str, set_by)
        if not set_by:
            yield f"data: {_cells_text(difference, found)}"
        return
    if found.rows and not evidence.has_rows and all(a != b for _, a, b in found.rows):
        yield f"batch: the same rows of {name} in another order"
        return
    # The seed decides on the order of the rows, not on how many there are.
    kinds = ("seed", "batches") if difference.positions else ("batches",)
    order = [[e for e in evidence.settings if e.kind == kind] for kind in kinds]
    set_by = next(filter(None, order), [])
    set_by += [e for e in evidence.settings if e.kind == "data" and e.name not in ("digest", "path")]
    yield from map(str, set_by)
    if not set_by and difference.positions:
        yield f"batch: {_tensor_text(difference)}"
    elif not set_by:
        yield f"batch: {name} {_tensor_text(difference, (one, other))}"


def _cells_text(difference: TensorDifference, found: OperationDifference) -> str:
    """Return which numbers of the data differ: the only one with its values, or their rows."""
    rows = {place: row for place, row, _ in found.rows}
    where = "" if found.rows_of in ("the batch", "the data") else f", rows of {found.rows_of}"
    if difference.elements == 1:
        (place, *rest), values = difference.positions[0], difference.values[0]
        cell = [rows[place], *rest]
        return f"{difference.name}{cell} {_numbers_text(values)}{where}"
    named = ", ".join(map(str, [*rows.values()][:MOST_ROWS]))
    more = f" and {len(rows) - MOST_ROWS:,} more" if len(rows) > MOST_ROWS else ""
    count = f"{difference.elements:,} numbers of {difference.name}"
    return f"{count} in row{'s' * (len(rows) > 1)} {named}{more}{where}"


def of_state(name: str, evidence: Evidence) -> Iterator[str]:
    """Yield how a tensor of the state differs, and since when."""
    number = evidence.steps[0].number
    pair = evidence.around[0].before.get(name), evidence.around[1].before.get(name)
    first = [state.named().get(name) for state in evidence.first_states]
    since = number - 1
    if first[0] is not None and first[1] is not None and not same_bits(first[0], first[1]):
        pair, since = (first[0], first[1]), 0
        seeds = [e for e in evidence.settings if e.kind == "seed" and evidence.is_seeded]
        if seeds:
            yield from map(str, seeds)
            return
    if pair[0] is None:
        return
    if pair[1] is not None and same_bits(pair[0], pair[1]):
        return
    changed = [
        run for run, each in zip(evidence.names, evidence.around, strict=True) if name in each.changed
    ]
    where = f"; changed outside of a step, after step {since:,}, in {' and '.join(changed)}"
    by = where if changed and since else ""
    difference = tensor_difference(name_in_words(name), pair[0], pair[1])
    if difference.elements == 1 and difference.positions:
        position, values = difference.positions[0], difference.values[0]
        place = str(list(position)) if position else ""
        yield f"{difference.name}{place} of state {since:,}: {_numbers_text(values)}{by}"
    else:
        text = _tensor_text(difference._replace(name=""), pair)
        yield f"{difference.name} of state {since:,}: {text}{by}"


def of_outside(found: TensorDifference, evidence: Evidence) -> Iterator[str]:
    """Yield how a tensor differs that neither the batch, the state nor an operation has."""
    sources = evidence.sources[0]
    source = sources.of(found.name)
    if source.made_by is None and not sources.knows(source):
        made = "it was made before, or by code that no program records, such as NumPy"
        noted = f" ({', '.join(evidence.unseen)})" if evidence.unseen else ""
        yield f"{sources.text(source)}: {_tensor_text(found._replace(name=''))}; {made}{noted}"


def of_draw(evidence: Evidence) -> Iterator[str]:
    """Yield why other random numbers are drawn, if the generators differ."""
    one, other = (each.generators for each in evidence.around)
    names = dict.fromkeys(n for n in (*one, *other) if n not in ("python", "numpy"))
    differing = [n for n in names if n not in one or n not in other or not same_bits(one[n], other[n])]
    if not differing:
        return
    seeds = [each for each in evidence.settings if each.kind == "seed"]
    if seeds:
        yield "another random draw: seed {} | {}".format(*seeds[0].values)
        return
    number = evidence.steps[0].number
    if any(name.startswith("generator/") for name in differing):  # before one of the step's draws
        yield f"another random draw: torch's generator was set to a different state by step {number:,}"
        return
    first = [state.rest.get("generator/torch") for state in evidence.first_states]
    is_first = first[0] is not None and first[1] is not None and not same_bits(first[0], first[1])
    since = 0 if is_first else number - 1
    yield f"another random draw: torch's generator differs in state {since:,}"


def _numbers_text(values: tuple[float, float]) -> str:
    return " | ".join(shortest(v) if isinstance(v, float) else str(v) for v in values)


def _tensor_text(difference: TensorDifference, pair: tuple[Tensor | None, ...] = ()) -> str:
    if not difference.positions:
        if len(pair) == 2 and pair[0] is not None and pair[1] is not None:
            one, other = (f"{tuple(t.shape)} {t.dtype}".replace("torch.", "") for t in pair)  # type: ignore[union-attr]
            return f"{one} | {other}"
        return f"{difference.name} of another shape or dtype"
    of = f" of {difference.name}" if difference.name else ""
    size = str(difference.size)
    return f"{difference.elements:,} of {difference.of:,} numbers{of}{f', {size}' if size else ''}"
