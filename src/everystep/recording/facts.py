"""Facts: everything known about a run except its numbers per step.

One model writes and reads them. Each field is a row of the table `facts`; the format version of a run is
that of the model, too. A database may come from an untrusted source, so reading checks every fact.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import from_json, to_json, to_jsonable_python

from everystep.bounded import MOST_STEPS
from everystep.errors import RunError, UsageError
from everystep.numerics import Numerics
from everystep.step.hyperparameters import is_hyperparameter

if TYPE_CHECKING:
    from torch import Tensor

    from everystep.experiment.data import Numbering

__all__ = [
    "EAGERLY",
    "LARGEST_CONFIG",
    "LONGEST_NAME",
    "LONGEST_NOTE",
    "LONGEST_TAG",
    "MOST_NAMES",
    "MOST_RANKS",
    "MOST_TAGS",
    "BatchFacts",
    "DataFacts",
    "DataFileFacts",
    "Described",
    "EarlierFacts",
    "EngineFacts",
    "Facts",
    "ForkFacts",
    "LoopFacts",
    "LossFacts",
    "MeasuredFacts",
    "ModuleFacts",
    "NotKeptFacts",
    "OptimizerFacts",
    "RanksFacts",
    "ResumeFacts",
    "SchedulerFacts",
    "TrainingFacts",
    "WriterFacts",
    "check_measurement_names",
    "read_facts",
    "rows_of",
]

#: Characters of a measurement's name, and how many measurements a run may have.
LONGEST_NAME, MOST_NAMES = 10_000, 10_000
#: Characters of a note.
LONGEST_NOTE = 1000
#: Tags of a run, and characters of one; bytes of a config.
MOST_TAGS, LONGEST_TAG, LARGEST_CONFIG = 100, 100, 1_000_000
#: Files of programs of a run: each process that continues it writes few.
MOST_PROGRAM_FILES = 100_000
#: Processes that train together.
MOST_RANKS = 4096
Tag = Annotated[str, Field(min_length=1, max_length=LONGEST_TAG)]
#: Of several optimizers, the name of each is before it; `[1]` is the second param group.
_LEARNING_RATE = re.compile(r"(?:(\w+)\.)?lr(?:\[\d+\])?")
#: A seed has 64 bits.
Whole = Annotated[int, Field(gt=-(2**64), lt=2**64)]
#: Plain values by name, as in JSON; a value that JSON cannot hold is described as text.
Settings = dict[str, Any]


#: Every time zone can show it.
Time = Annotated[
    AwareDatetime, Field(ge=datetime(1970, 1, 1, tzinfo=UTC), lt=datetime(9001, 1, 1, tzinfo=UTC))
]


class _Fact(BaseModel):
    """Frozen, and of exact types; a later everystep may add fields."""

    # A stranger's `"yes"` must not become True, nor `"3"` a number.
    model_config = ConfigDict(frozen=True, strict=True, ser_json_inf_nan="constants")


class DataFacts(_Fact):
    """The data: its source and size. An experiment's settings of it are further fields.

    x, y: shapes; rows: to train on; lazy: a Dataset was read at every step, and its rows are unknown;
    of_recorded_steps: it was, and these are the rows that it gave, which may differ in later steps;
    validation_digest: of the x and the y that were given for validation (XXH3, 128 bits each);
    split_seed, dropped: how rows are numbered, see `Numbering`.
    """

    model_config = ConfigDict(extra="allow")

    source: str
    rows: Whole
    name: str | None = None
    path: str | None = None
    x: tuple[Whole, ...] | None = None
    y: tuple[Whole, ...] | None = None
    validation_rows: Whole | None = None
    validation_digest: str | None = None
    lazy: bool = False
    of_recorded_steps: bool = False
    split_seed: Whole | None = None
    dropped: tuple[Whole, ...] = ()

    @property
    def numbering(self) -> Numbering:
        """How rows are numbered."""
        from everystep.experiment.data import Numbering  # imports torch

        return Numbering(self.split_seed, self.dropped)

    @property
    def file(self) -> str | None:
        """The name of the file that the rows are of, if it is one."""
        return None if self.path is None else PurePath(self.path).name

    def numbers(self) -> tuple[Tensor, Tensor] | None:
        """Return the numbers of the rows to train on, and of those held out; see `Numbering`.

        Raises:
            RunError: there are no such numbers.
        """
        try:
            return self.numbering.numbers(self.rows, self.validation_rows or 0)
        except (RuntimeError, IndexError):
            raise RunError("the numbers of rows do not fit: the database was changed") from None


class DataFileFacts(_Fact):
    """The file of the data: its name, whether it contains the data, its size and its SHA-256.

    strides: of tensors that were not contiguous. sources: the digests (XXH3, 128 bits) of the files that
    the data stayed in, which the experiment names; `digest` is then of these.
    """

    file: str
    stored: bool
    bytes: Whole
    digest: str
    strides: dict[str, tuple[Whole, ...]] = {}
    sources: tuple[str, ...] = ()


class BatchFacts(_Fact):
    """The rule that decides which rows each step sees.

    batch_size: None if each step sees all; without: rows that are left out of their batches.
    """

    batch_size: Whole | None
    drop_last: bool
    seed: Whole
    steps_per_epoch: Whole
    without: tuple[Whole, ...] = ()


class _Described(_Fact):
    """What has a class and settings. is_torchs: whether the class is torch's own."""

    class_name: str
    settings: Settings = {}
    is_torchs: bool = False


