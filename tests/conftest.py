"""Every test computes under the numerics that everystep sets, as a user's process does."""

from everystep import numerics

numerics.prepare()

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from torch import nn  # noqa: E402

settings.register_profile("everystep", deadline=None, max_examples=50)
settings.load_profile("everystep")


@pytest.fixture
def chapter():
    """The chapter's model and data, made as the chapter makes them."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 1000), torch.randn(64, 10)
    model = nn.Sequential(nn.Linear(1000, 100), nn.ReLU(), nn.Linear(100, 10))
    return model, x, y


@pytest.fixture
def small():
    """A small model and its data."""
    torch.manual_seed(1)
    x, y = torch.randn(20, 4), torch.randn(20, 2)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), x, y


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
