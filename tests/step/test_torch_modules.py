import pytest
import torch
from hypothesis import settings
from tests.step.torch_modules import NOT_TRAINED, WARNINGS, ModuleCase, listed_modules, module_cases
from torch import Tensor, nn

from everystep import numerics
from everystep.errors import TrainingError
from everystep.program.step_program import Program

pytestmark = pytest.mark.filterwarnings(*WARNINGS)

READS = "reads a number from a tensor"
#: Cases with steps that no program runs in the place of Python: name to the message.
EAGER = {
    # A cumulative average (momentum=None) divides by the number of batches, as a Python number.
    "BatchNorm2d-1": READS,
    "BatchNorm3d-1": READS,
    # They look whether a variance is negative, and whether a mask is causal.
    "GaussianNLLLoss": READS,
    "GaussianNLLLoss-1": READS,
    "Transformer-51": READS,
    # How much memory the kernel takes depends on the lengths of the targets.
    "CTCLoss": "shape that depends on values",
    "CTCLoss-5": "shape that depends on values",
}
STEPS = 20

CASES = module_cases()


def test_every_module_of_torchs_list_is_a_case_or_is_left_out_with_a_reason():
    names = [case.name for case in CASES]
    modules = {name.split("-")[0] for name in names}
    assert len(set(names)) == len(names)
    assert modules.isdisjoint(NOT_TRAINED)
    assert modules | set(NOT_TRAINED) == set(listed_modules())
    assert set(EAGER) <= set(names)
    assert all(NOT_TRAINED.values()), "a reason is missing"


def test_importing_torchs_list_leaves_the_settings_of_the_process():
    assert not torch.backends.flags_frozen()
    assert settings.default.max_examples == settings.get_profile("everystep").max_examples


@pytest.mark.sweep(every=16)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_by_program_it_has_the_bits_of_a_loop_written_by_hand(case, make_trainee, stepper_of):
    model, x, y, loss = case.make()
    stepper = stepper_of(make_trainee(model, x, y, loss=loss), STEPS, "program")
    if case.name in EAGER:
        with numerics.in_force(threads=1), pytest.raises(TrainingError, match=EAGER[case.name]):
            stepper.advance(STEPS)
        stepper.watched.finish()
        return
    with numerics.in_force(threads=1):
        stepper.advance(STEPS)
        by_hand, losses = trained_by_hand(case)
    assert losses.isfinite().all()
    assert torch.equal(stepper.collect(), losses)
    stepper.watched.finish()
    text = stepper.watched.last_program().program.to_json()
    assert Program.from_json(text).to_json() == text
    assert differences(model, by_hand) == []
    untrained, *_ = case.make()
    assert set(differences(model, untrained)) & {name for name, _ in model.named_parameters()}


def trained_by_hand(case: ModuleCase) -> tuple[nn.Module, Tensor]:
    """Return the case's model after the steps, and their losses."""
    model, x, y, loss_function = case.make()
    losses = []
    for _ in range(STEPS):
        loss = loss_function(model(x), y)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(parameter.grad * 1e-3)
        losses.append(loss.detach())
    return model, torch.stack(losses)


def differences(model: nn.Module, other: nn.Module) -> list[str]:
    """Return the names of the parameters and buffers that differ."""
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]