class ModuleFacts(_Described):
    """A module: its class, and its arguments as torch's own modules print them.

    settings: its public attributes with plain values, and by the names of its own parameters and buffers
    their dtype, with `frozen` if they need no gradient, or None for a missing one; also the names of its
    hooks.
    """

    arguments: str = ""


class OptimizerFacts(_Fact):
    """An optimizer: its class, whether it is torch's own, and the settings of each param group."""

    class_name: str
    is_torchs: bool
    groups: tuple[Settings, ...]

    @property
    def settings(self) -> Settings:
        """The settings of all param groups: `lr` of the first, `lr[1]` of the second."""
        return {
            f"{key}[{place}]" if place else key: value
            for place, group in enumerate(self.groups)
            for key, value in group.items()
        }


class SchedulerFacts(_Described):
    """A scheduler. every: `step` or `epoch`; None if a user's loop decides."""

    every: str | None


class LossFacts(_Described):
    """A loss: its class (for a function, its name).

    settings: attributes that are not tensors; modules: by path, if the loss is a module.
    """

    modules: dict[str, ModuleFacts]


#: What has a class, and settings.
Described = ModuleFacts | LossFacts | OptimizerFacts | SchedulerFacts


class EngineFacts(_Fact):
    """How the steps ran: those of everystep's own, or of a step function that the user vouched for.

    asked: as requested; stands_behind: `known` (programs ran in place of torch's own Python), `vouched`
    (of the user's), or `alone` (without Python to compare with); programs: their numbers, those of steps
    that Python ran included; by_program: how many steps programs ran; checks: how often they were
    compared with Python, last at step `verified_to`; eager_from: the step from which on Python ran all;
    reason: for that, or why no program ran a step of the function; unseen: what no program can hold, as
    text; after: the last step before those of the function, 0 unless the run was resumed.
    """

    asked: str
    stands_behind: str
    programs: tuple[Whole, ...] = ()
    by_program: Whole
    checks: Whole
    verified_to: Whole
    eager_from: Whole | None = None
    reason: str | None
    unseen: tuple[str, ...] = ()
    after: Whole = 0


#: By default, Python ran the steps.
EAGERLY = EngineFacts(
    asked="auto", stands_behind="known", by_program=0, checks=0, verified_to=0, eager_from=1, reason=None
)


class LoopFacts(_Fact):
    """A user's loop: the class of each part, the number of programs, and what programs cannot hold.

    has_computed_batches: a module that it trains ran as a batch was drawn; function: how programs ran
    its step function, if the user vouched for that.
    """

    parts: dict[str, str]
    programs: Annotated[int, Field(ge=0, le=MOST_PROGRAM_FILES)]
    unseen: tuple[str, ...]
    has_loss: bool
    has_computed_batches: bool = False
    function: EngineFacts | None = None

    @classmethod
    def of(cls, parts: Mapping[str, Any]) -> LoopFacts:
        """Return the facts of a loop with these parts before its first step."""
        names = {name: type(part).__name__ for name, part in parts.items()}
        return cls(parts=names, programs=0, unseen=(), has_loss=False)


class RanksFacts(_Fact):
    """A process among those that train together (torch.distributed), and how they communicate.

    rank: its number, from 0; count: of all; backend: as torch names it.
    """

    rank: Annotated[int, Field(ge=0, lt=MOST_RANKS)]
    count: Annotated[int, Field(ge=2, le=MOST_RANKS)]
    backend: str


class TrainingFacts(_Fact):
    """How steps were trained: everything that stays the same between steps.

    modules: of the model, by path, each before its submodules; with several models, paths begin with the
    name of the model. parameters: the number of elements of all parameters. optimizers, schedulers: by
    name. loss: None in a user's loop. seed: None if torch's generator was not reseeded.
    preparation: what was done to the data, as in `experiment.preparation`.
    stop_on_nan: whether the first loss that is not finite ends the training.
    experiment_file: of the experiment, if it has another name than usual. ranks: None of one process.
    """

    device: str
    seed: Whole | None
    data: DataFacts
    batches: BatchFacts
    modules: dict[str, ModuleFacts]
    parameters: Whole
    loss: LossFacts | None
    optimizers: dict[str, OptimizerFacts]
    schedulers: dict[str, SchedulerFacts]
    max_grad_norm: float | None
    evaluate_every: Whole | None
    stop_on_nan: bool = False
    numerics: Numerics
    versions: dict[str, str]
    preparation: dict[str, Any] | None = None
    experiment_file: str | None = None
    data_file: DataFileFacts | None = None
    engine: EngineFacts | None = None
    loop: LoopFacts | None = None
    ranks: RanksFacts | None = None

    @field_validator("data_file")
    @classmethod
    def _has_rows(cls, file: DataFileFacts | None, info: ValidationInfo) -> DataFileFacts | None:
        # The order of billions of rows that no data has would take all memory, and minutes. The files
        # that data stayed in may be compressed.
        data = info.data.get("data")
        if file is None or file.sources or data is None:
            return file
        if data.rows + (data.validation_rows or 0) > file.bytes:
            raise ValueError("more rows than bytes")
        return file

    @property
    def has_validation(self) -> bool:
        """Whether rows that were not trained on were measured."""
        if self.data.lazy or self.data.of_recorded_steps:
            # Those of a Dataset come with the objects: nothing else could be measured.
            return self.evaluate_every is not None
        return self.data.validation_rows is not None

    @property
    def processes(self) -> int:
        """How many processes trained together."""
        return 1 if self.ranks is None else self.ranks.count

    @property
    def programs(self) -> Sequence[int]:
        """The numbers of the programs of the steps."""
        if self.loop is not None:
            return range(1, self.loop.programs + 1)
        return () if self.engine is None else self.engine.programs

    @property
    def unseen(self) -> tuple[str, ...]:
        """What no program can hold of the steps, as text."""
        taken = self.loop or self.engine
        return () if taken is None else taken.unseen

    @property
    def has_loss(self) -> bool:
        """Whether losses are recorded: a user's loop may log none."""
        return self.loop is None or self.loop.has_loss

    def is_learning_rate(self, measurement: str) -> bool:
        """Return whether a measurement is a learning rate of an optimizer, by its name."""
        found = _LEARNING_RATE.fullmatch(measurement)
        # An only optimizer has no name in `lr`: its owner is None.
        owners = self.optimizers if len(self.optimizers) > 1 else [None] * len(self.optimizers)
        return found is not None and found[1] in owners

    def is_setting(self, measurement: str) -> bool:
        """Return whether a measurement is recorded where it changes, and holds until the next change.

        Of everystep's own steps, these are the settings of the optimizer; of a loop, the learning rates:
        what it logs belongs to its step.
        """
        if self.loop is None:
            return is_hyperparameter(measurement)
        return self.is_learning_rate(measurement)


