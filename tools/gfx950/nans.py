"""The NaN that an operation gives, to the bit, and the same on any host.

AMD's documents define it for some instructions (minimum, maximum, median, the fix-up of a division), and
these follow the documents. For arithmetic they do not define it. There the result is the first source
that is a NaN, made quiet, with its sign and payload, as IEEE 754 recommends. An operation without a value
gives the NaN that the documents give for 0/0: negative, quiet, without a payload.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

# By dtype: unsigned integers of its size, the bit that makes a NaN quiet, and the NaN of no value.
LAYOUTS = {
    np.dtype(np.float16): (np.uint16, 1 << 9, 0xFE00),
    np.dtype(np.float32): (np.uint32, 1 << 22, 0xFFC00000),
    np.dtype(np.float64): (np.uint64, 1 << 51, 0xFFF8 << 48),
}


def quiet(x: NDArray) -> NDArray:
    """The same values, but a signaling NaN becomes quiet; it keeps its sign and payload."""
    kind, bit, _ = LAYOUTS[x.dtype]
    bits = np.ascontiguousarray(x).view(kind)
    return np.where(np.isnan(x), bits | kind(bit), bits).view(x.dtype)


def is_signaling(x: NDArray) -> NDArray:
    kind, bit, _ = LAYOUTS[x.dtype]
    return np.isnan(x) & (np.ascontiguousarray(x).view(kind) & kind(bit) == 0)


def no_value(dtype: np.dtype) -> NDArray:
    """The NaN that 0/0 gives, as an array without axes."""
    kind, _, bits = LAYOUTS[np.dtype(dtype)]
    return np.array(bits, kind).view(dtype)


def passing_on(function: Callable[..., NDArray | tuple]) -> Callable[..., NDArray | tuple]:
    """A function whose NaNs are replaced as this file's first lines say, if its result is a float."""

    def wrapped(*sources: NDArray) -> NDArray | tuple:
        found = function(*sources)
        first = np.asarray(found[0] if isinstance(found, tuple) else found)
        if first.dtype not in LAYOUTS:
            return found
        wrong = np.isnan(first)
        if not wrong.any():
            return found
        same = [source for source in sources if source.dtype == first.dtype]
        if not same and any(source.dtype in LAYOUTS for source in sources):
            return found  # a conversion keeps the NaN that it converts
        chosen = no_value(first.dtype)
        for source in reversed(same):
            chosen = np.where(np.isnan(source), quiet(source), chosen)
        fixed = np.where(wrong, chosen, first)
        return (fixed, *found[1:]) if isinstance(found, tuple) else fixed

    return wrapped
