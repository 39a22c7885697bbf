"""Command lines over the library."""

import qwen35  # noqa: F401  (sets how torch's threads wait; has to come before torch)