class EarlierFacts(_Fact):
    """How earlier steps, up to `last`, were trained: those of a parent, or before a resume."""

    last: Whole
    training: TrainingFacts


class ForkFacts(_Fact):
    """Where a fork starts: after step `at` of its parent, and its changes."""

    parent: str
    directory: str
    at: Whole
    changed: Settings


class ResumeFacts(_Fact):
    """Where a training that ended early continued: after step `at`, on the steps recorded before.

    began: when; seconds: how long the training had taken before, None if unknown; changed: accepted
    changes, as `name: before | now`.
    """

    at: Whole
    began: Time
    seconds: float | None
    changed: tuple[str, ...] = ()


class WriterFacts(_Fact):
    """The process that last wrote the run: its number, its host, and since when."""

    process: Whole
    host: str
    since: Time


class NotKeptFacts(_Fact):
    """Steps `first` to `last`, which do not open: the recording was asked to `keep` others."""

    first: Whole
    last: Whole
    keep: str


class MeasuredFacts(_Fact):
    """A measurement made in hindsight."""

    expression: str
    every: Whole


class Facts(_Fact):
    """All facts of a run; a new run has only a few.

    status: as the writer left it; "running" without the writer's lock means that it was killed. steps:
    planned; nonfinite_step: the first with a loss that is not finite; loss_dtype: of the losses;
    batches_lost_to: the last step with dropped inputs; keep: which steps the recording was asked to
    keep; not_kept: the others, taken or not; config, tags: those that the user gave; measured: in
    hindsight, by name; note: of the user, in one line; earlier: facts of the steps of a fork's parent,
    and of those before each resume, in the order of the steps; resumed: each time; writer: the process
    that last wrote; trained: see `training`.
    """

    name: str | None = None
    status: str = "running"
    reason: str | None = None
    started: Time | None = None
    finished: Time | None = None
    seconds: float | None = None
    steps: Annotated[int, Field(ge=0, le=MOST_STEPS)] | None = None
    loss_dtype: Literal["float16", "bfloat16", "float32", "float64"] = "float32"
    nonfinite_step: Whole | None = None
    batches_lost_to: Whole | None = None
    keep: str | None = None
    not_kept: tuple[NotKeptFacts, ...] = ()
    config: Settings = {}
    tags: Annotated[tuple[Tag, ...], Field(max_length=MOST_TAGS)] = ()
    measured: dict[str, MeasuredFacts] = {}
    note: Annotated[str, Field(max_length=LONGEST_NOTE)] | None = None
    fork: ForkFacts | None = None
    earlier: tuple[EarlierFacts, ...] = ()
    resumed: tuple[ResumeFacts, ...] = ()
    writer: WriterFacts | None = None
    trained: TrainingFacts | None = None

    @property
    def training(self) -> TrainingFacts:
        """How the newest steps were trained.

        Raises:
            RunError: the run has no record of it.
        """
        if self.trained is None:
            raise RunError(
                "the run has no record of how it was trained: it stopped before training started, or "
                "its database is damaged; everystep doctor reports which"
            )
        return self.trained

    @property
    def begins(self) -> set[int]:
        """The states with which the steps after them begin: on disk, whatever the budget."""
        firsts = {each.first for each in self.not_kept}
        # The state before a window; a range that another one follows directly leads to none.
        windows = {each.last for each in self.not_kept if each.last + 1 not in firsts}
        return {0, *(each.last for each in self.earlier), *windows}

    def up_to(self, step: int) -> dict[str, Any]:
        """Return what is known of single steps, by name, of a run that ends with this step."""
        first = None if (self.nonfinite_step or 0) > step else self.nonfinite_step
        lost = None if self.batches_lost_to is None else min(self.batches_lost_to, step)
        return {"nonfinite_step": first, "batches_lost_to": lost}

    def kept(self, last: int) -> list[tuple[int, int]]:
        """Return the ranges of the steps up to `last` that are kept."""
        found, begin = [], 1
        for each in sorted(self.not_kept, key=lambda each: each.first):
            # What lies before each range that is not kept; the last one follows below.
            found.append((begin, min(each.first - 1, last)))
            begin = max(begin, each.last + 1)
        return [(one, two) for one, two in (*found, (begin, last)) if one <= two]

    def kept_with(self, other: Facts, last: int) -> list[tuple[int, int]]:
        """Return the ranges of the steps up to `last` that two runs keep."""
        return Facts(not_kept=(*self.not_kept, *other.not_kept)).kept(last)

    def training_of(self, step: int) -> TrainingFacts:
        """How a step was trained: one before a fork began by the rules of its parent.

        Raises:
            RunError: as `training`.
        """
        earlier = (each.training for each in self.earlier if step <= each.last)
        return next(earlier, None) or self.training

    @property
    def has_loss(self) -> bool:
        """Whether losses are recorded, as far as is known."""
        return self.trained is None or self.trained.has_loss

    def is_setting(self, measurement: str) -> bool:
        """Return what `TrainingFacts.is_setting` does, as far as is known."""
        return self.trained is not None and self.trained.is_setting(measurement)

    def rows(self) -> dict[str, Any]:
        """Return the known facts, each as a row of the database."""
        known = {name: value for name, value in self if name in self.model_fields_set}
        # Its facts are rows of their own, next to those of the run.
        known.pop("trained", None)
        trained = self.trained.model_fields_set if self.trained else ()
        return known | {name: value for name, value in self.trained or () if name in trained}


