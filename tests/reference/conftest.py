"""Set-up of the reference's tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield
