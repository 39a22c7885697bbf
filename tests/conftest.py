"""Set-up of every test process."""

import torch

from qwen35 import progress

# pytest runs one process a core (pyproject.toml): more threads than that only wait for each other.
torch.set_num_threads(1)

# What a test reads from standard error does not depend on how busy the machine is.
progress.EVERY = 1e6
