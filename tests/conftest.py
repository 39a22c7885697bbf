"""Set-up of every test process."""

import torch

# pytest runs one process a core (pyproject.toml): more threads than that only wait for each other.
torch.set_num_threads(1)
