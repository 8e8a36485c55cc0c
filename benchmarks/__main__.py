"""Time every peer on every workload, alternating in one process, and print one table."""

from __future__ import annotations

import argparse
import statistics
import time

from everystep import numerics

numerics.prepare()  # before torch computes, so that all peers run under the same numerics

import torch  # noqa: E402

from benchmarks.peers import PEERS  # noqa: E402
from benchmarks.workloads import WORKLOADS, Workload  # noqa: E402


def main() -> None:
    """Print the machine, then a row for each workload and peer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=24, help="how often each peer runs (default 24)")
    rounds = parser.parse_args().rounds
    in_force = numerics.Numerics.read(torch.device("cpu"))
    print(f"{in_force.processor}, {in_force.threads} threads, {in_force.cpu_capability}, ", end="")
    print(f"torch {in_force.torch_version}, MKL {in_force.mkl_cbwr}; {rounds} rounds, alternating\n")
    columns = f"{'median':>10}{'fastest':>10}{'us/step':>10}{'ratio':>8}  {'quartiles':<12}  same losses"
    print(f"{'workload':<22}{'peer':<20}{columns}")
    for workload in WORKLOADS:
        _print_rows(workload, rounds)


def _print_rows(workload: Workload, rounds: int) -> None:
    """Ratios are medians over rounds of a peer's time to the plain loop's in the same round."""
    seconds: dict[str, list[float]] = {name: [] for name in PEERS}
    losses: dict[str, list[float]] = {}
    for name, peer in PEERS.items():
        losses[name] = list(peer(workload))  # warms up
    for round_number in range(rounds):
        # Every other round in the opposite order: being second must not be an advantage.
        for name in list(PEERS)[:: 1 if round_number % 2 else -1]:
            started = time.perf_counter()
            PEERS[name](workload)
            seconds[name].append(time.perf_counter() - started)
    reference = seconds["plain loop"]
    for name, times in seconds.items():
        ratios = [t / r for t, r in zip(times, reference, strict=True)]
        lower, ratio, upper = statistics.quantiles(ratios, n=4)
        same = "yes" if losses[name] == losses["plain loop"] else "no"
        median, fastest = statistics.median(times), min(times)
        print(
            f"{workload.name:<22}{name:<20}{median:>9.3f}s{fastest:>9.3f}s"
            f"{1e6 * median / workload.steps:>10.1f}{ratio:>8.3f}  {lower:.3f}-{upper:.3f}   {same}"
        )


if __name__ == "__main__":
    main()
