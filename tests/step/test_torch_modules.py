import pytest
import torch
from hypothesis import settings
from tests.step.torch_modules import NOT_TRAINED, WARNINGS, ModuleCase, listed_modules, module_cases
from torch import Tensor, nn

from everystep import numerics

pytestmark = pytest.mark.filterwarnings(*WARNINGS)

#: Cases whose numbers differ from one training to the next in PyTorch itself: name to reason.
NOT_REPEATABLE: dict[str, str] = {}

CASES = module_cases()


def test_every_module_of_torchs_list_is_a_case_or_is_left_out_with_a_reason():
    names = [case.name for case in CASES]
    modules = {name.split("-")[0] for name in names}
    assert len(set(names)) == len(names)
    assert modules.isdisjoint(NOT_TRAINED)
    assert modules | set(NOT_TRAINED) == set(listed_modules())
    assert set(NOT_REPEATABLE) <= set(names)
    assert all([*NOT_TRAINED.values(), *NOT_REPEATABLE.values()]), "a reason is missing"


def test_importing_torchs_list_leaves_the_settings_of_the_process():
    assert not torch.backends.flags_frozen()
    assert settings.default.max_examples == settings.get_profile("everystep").max_examples


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name not in NOT_REPEATABLE], ids=lambda case: case.name
)
def test_plain_training_learns_and_gives_the_same_bits_again(case):
    model, losses = trained(case)
    again, losses_again = trained(case)
    assert losses.isfinite().all()
    assert torch.equal(losses, losses_again)
    assert differences(model, again) == []
    untrained, *_ = case.make()
    assert set(differences(model, untrained)) & {name for name, _ in model.named_parameters()}


def trained(case: ModuleCase) -> tuple[nn.Module, Tensor]:
    """Return the case's model after three steps, and their losses."""
    model, x, y, loss_function = case.make()
    losses = []
    with numerics.in_force():
        for _ in range(3):
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
