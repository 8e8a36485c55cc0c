"""Record: a loop that is not everystep's, recorded step by step while it runs as it would without."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from everystep import numerics
from everystep.errors import RecordingError, UsageError
from everystep.recording.recorder import Recorder, Taken, create_directory
from everystep.recording.run import RecordedRun
from everystep.step.build import NotCapturableError
from everystep.step.follow import Follower
from everystep.step.parts import Parts
from everystep.step.plain import BuiltPath, build_path
from everystep.step.state import State, copy_of
from everystep.step.watch import Contents, Watch, version_of
from everystep.step.watch import Path as StepPath
from everystep.training.batch import tensors_of, text_of
from everystep.training.facts import module_text, optimizer_text
from everystep.training.loop import circumstances, now

__all__ = ["Recording"]

#: What a run is opened as.
R = TypeVar("R", bound=RecordedRun)

#: Seconds between two times that what was recorded is handed to the writer.
FLUSH_SECONDS = 0.1
#: Steps that are timed before the snapshots' interval is chosen.
TIMED_STEPS = 8
#: Bytes of batches that may wait to be written, before the loop waits.
MOST_WAITING = 512_000_000
#: Paths that are remembered; a loop whose every step has another would fill the memory.
MOST_PATHS = 200
#: What is not seen is said so often; the rest is in the run's facts.
MOST_SAID = 3


class Recording(Generic[R]):
    """A recording under way: `steps` or `step` mark the steps, `log` names their losses.

    To be used as a context manager; `everystep.record` makes it.

    run: the run, while it is recorded and afterwards.
    """

    def __init__(
        self,
        parts: dict[str, Any],
        directory: Path | None,
        runs: Path,
        snapshot_budget: int,
        batch_budget: float,
        open_run: Callable[[Path], R],
    ) -> None:
        self._parts = Parts(parts)
        self._open_run = open_run
        self._directory, self._runs = directory, runs
        self._budgets = snapshot_budget, batch_budget
        self._recorder: Recorder | None = None
        self._watch: Watch | None = None
        self._step = 0
        self._follower = Follower(
            self._parts.module_paths(),
            self._parts.optimizer_names(),
            self._module_done,
            self._optimizer_uses,
        )
        self._contents = Contents()
        self._copied = 0
        self._programs: dict[StepPath, _Program | None] = {}
        self._program_count = 0
        self._under_way: _Step | None = None
        self._taken: list[Taken] = []
        self._losses: list[Any] = []
        self._measured: list[tuple[str, int, Any]] = []
        self._rates: dict[str, float] = {}
        self._generator: Tensor | None = None
        self._pending: State | None = None
        self._names: dict[Tensor, str] = {}
        self._lost_to = 0
        self._versions: dict[str, tuple[int, int | None]] = {}
        self._said: set[str] = set()
        self._has_said_elsewhere = self._has_said_between = False
        self._is_finite = True
        self._flush_at = 0.0
        self._step_seconds = math.inf
        self._has_loss = False
        self._loss_dtype = "float64"
        self._interrupted_step: int | None = None

    @property
    def run(self) -> R:
        """The run.

        Raises:
            UsageError: the recording has not begun.
        """
        return self._open_run(self._started().directory)

    @property
    def is_open(self) -> bool:
        """Whether it has begun and is not over."""
        return self in _recording

    def __enter__(self) -> Self:
        if self._recorder is not None:
            raise UsageError("this recording has begun already; everystep.record(...) makes another")
        _check_alone()
        self._parts.check()
        place = create_directory(self._directory, "loop", self._runs)
        facts = {"name": place.name, "started": now()} | self._facts()
        snapshots, batches = self._budgets
        beginning = self._parts.snapshot(0)
        self._recorder = Recorder(place, facts, snapshots, batch_budget=batches)
        self._started_at = time.perf_counter()
        if message := numerics.warning():
            self._say(message)
        self._generator = torch.get_rng_state()
        self._recorder.snapshot(beginning)
        self._note_versions(self._parts.state())
        self._follower.begin()
        _recording.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        recorder = self._started()
        if not self.is_open:
            return
        _recording.remove(self)
        if self._under_way is not None and error is None:
            self.end_step()  # the batch was asked for by `next`, and no other came
        elif self._under_way is not None:
            self._abandon()
        elif error is not None and self._interrupted_step == self._step:
            self._take_back()
        self._follower.finish()
        is_whole = error is None or not isinstance(error, KeyboardInterrupt | Exception)
        try:
            if self._step and self._same_versions() and not self._has_snapshot(self._step):
                self._keep_pending()
                recorder.snapshot(self._parts.snapshot(self._step))
            self._keep_pending()
            self.flush()
            seconds = time.perf_counter() - self._started_at
            status, reason = _status(error, is_whole)
            recorder.finish(
                self._loop_facts()
                | {"status": status, "reason": reason, "finished": now(), "seconds": seconds}
                | {"steps": self._step}
            )
        except RecordingError:
            if error is None:
                raise

    def steps(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield batches; each turn of the loop around it is a step, from a batch to the next.

        `break` ends a step; an exception discards it.

        Args:
            batches: anything that can be iterated over: a DataLoader, a list, a generator.

        Raises:
            UsageError: the recording has not begun, or is over.
            RecordingError: writing the run failed.
        """
        self._started()
        count = 0
        for batch in batches:
            count += 1
            self.begin_step(batch)
            try:
                yield batch
            except GeneratorExit:  # the loop was left, by `break` or by an exception: __exit__ knows
                if self._is_untouched():
                    self._close()  # it was asked for by `zip`, which then had nothing to go with it
                else:
                    self.end_step()
                    self._interrupted_step = self._step
                raise
            self.end_step()
        if not count:
            self._say("there was no batch, so no step was recorded")

    @contextmanager
    def step(self, batch: Any = None) -> Iterator[None]:
        """What runs within is a step.

        Args:
            batch: what it is taken on, if there is such a thing.
        """
        self.begin_step(batch)
        try:
            yield
        except BaseException:
            self._abandon()
            raise
        self.end_step()

    def log(self, **values: Any) -> None:
        """Note numbers of the step under way, by name. `loss` is the loss of the step.

        Args:
            values: numbers, or tensors of one number; they are detached and copied.

        Raises:
            UsageError: there is no step under way, or something is not one number.
        """
        step = self._under_way
        if step is None:
            raise UsageError(
                "log is called outside of a step; call it in the body of the loop over "
                "recording.steps(...), or within recording.step(batch)"
            )
        with self.paused():
            for name, value in values.items():
                step.logged[name] = _number(name, value)
        if "loss" in values:
            step.loss = values["loss"]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What runs within is not part of the step: an evaluation, say.

        It must change nothing that the loop carries; otherwise replays depart from there on.
        """
        watch = self._watch
        if watch is None or watch.is_paused:
            yield
            return
        watch.is_paused = True
        try:
            yield
        finally:
            watch.is_paused = False

    def begin_step(self, batch: Any = None) -> None:
        """Begin a step where neither `steps` nor `step` can be used; `end_step` ends it.

        Args:
            batch: what it is taken on, if that is known already; `add_batch` tells it later.

        Raises:
            UsageError: a step is under way.
            RecordingError: writing the run failed.
        """
        recorder = self._started()
        if self._under_way is not None:
            raise UsageError("a step is under way; a recording has one loop at a time")
        recorder.check()
        while recorder.waiting_bytes > MOST_WAITING:
            time.sleep(0.001)
            recorder.check()
        self._names = self._parts.parameter_names()
        state = self._parts.state()
        self._note_changes_between(state)
        watch = Watch(self._parts.device, self._follower, self._contents)
        watch.begin(state)
        self._follower.step_begins()
        step = _Step(watch)
        watch.__enter__()  # type: ignore[no-untyped-call]
        self._under_way, self._watch = step, watch
        if batch is not None:
            try:
                self.add_batch(batch)
            except BaseException:
                self._close()
                raise
        step.started = time.perf_counter()

    def add_batch(self, batch: Any) -> None:
        """Say what the step under way is taken on, before it is used; of several, each is kept.

        Without it, the step has the same tensors, and nobody knows that they are its batch.
        """
        step = self._under_way
        if step is None:
            raise UsageError("add_batch is called outside of a step")
        path = str(len(step.nesting)) if step.nesting else ""
        tensors = tensors_of(batch, path)
        step.nesting.append(text_of(batch, path))
        with self.paused():
            step.batch |= {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
            step.watch.add_batch(tensors)

    def end_step(self) -> None:
        """End the step that `begin_step` began, and record it."""
        step = self._close()
        if step is None:
            return
        self._step += 1
        number = self._step
        after = self._parts.state()
        path = step.watch.end(after, step.loss)
        try:
            known = self._programs[path]
        except KeyError:
            known = self._programs[path] = self._build(path, step)
            if len(self._programs) > MOST_PATHS:  # a path that comes again then has two programs
                del self._programs[next(iter(self._programs))]
        self._taken.append(self._row(number, step, known))
        self._note_logged(number, step, path)
        self._note_unseen(number, step)
        self._step_seconds = min(self._step_seconds, time.perf_counter() - step.started)
        self._keep_pending(known)
        self._snapshot_if_due()
        self._note_versions(after)
        if time.perf_counter() >= self._flush_at:
            self.flush()
            self._flush_at = time.perf_counter() + FLUSH_SECONDS

    # A step.

    def _close(self) -> _Step | None:
        """The step under way is over; return it."""
        step, self._under_way = self._under_way, None
        if step is not None:
            step.watch.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._watch = None
        return step

    def _abandon(self) -> None:
        """A step was not taken to its end: it is not recorded, and no snapshot claims its state."""
        self._close()
        self._versions = {}

    def _take_back(self) -> None:
        """The last step was left by an exception: it is not recorded."""
        self._step -= 1
        self._started().forget_after(self._step)
        self._taken = [row for row in self._taken if row.step <= self._step]
        self._losses = self._losses[: max(0, len(self._losses) - 1)]
        self._measured = [row for row in self._measured if row[1] <= self._step]
        if self._pending is not None and self._pending.step > self._step:
            self._pending = None
        self._versions = {}

    def _build(self, path: StepPath, step: _Step) -> _Program | None:
        try:
            built = build_path(path, step.watch.numbers)
        except NotCapturableError as error:
            self._say(f"step {self._step} cannot be repeated without your code: {error}")
            return None
        self._program_count += 1
        self._started().program(self._program_count, built.program, {})
        return _Program(self._program_count, built)

    def _row(self, number: int, step: _Step, known: _Program | None) -> Taken:
        inputs = {f"batch/{name}": tensor for name, tensor in step.batch.items()}
        size = sum(tensor.nbytes for tensor in inputs.values()) + self._contents.copied - self._copied
        self._copied = self._contents.copied
        if known is None:
            return Taken(number, None, None, inputs, step.nested, size)
        for name, storage in known.built.inputs.items():
            content = step.watch.content(storage)
            if content is not None and name not in step.batch:
                inputs[f"input/{name}"] = content
        for draw, generator in step.watch.generators.items():
            # A replay has the generator as the last draw left it, in this step or one before.
            if draw or self._generator is None or not torch.equal(generator, self._generator):
                inputs[f"generator/{draw}"] = generator
        self._generator = step.watch.drawn if step.watch.drawn is not None else self._generator
        numbers = known.built.numbers(step.watch.numbers)
        return Taken(number, known.number, numbers, inputs, step.nested, size)

    def _note_logged(self, number: int, step: _Step, path: StepPath) -> None:
        self._losses.append(step.logged.pop("loss", math.nan))
        if step.loss is not None and not self._has_loss:
            self._has_loss = True
            if path.loss is not None and path.tensors[path.loss].dtype != torch.float64:
                self._loss_dtype = "float32"
        self._measured += [(name, number, value) for name, value in step.logged.items()]
        rates = self._parts.rates()
        self._measured += [(n, number, v) for n, v in rates.items() if self._rates.get(n) != v]
        self._rates = rates

    def _note_unseen(self, number: int, step: _Step) -> None:
        for reason in step.watch.unseen:
            if reason in self._said or len(self._said) >= MOST_SAID:
                continue
            self._said.add(reason)
            self._say(
                f"step {number}: {reason}; what it gives is kept as numbers, and no view shows how it "
                "was made"
            )
        if step.watch.changed_elsewhere is not None and not self._has_said_elsewhere:
            self._has_said_elsewhere = True
            self._say(
                f"step {number} changes {step.watch.changed_elsewhere} that is in no part; it is kept "
                "again at every step, unless you give what holds it to everystep.record(...)"
            )

    # What is written.

    def _snapshot_if_due(self) -> None:
        recorder = self._started()
        if self._step >= TIMED_STEPS and not recorder.has_interval:
            recorder.choose_interval(self._step_seconds)
        if recorder.lost_to > self._lost_to:
            # Batches were given up: everything from here on shall open without them.
            self._lost_to = recorder.lost_to
            recorder.plan.pinned = {0, self._step}
            self._keep_pending()
            self._pending = self._parts.snapshot(self._step)
        if recorder.plan.is_due(self._step) and not recorder.is_behind and self._pending is None:
            self._pending = self._parts.snapshot(self._step)

    def _keep_pending(self, following: _Program | None = None) -> None:
        """Write the snapshot that waits: with its gradients only if the step after it has used them."""
        if self._pending is None:
            return
        state, self._pending = self._pending, None
        if following is not None:
            tensors = following.built.program.tensors
            rest = {
                name: tensor
                for name, tensor in state.rest.items()
                if not name.startswith("gradient/") or name in tensors
            }
            state = State(state.step, state.parameters, rest, state.settings)
        self._started().snapshot(state)

    def _has_snapshot(self, step: int) -> bool:
        return self._pending is not None and self._pending.step == step

    def flush(self) -> None:
        """Hand what was recorded so far to the writer, as happens several times a second by itself."""
        recorder = self._started()
        if not self._taken:
            return
        first = self._taken[0].step
        losses = [float(loss) for loss in self._losses]
        recorder.repeats(self._taken)
        recorder.losses(first, losses)
        measured = [(name, step, float(value)) for name, step, value in self._measured]
        if measured:
            recorder.measurements(measured)
        recorder.facts(self._loop_facts() | {"loss.dtype": self._loss_dtype})
        self._say_if_not_finite(first, losses)
        self._taken, self._losses, self._measured = [], [], []
        self._contents.clean()

    def _say_if_not_finite(self, first: int, losses: list[float]) -> None:
        if not self._has_loss or not self._is_finite:
            return
        for step, loss in enumerate(losses, start=first):
            if not math.isfinite(loss):
                self._is_finite = False
                self._started().facts({"nonfinite_step": step})
                return

    def _facts(self) -> dict[str, Any]:
        parts = self._parts
        texts = {name: module_text(module) for name, module in parts.modules.items()}
        main = "ModuleDict(\n)" if parts.main is None else texts.pop(parts.main)
        optimizers = {name: optimizer_text(each) for name, each in parts.optimizers.items()}
        parameters = {p for p, name in parts.parameter_names().items() if "#" not in name}
        return (
            {
                "device": str(parts.device),
                "seed": None,
                "data": {"rows": 0, "source": "loop"},
                "batches": {"batch_size": None, "drop_last": False, "seed": 0, "steps_per_epoch": 1},
                "model": {
                    "text": _with_others(main, texts),
                    "parameters": sum(parameter.numel() for parameter in parameters),
                },
                "loss": {"text": "of your own loop"},
                "optimizer": {"text": _joined(optimizers) or "none"},
                "schedule": None,
                "clip_norm": None,
                "evaluate_every": None,
            }
            | self._loop_facts()
            | circumstances(0, parts.device)
        )

    def _loop_facts(self) -> dict[str, Any]:
        return {
            "loop": {
                "parts": {name: type(part).__name__ for name, part in self._parts.named.items()},
                "optimizers": {n: optimizer_text(each) for n, each in self._parts.optimizers.items()},
                "programs": self._program_count,
                "unseen": sorted(self._said),
                "has_loss": self._has_loss,
            },
            "steps": self._step,
        }

    def _note_versions(self, state: dict[str, Tensor]) -> None:
        self._versions = _versions(state)

    def _note_changes_between(self, state: dict[str, Tensor]) -> None:
        """Keep what the loop has changed since the last step, outside of any."""
        now = _versions(state)
        if now != self._versions:
            changed = {n: state[n] for n in now if self._versions.get(n) != now[n]}
            copies = {name: copy_of(tensor) for name, tensor in changed.items()}
            if copies:
                self._started().change(self._step, copies)
            if copies and not self._has_said_between and self._versions:
                self._has_said_between = True
                name = next(iter(copies)).partition("/")[2]
                self._say(
                    f"after step {self._step} the loop changes {name} outside of a step; what it is "
                    "then is kept, but no step shows how that came"
                )

    def _is_untouched(self) -> bool:
        """Tell whether the loop has done nothing yet with the step under way."""
        step = self._under_way
        return step is not None and step.watch.is_empty and not step.logged

    def _same_versions(self) -> bool:
        """Tell whether the parts are as the last step left them, as far as torch knows."""
        return self._versions == _versions(self._parts.state())

    # Who watches.

    def _module_done(self, path: str, outputs: list[Tensor]) -> None:
        if self._watch is not None:
            with self.paused():
                self._watch.module_done(path, outputs)

    def _optimizer_uses(self, optimizer: torch.optim.Optimizer) -> None:
        if self._watch is None:
            return
        names = self._names
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        with self.paused():
            self._watch.optimizer_uses(
                {names[p]: p.grad for p in parameters if p.grad is not None and p in names}
            )

    def _started(self) -> Recorder:
        if self._recorder is None:
            raise UsageError(
                "the recording has not begun; write: with everystep.record(...) as recording:"
            )
        return self._recorder

    def _say(self, message: str) -> None:
        print(f"everystep: {message}", file=sys.stderr)


class _Program(NamedTuple):
    """A program of the run, and its number."""

    number: int
    built: BuiltPath


class _Step:
    """A step under way."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.batch: dict[str, Tensor] = {}
        self.nesting: list[Any] = []
        self.logged: dict[str, Any] = {}
        self.loss: Any = None
        self.started = 0.0

    @property
    def nested(self) -> Any:
        """How the batch was nested; of several, a list."""
        if len(self.nesting) > 1:
            return {"list": self.nesting}
        return self.nesting[0] if self.nesting else None


