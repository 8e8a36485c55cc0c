"""Facts: what is known of a run besides its numbers by step.

One model, through which they are written and read. Each field is a row of the table `facts`; the version
of a run's format is that of the model, too. A stranger may have written the database, so every fact that
is read is checked.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field

from everystep.errors import RunError
from everystep.numerics import Numerics

__all__ = [
    "EAGERLY",
    "BatchFacts",
    "DataFacts",
    "DataFileFacts",
    "EarlierFacts",
    "EngineFacts",
    "Facts",
    "ForkFacts",
    "FunctionFacts",
    "LoopFacts",
    "LossFacts",
    "MeasuredFacts",
    "ModuleFacts",
    "OptimizerFacts",
    "ProgramFacts",
    "ScheduleFacts",
    "TrainingFacts",
]

#: A seed has 64 bits.
Whole = Annotated[int, Field(gt=-(2**64), lt=2**64)]
#: Plain values by name, as JSON holds them; what it cannot hold is a description.
Settings = dict[str, Any]


def _in_range(time: AwareDatetime) -> AwareDatetime:
    if not 1970 <= time.year <= 9000:  # every time zone can show it
        raise ValueError("the year is out of range")
    return time


Time = Annotated[AwareDatetime, AfterValidator(_in_range)]


class _Fact(BaseModel):
    """Frozen, and of exact types; a later everystep may add fields."""

    model_config = ConfigDict(frozen=True, strict=True)


class DataFacts(_Fact):
    """The data: where it is from, and its size. An experiment's settings of it are further fields.

    x, y: shapes; rows: to train on; lazy: a Dataset was read at every step, and its rows are not known.
    """

    model_config = ConfigDict(extra="allow")

    source: str
    rows: Whole
    name: str | None = None
    path: str | None = None
    x: tuple[Whole, ...] | None = None
    y: tuple[Whole, ...] | None = None
    validation_rows: Whole | None = None
    lazy: bool = False


class DataFileFacts(_Fact):
    """The file of the data: its name, whether the data is in it, its size and its SHA-256.

    strides: of tensors that lay otherwise than row after row.
    """

    file: str
    stored: bool
    bytes: Whole
    digest: str
    strides: dict[str, tuple[Whole, ...]] = {}


class BatchFacts(_Fact):
    """The rule that says which rows each step saw. batch_size: None where each step saw all."""

    batch_size: Whole | None
    drop_last: bool
    seed: Whole
    steps_per_epoch: Whole


class ModuleFacts(_Fact):
    """A module: its class, and its arguments as torch's own modules print them."""

    class_name: str
    arguments: str = ""


class OptimizerFacts(_Fact):
    """An optimizer: its class, whether that is torch's own, and the settings of each param group."""

    class_name: str
    is_torchs: bool
    groups: tuple[Settings, ...]


class ScheduleFacts(_Fact):
    """A schedule: its class, whether that is torch's own, and its settings.

    every: `step` or `epoch`; None where a loop of the user's own decides.
    """

    class_name: str
    is_torchs: bool
    settings: Settings
    every: str | None


class LossFacts(_Fact):
    """A loss: its class (of a function, its name), whether that is torch's own, and its settings.

    settings: attributes that are not tensors; modules: by path, where the loss is a module.
    """

    class_name: str
    is_torchs: bool
    settings: Settings
    modules: dict[str, ModuleFacts]


class ProgramFacts(_Fact):
    """A program's file, and which steps it takes: `first`, `later` or `every`, from `since` on."""

    file: str
    steps: Literal["first", "later", "every"]
    since: Whole


class EngineFacts(_Fact):
    """How the steps were taken.

    asked, fold: what was asked for; folded: whether loss and update are folded into the program;
    stands_behind: `proven` or `vouched`; live_optimizer: the class of an optimizer that ran as Python at
    every step; checks: how often programs were compared with Python, last at step `verified_to`;
    eager_from: the first step that Python took, for that `reason`.
    """

    asked: str
    fold: bool
    folded: bool
    stands_behind: str
    live_optimizer: str | None
    programs: tuple[ProgramFacts, ...]
    checks: Whole
    verified_to: Whole
    eager_from: Whole | None
    reason: str | None


