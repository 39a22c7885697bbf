"""The Triton kernels. Importing this package raises InputError when Triton is not installed."""

from qwen35.errors import InputError

try:
    import triton
except ModuleNotFoundError:
    raise InputError(
        "the fast path needs Triton 3.6 or later, which is not installed (pip install -e '.[fast]')"
    ) from None

__all__ = ["triton"]