#: Recordings under way in this process.
_recording: list[Recording[Any]] = []


def _check_alone() -> None:
    if _recording:
        raise UsageError(
            f"a recording is under way already ({_recording[-1].run.name}); end it first: one loop is "
            "recorded at a time"
        )


def _status(error: BaseException | None, is_whole: bool) -> tuple[str, str | None]:
    if isinstance(error, KeyboardInterrupt):
        return "stopped", "by the user (Ctrl-C)"
    if error is None or is_whole:
        return "finished", None
    return "failed", str(error).strip() or type(error).__name__


def _versions(state: dict[str, Tensor]) -> dict[str, tuple[int, int | None]]:
    return {name: (id(tensor), version_of(tensor)) for name, tensor in state.items()}


def _number(name: str, value: Any) -> float | Tensor:
    """Return a number, or a copy of a tensor of one.

    Raises:
        UsageError: it is neither.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            raise UsageError(
                f"log: {name} has shape {tuple(value.shape)}; log one number, such as its mean"
            )
        return value.detach().reshape(()).clone()
    with suppress(TypeError, ValueError):
        if not isinstance(value, str):
            return float(value)
    raise UsageError(f"log: {name} is a {type(value).__name__}; log a number, or a tensor of one")


def _with_others(main: str, others: dict[str, str]) -> str:
    """Return the text of a module with those of others in it, as torch prints what is within."""
    if not others:
        return main
    own = main.removesuffix("\n)") if main.endswith("\n)") else main.removesuffix(")") + ")("
    inner = "".join(f"\n({name}): {text}" for name, text in others.items())
    return own + inner.replace("\n", "\n  ") + "\n)"


def _joined(texts: dict[str, str]) -> str:
    """Return texts of parts; that of a lone one as it is."""
    if len(texts) == 1:
        return next(iter(texts.values()))
    return "\n".join(f"{name}: {text}" for name, text in texts.items())