_OF_RUN = Facts.model_fields.keys() - {"trained"}
_OF_TRAINING = TrainingFacts.model_fields.keys()
#: These are written together, before the first step.
_FROM_THE_BEGINNING = {name for name, field in TrainingFacts.model_fields.items() if field.is_required()}


def rows_of(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return facts by name as rows of the database; halves of surrogate pairs become question marks."""
    assert facts.keys() <= _OF_RUN | _OF_TRAINING
    texts = {
        key: json.dumps(to_jsonable_python(fact, inf_nan_mode="constants"), ensure_ascii=False)
        for key, fact in facts.items()
    }
    # Such a half can be in the name of a file; SQLite takes only valid UTF-8.
    return [(key, text.encode("utf-8", "replace").decode()) for key, text in texts.items()]


def read_facts(rows: Iterable[tuple[Any, Any]], path: Path) -> Facts:
    """Return facts from the rows of a run's database; those of a later everystep are left out.

    Raises:
        RunError: one is not what everystep writes, so that the database was changed.
    """
    key: Any = None
    known: dict[Any, Any] = {}
    try:
        for key, text in rows:
            known[key] = from_json(text)
        own = {key: known[key] for key in known if key in _OF_RUN}
        # A run that is just being created has only a few facts, none of its training.
        if known.keys() >= _FROM_THE_BEGINNING:
            own["trained"] = {key: known[key] for key in known if key in _OF_TRAINING}
        # As JSON: only from there do exact types accept a list for a tuple, and a text for a time.
        return Facts.model_validate_json(to_json(own, inf_nan_mode="constants"))
    except ValidationError as error:
        place = error.errors(include_input=False)[0]["loc"]
        # A fact of the training is a row of its own, so the message names that.
        key = place[1] if place[0] == "trained" else place[0]
    except (TypeError, ValueError):
        pass
    raise RunError(f"{path} has an invalid value for {str(key)[:80]!r}: the database was changed")


def check_measurement_names(names: Collection[str]) -> None:
    """Check that a run can hold measurements of all these names.

    Raises:
        UsageError: one is not a text, or too long, or there are too many.
    """
    for name in names:
        if not isinstance(name, str) or name.encode("utf-8", "replace").decode() != name:
            raise UsageError(f"{name!r:.80} is not the name of a measurement; use a text")
        if len(name) > LONGEST_NAME:
            raise UsageError(
                f"the name {name[:40]!r}... of a measurement has {len(name):,} characters, and a run "
                f"holds names of up to {LONGEST_NAME:,}; choose a shorter one"
            )
    if len(names) > MOST_NAMES:
        raise UsageError(
            f"these are {len(names):,} measurements, and a run holds {MOST_NAMES:,}; log fewer names, "
            "such as the norm or the mean of many numbers"
        )
