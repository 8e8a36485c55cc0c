"""Time every peer on every workload, alternating in one process, and print one table.

`python -m benchmarks --write docs/benchmarks.md` writes it as a page too, and keeps what stands below it
there. Peers that are not installed are skipped and named; `pip install -e ".[bench]"` installs them all.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from everystep import numerics

numerics.prepare()  # before torch computes, so that all peers run under the same numerics

from benchmarks import machine, table  # noqa: E402
from benchmarks.floors import peak_flops  # noqa: E402
from benchmarks.peers import PEERS, PLAIN, Peer  # noqa: E402
from benchmarks.timing import Outcome, time_workload  # noqa: E402
from benchmarks.workloads import WORKLOADS, Workload  # noqa: E402

END = "<!-- end of python -m benchmarks -->"


def main() -> int:
    """Print the machine, a table of each workload, and the footnotes; 1 if a peer failed."""
    arguments = _arguments()
    date = datetime.datetime.now().astimezone()
    # Ratios are to the plain loop, so it always runs.
    chosen = [peer for peer in PEERS if peer is PLAIN or peer.key in arguments.peers]
    peers = [peer for peer in chosen if not peer.missing]
    workloads = [workload for workload in WORKLOADS if workload.key in arguments.workloads]
    peak = peak_flops()
    facts = machine.describe(peers, peak)
    print("\n".join(f"{name:<16}{value}" for name, value in facts.items()))
    results = table.Results(
        machine=facts,
        command=shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        date=f"{date:%Y-%m-%d %H:%M %Z}",
        rounds=arguments.rounds,
        peak=peak,
        outcomes=_time(workloads, peers, arguments.rounds, peak),
        skipped={peer.name: " and ".join(peer.missing) for peer in chosen if peer.missing},
    )
    print("\n".join(table.footnotes(results)))
    if arguments.write is not None:
        page = arguments.write
        below = page.read_text(encoding="utf-8").partition(END)[2] if page.exists() else "\n"
        page.write_text(f"{table.page(results)}\n{END}{below}", encoding="utf-8")
    return int(any(outcome.failed for outcomes in results.outcomes.values() for outcome in outcomes))


def _time(
    workloads: Sequence[Workload], peers: Sequence[Peer], rounds: int, peak: float
) -> dict[Workload, list[Outcome]]:
    """Return the outcomes of each workload, and print its table as soon as it is done."""
    print()
    outcomes = {}
    for workload in workloads:
        outcomes[workload] = time_workload(workload, peers, rounds)
        print(table.text(workload, outcomes[workload], peak), flush=True)
    return outcomes


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    peers, workloads = [peer.key for peer in PEERS], [workload.key for workload in WORKLOADS]
    parser.add_argument(
        "--rounds", type=_rounds, default=10, help="how often each peer runs (default 10)"
    )
    for name, keys in [("--workloads", workloads), ("--peers", peers)]:
        what = f"of {', '.join(keys)} (default: all)"
        parser.add_argument(name, type=_keys(keys), default=keys, metavar="A,B", help=what)
    parser.add_argument("--write", type=_page, metavar="PAGE.md", help="write the page in Markdown too")
    return parser.parse_args()


def _rounds(text: str) -> int:
    rounds = int(text)
    if rounds < 2:
        raise argparse.ArgumentTypeError("quartiles need at least 2 rounds")
    return rounds


def _page(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():  # found out before the rounds, not after them
        raise argparse.ArgumentTypeError(f"there is no directory {path.parent}")
    return path


def _keys(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        keys = text.split(",")
        if unknown := [key for key in keys if key not in known]:
            message = f"{', '.join(unknown)}: not among {', '.join(known)}"
            raise argparse.ArgumentTypeError(message)
        return keys

    return parse


if __name__ == "__main__":
    sys.exit(main())
