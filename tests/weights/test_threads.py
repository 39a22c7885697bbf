"""A written weight has the same bytes with any number of threads."""

import pytest
import torch
from torch import Tensor

from weights import fp8, mxfp4, words
from weights.layout import pack

# More elements than torch gives to one thread, no multiple of anything but a group.
ROWS, COLUMNS = 331, 384


@pytest.fixture(params=[2, 3])
def threads(request: pytest.FixtureRequest):
    yield request.param
    torch.set_num_threads(1)


def written(weight: Tensor) -> dict[str, Tensor]:
    """The weight in every format and order, and back."""
    packed, powers = mxfp4.quantize(weight)
    numbers, scales = fp8.quantize_blocks(weight)
    rows, of_rows = fp8.quantize_channels(weight)
    return {
        "mxfp4": packed, "mxfp4 scales": powers, "fp8": numbers, "fp8 scales": scales, "by row": rows,
        "by row scales": of_rows, "words": words.encode(packed),
        "shuffled": pack(powers, "aiter_scale").data, "decoded mxfp4": mxfp4.dequantize(packed, powers),
        "decoded fp8": fp8.dequantize(numbers, scales, torch.bfloat16),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_each_format(threads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(ROWS, COLUMNS, generator=generator).to(dtype)
    monkeypatch.setattr(mxfp4, "CHUNK", ROWS * COLUMNS // 2)  # two chunks and a bit
    alone = written(weight)
    torch.set_num_threads(threads)
    for name, found in written(weight).items():
        assert torch.equal(found.view(torch.uint8), alone[name].view(torch.uint8)), name
