"""Thin command lines over the library."""

import qwen35  # noqa: F401  (sets how torch's threads wait, which is too late once torch is imported)
