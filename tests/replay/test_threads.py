"""Several threads may ask one run, and others: each gets the answer that it would get alone."""

import random
from concurrent.futures import ThreadPoolExecutor

import torch

import everystep


def test_threads_open_the_steps_of_a_run_as_one_does():
    run, other = (everystep.train_experiment("wine", {"epochs": 4}, progress=False) for _ in range(2))
    alone = {step.number: step for step in everystep.open(run.name)}
    numbers = random.Random(0).choices([*alone], k=40)

    def ask(number):
        if number % 5 == 0:
            return other.verify(progress=False).is_exact
        step = (run if number % 2 else other)[number]
        return step.is_exact and torch.equal(
            step.gradients["0.weight"], alone[number].gradients["0.weight"]
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, numbers))
    assert not run.problems and not other.problems
