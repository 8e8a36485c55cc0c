"""The memory plan: live tensors do not overlap, and it takes no more memory than needed."""

from hypothesis import given
from hypothesis import strategies as st

from everystep.program.memory import ALIGNMENT, plan_memory
from everystep.program.program import Operation, Program, Storage, TensorSpec


@st.composite
def programs(draw):
    """A chain of sums, each of results before it: other lifetimes and sizes each time."""
    count = draw(st.integers(1, 12))
    sizes = [draw(st.integers(0, 70)) for _ in range(count)]
    names = [f"sum_{number}" for number in range(count)]
    operations = []
    for number, name in enumerate(names):
        read = draw(st.sampled_from(["x", *names[:number]]))
        operation = Operation(
            phase="forward", operator="aten.sum.default", arguments=(read,), results=(name,)
        )
        operations.append(operation)
    specs = {name: TensorSpec(storage=name, dtype="float32", shape=(), stride=()) for name in names}
    storages = {
        name: Storage(kind="temporary", bytes=4 + size) for name, size in zip(names, sizes, strict=True)
    }
    return Program(
        torch="2",
        storages=storages | {"x": Storage(kind="input", bytes=4)},
        tensors=specs | {"x": TensorSpec(storage="x", dtype="float32", shape=(), stride=())},
        operations=tuple(operations),
        loss=names[-1],
    )


def lives(program):
    """Return the first and the last operation that has to do with each storage."""
    found = {}
    for index, operation in enumerate(program.operations):
        for name in (*operation.reads(), *operation.results):
            first, _ = found.get(name, (index, index))
            found[name] = (first, index)
    return found


def aligned(size):
    return -(-size // ALIGNMENT) * ALIGNMENT


@given(programs())
def test_what_lives_at_once_lies_apart(program):
    names = program.of_kind("temporary")
    plan = plan_memory(program, names)
    assert plan.offsets.keys() == set(names)
    alive = lives(program)
    places = {n: (plan.offsets[n], plan.offsets[n] + program.storages[n].bytes) for n in names}
    for name in names:
        start, end = places[name]
        assert start % ALIGNMENT == 0
        assert 0 <= start <= end <= plan.size
        for other in names:
            at_once = alive[name][0] <= alive[other][1] and alive[other][0] <= alive[name][1]
            if other != name and at_once:
                assert end <= places[other][0] or places[other][1] <= start


@given(programs())
def test_it_takes_no_more_than_all_together_and_no_less_than_at_once(program):
    names = program.of_kind("temporary")
    sizes = {name: aligned(program.storages[name].bytes) for name in names}
    alive = lives(program)
    at_once = [
        sum(sizes[name] for name in names if alive[name][0] <= index <= alive[name][1])
        for index in range(len(program.operations))
    ]
    assert max(at_once) <= plan_memory(program, names).size <= sum(sizes.values())


@given(programs(), st.data())
def test_only_what_is_asked_for_is_laid_out(program, data):
    names = data.draw(st.lists(st.sampled_from(program.of_kind("temporary")), unique=True))
    assert plan_memory(program, names).offsets.keys() == set(names)
