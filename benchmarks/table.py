"""The one table, for the terminal and as a page in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.floors import flops_a_step
from benchmarks.peers import PLAIN, Peer
from benchmarks.timing import Outcome
from benchmarks.workloads import Workload

__all__ = ["Results", "footnotes", "page", "text"]

COLUMNS = ("peer", "median", "us/step", "ratio", "quartiles", "of peak", "first run", "losses")
HOW_TO_READ = """\
- **median**: seconds of one training, over the rounds, from the model and the data in memory to the
  losses as Python numbers. It excludes making data and parameters, importing and converting.
- **us/step**: the median divided by the number of steps, in microseconds.
- **ratio**: time divided by the plain loop's *in the same round*, the median over rounds; below 1 is
  faster than the plain loop.
- **quartiles**: of these ratios. For the plain loop, of its times divided by their median, which shows
  how quiet the machine was.
- **of peak**: the floating point operations of the matrix products and convolutions of a plain step,
  divided by the median time, as a share of the peak above. This peak is torch's; JAX and scikit-learn
  use other libraries and may exceed it.
- **first run**: seconds of the warm-up, which is not among the rounds and includes compilation.
- **losses**: `equal` means that every loss of every run equals the plain loop's bit for bit; otherwise
  the relative error of the last loss, in the worst of all runs."""


@dataclass(frozen=True)
class Results:
    """Everything that was measured, and what it was measured on."""

    machine: Mapping[str, str]
    command: str
    date: str
    rounds: int
    peak: float  # operations a second
    outcomes: Mapping[Workload, Sequence[Outcome]]
    skipped: Mapping[str, str]  # peers that are not in the table, and what they lack


def text(workload: Workload, outcomes: Sequence[Outcome], peak: float) -> str:
    """Return the table of a workload for the terminal."""
    plain = _plain(outcomes)
    rows = [_cells(workload, outcome, plain, peak) for outcome in outcomes]
    table = _markdown(COLUMNS, rows, numbers=range(1, len(COLUMNS) - 1))
    return "\n".join([f"{workload.name} ({_description(workload)})", *table, ""])


def footnotes(results: Results) -> list[str]:
    """Return what each peer has off and how it differs, and what is missing."""
    peers = {outcome.peer: None for outcomes in results.outcomes.values() for outcome in outcomes}
    notes = [f"{peer.name}: {peer.note}" for peer in peers]
    return notes + [
        f"{name}: skipped, for {what} is not installed" for name, what in results.skipped.items()
    ]


def page(results: Results) -> str:
    """Return the whole as Markdown: the machine, how to read it, the tables, the footnotes."""
    machine = [f"- {name}: {value}" for name, value in results.machine.items()]
    header = f"Made on {results.date} by `{results.command}`: {results.rounds} rounds of each peer, "
    sections = [
        "# Benchmarks",
        *_section("The machine", machine),
        header + "alternating in one process, every other round in the opposite order.",
        *_section("How to read it", HOW_TO_READ.splitlines()),
        *_section("What is trained", _workloads(results)),
        *_section("At a glance: the ratios", _glance(results)),
        *_section("Everything", _everything(results)),
        *_section("Footnotes", [f"- {note}" for note in footnotes(results)]),
    ]
    return "\n\n".join(sections) + "\n"


def _section(title: str, lines: Sequence[str]) -> tuple[str, str]:
    return f"## {title}", "\n".join(lines)


def _workloads(results: Results) -> list[str]:
    rows = [[workload.name, _description(workload)] for workload in results.outcomes]
    return _markdown(["workload", "what"], rows)


def _glance(results: Results) -> list[str]:
    peers: dict[Peer, list[str]] = {}
    for outcomes in results.outcomes.values():
        for outcome in outcomes:
            ratio = "" if outcome.absent else f"{_ratio(outcome, _plain(outcomes)):.3g}"
            peers.setdefault(outcome.peer, []).append(ratio)
    names = [workload.name for workload in results.outcomes]
    rows = [[peer.name, *ratios] for peer, ratios in peers.items()]
    return _markdown(["peer", *names], rows, numbers=range(1, len(names) + 1))


def _everything(results: Results) -> list[str]:
    rows = [
        [workload.name, *_cells(workload, outcome, _plain(outcomes), results.peak)]
        for workload, outcomes in results.outcomes.items()
        for outcome in outcomes
    ]
    return _markdown(["workload", *COLUMNS], rows, numbers=range(2, len(COLUMNS)))


def _cells(workload: Workload, outcome: Outcome, plain: Outcome, peak: float) -> list[str]:
    """Return the cells of `COLUMNS`."""
    if outcome.absent:
        return [outcome.peer.name, *["-"] * (len(COLUMNS) - 2), outcome.absent]
    spread = outcome.ratios(plain)
    if outcome is plain:
        spread = [seconds / plain.median for seconds in plain.seconds]
    lower, _, upper = statistics.quantiles(spread, n=4, method="inclusive")
    return [
        outcome.peer.name,
        f"{outcome.median:.3f}",
        f"{1e6 * outcome.median / workload.steps:.1f}",
        f"{_ratio(outcome, plain):.3f}",
        f"{lower:.3f} to {upper:.3f}",
        f"{flops_a_step(workload) * workload.steps / outcome.median / peak:.1%}",
        f"{outcome.first:.3f}",
        _losses(outcome),
    ]


def _losses(outcome: Outcome) -> str:
    agreement = outcome.agreement
    if agreement is None:
        return "none"
    if not agreement.differs:
        return "the reference" if outcome.peer is PLAIN else "equal"
    if agreement.relative == 0:
        return "last equal, others differ"
    what = "last epoch's mean" if agreement.means else "last"
    return f"{what} off by {agreement.relative:.0e}"


def _description(workload: Workload) -> str:
    rows = f"{workload.rows:,} rows"
    if workload.batch_size:
        rows += f" in shuffled batches of {workload.batch_size}"
    loss = "sum of squares" if workload.data == "random" else "cross entropy"
    update = f"{workload.update} at {workload.lr:g}"
    return (
        f"{rows} of {workload.data} data; {workload.network}; {loss}; {update}; {workload.steps:,} steps"
    )


def _plain(outcomes: Sequence[Outcome]) -> Outcome:
    return next(outcome for outcome in outcomes if outcome.peer is PLAIN)


def _ratio(outcome: Outcome, plain: Outcome) -> float:
    return statistics.median(outcome.ratios(plain))


def _markdown(
    heading: Sequence[str], rows: Sequence[Sequence[str]], numbers: range = range(0)
) -> list[str]:
    """Return a table; the columns of these `numbers` are aligned to the right."""
    dashes = ["--:" if column in numbers else "---" for column in range(len(heading))]
    escaped = [[cell.replace("|", r"\|").replace("\n", " ") for cell in row] for row in rows]
    return ["| " + " | ".join(cells) + " |" for cells in (heading, dashes, *escaped)]