#: Where a run says nothing else, Python took the steps.
EAGERLY = EngineFacts(
    asked="auto",
    fold=False,
    folded=False,
    stands_behind="proven",
    live_optimizer=None,
    programs=(),
    checks=0,
    verified_to=0,
    eager_from=1,
    reason=None,
)


class FunctionFacts(_Fact):
    """How the steps of a function of the user's own were taken.

    by_program: how many a program took; checks: how often programs were compared with Python, last at
    step `verified_to`; reason: why Python took the others, None where it only did to compare.
    """

    by_program: Whole
    checks: Whole
    verified_to: Whole
    reason: str | None


class LoopFacts(_Fact):
    """A loop of the user's own: the class of each part, how many programs, what no program holds.

    function: where its step is a function, how that was taken.
    """

    parts: dict[str, str]
    programs: Whole
    unseen: tuple[str, ...]
    has_loss: bool
    function: FunctionFacts | None = None


class TrainingFacts(_Fact):
    """How steps were trained: all that is the same from one step to the next.

    modules: of the model, by path, each before those within it; of several models, those of each begin
    with its name. parameters: how many numbers the models have. optimizers, schedules: by name.
    loss: None in a loop of the user's own. seed: None where torch's generator was taken as it was.
    preparation: what was done to the data, as `experiment.preparation` says it.
    experiment_file, experiment_digest: the file of the experiment, and its SHA-256.
    """

    device: str
    seed: Whole | None
    data: DataFacts
    batches: BatchFacts
    modules: dict[str, ModuleFacts]
    parameters: Whole
    loss: LossFacts | None
    optimizers: dict[str, OptimizerFacts]
    schedules: dict[str, ScheduleFacts]
    clip_norm: float | None
    evaluate_every: Whole | None
    numerics: Numerics
    versions: dict[str, str]
    preparation: dict[str, Any] | None = None
    experiment_file: str | None = None
    experiment_digest: str | None = None
    data_file: DataFileFacts | None = None
    engine: EngineFacts | None = None
    loop: LoopFacts | None = None


class EarlierFacts(_Fact):
    """How the steps of a fork's parent up to `last` were trained."""

    last: Whole
    training: TrainingFacts


class ForkFacts(_Fact):
    """Where a fork begins: after step `at` of its parent, with what changed."""

    parent: str
    directory: str
    at: Whole
    changed: Settings


class MeasuredFacts(_Fact):
    """What was measured in hindsight."""

    expression: str
    every: Whole


class Facts(_Fact):
    """All facts of a run; one that has just begun has but few.

    steps: planned; nonfinite_step: the first whose loss is not finite; loss_dtype: that of the losses;
    batches_lost_to: the last step with inputs that were given up for room; measured: in hindsight, by
    name; earlier: of a fork, in the order of the steps; trained: see `training`.
    """

    name: str | None = None
    status: str = "interrupted"
    reason: str | None = None
    started: Time | None = None
    finished: Time | None = None
    seconds: float | None = None
    steps: Whole | None = None
    loss_dtype: Literal["float16", "bfloat16", "float32", "float64"] = "float32"
    nonfinite_step: Whole | None = None
    batches_lost_to: Whole | None = None
    measured: dict[str, MeasuredFacts] = {}
    fork: ForkFacts | None = None
    earlier: tuple[EarlierFacts, ...] = ()
    trained: TrainingFacts | None = None

    @property
    def training(self) -> TrainingFacts:
        """How the newest steps were trained.

        Raises:
            RunError: the run does not say that.
        """
        if self.trained is None:
            raise RunError(
                "the run does not say how it was trained: it was stopped before it had begun, or its "
                "database was changed"
            )
        return self.trained

    def rows(self) -> dict[str, Any]:
        """Return the facts that are known, each as a row of the database."""
        known = {name: value for name, value in self if name in self.model_fields_set}
        known.pop("trained", None)
        trained = self.trained.model_fields_set if self.trained else ()
        return known | {name: value for name, value in self.trained or () if name in trained}
