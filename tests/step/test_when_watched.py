"""Memory: when a step that could be recognised is watched in full all the same."""

from everystep.step.recognition.memory import Memory


def watched(steps, recognized, in_full):
    """Return which of so many steps are watched, where each takes so many seconds."""
    memory, found = Memory(), []
    for step in range(1, steps + 1):
        is_watched = memory.is_watched(step)
        if is_watched:
            found.append(step)
        memory.timed(step, in_full if is_watched else recognized, is_recognized=not is_watched)
    return found


def test_quick_steps_are_watched_at_powers_of_two(checks_in_time):
    assert watched(300, recognized=0.002, in_full=0.01) == [1, 2, 4, 8, 16, 32, 64, 128, 256]


def test_slow_steps_are_watched_as_long_as_that_takes_a_hundredth_of_the_time(checks_in_time):
    # Half of the first is taken for its usual time, since no step has been recognised yet.
    assert watched(400, recognized=0.1, in_full=0.2) == [1, 129, 258]
    assert watched(300, recognized=0.1, in_full=0.12) == [1, 129, 258]
