"""Recorded loops do what they do without everystep, and every step of them opens again without them."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.training.by_hand import bits
from tests.training.loops import LOOPS, unrecorded
from torch import nn

import everystep

STEPS = 120

#: Runs in a process of its own, which knows nothing of the loop: verifies, and opens steps.
REPLAY = """
import json, sys
import everystep
found = {}
for directory in sys.argv[1:]:
    run = everystep.open(directory)
    verified = run.verify(processes=1, progress=False)
    last = len(run)
    steps = [run[number] for number in (last, 2, last // 2, 1)]
    found[directory] = {
        "exact": verified.is_exact,
        "text": str(verified),
        "losses": [[step.number, step.loss, step.is_exact] for step in steps],
        "operations": [len(step.operations) for step in steps],
    }
print(json.dumps(found))
"""


def seeded():
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Each loop, by itself and recorded; and what another process makes of the runs."""
    place = tmp_path_factory.mktemp("loops")
    found = {}
    for name, loop in LOOPS.items():
        seeded()
        expected = loop(STEPS, unrecorded)

        def record(name=name, **parts):
            return everystep.record(run=place / name, **parts)

        seeded()
        found[name] = expected, loop(STEPS, record), everystep.open(place / name)
    directories = [str(run.directory) for *_, run in found.values()]
    output = subprocess.run(
        [sys.executable, "-c", REPLAY, *directories],
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
    )
    assert output.returncode == 0, output.stderr
    replayed = {Path(n).name: each for n, each in json.loads(output.stdout).items()}
    return {name: (*each, replayed[name]) for name, each in found.items()}


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_does_the_same_recorded(recorded, name):
    (losses, states), (losses_recorded, states_recorded), run, _ = recorded[name]
    assert losses_recorded == losses
    for one, two in zip(states, states_recorded, strict=True):
        assert {n: bits(t) for n, t in one.items()} == {n: bits(t) for n, t in two.items()}
    assert run.losses["loss"].to_list() == losses
    assert run.status == "finished"


@pytest.mark.parametrize("name", LOOPS)
def test_every_step_of_a_loop_opens_again_without_it(recorded, name):
    (losses, _), _, run, replayed = recorded[name]
    assert replayed["exact"], replayed["text"]
    for number, loss, is_exact in replayed["losses"]:
        assert is_exact
        assert loss == losses[number - 1]
    assert min(replayed["operations"]) > 5
