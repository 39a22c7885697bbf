"""The small launches of a decode round, computed by torch as their kernels' docstrings say.

For tests of what launches are handed: names, grids, arguments, and which buffer one writes and the next
reads. `tests/fast/test_step_launches.py` runs the same rounds in the emulator, with the kernels.
"""

import math
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fast.launch import OPTIONS, Launch, Work

NOT_FINITE = -1


def plain(launch: Launch) -> None:
    """Compute a launch. An AssertionError if Triton or the kernel could not take its arguments."""
    names = set(launch.kernel.arg_names)
    assert set(launch.arguments) == names, f"{launch.name}: {names ^ set(launch.arguments)}"
    assert set(launch.options) <= set(OPTIONS), launch.options
    blocks = {n: v for n, v in launch.arguments.items() if n.startswith("BLOCK")}
    for name, value in (blocks | launch.options).items():
        power = name in ("num_stages", "waves_per_eu") or math.log2(value).is_integer()
        assert value > 0 and power, f"{launch.name}: {name} = {value}"
    assert all(size > 0 for size in launch.grid), launch.grid
    where = launch.kernel.__module__.removeprefix("fast.kernels.")
    _KERNELS[f"{where}.{launch.kernel.__name__}"](SimpleNamespace(**launch.arguments), *launch.grid)
    bytes_a_pass = 0
    if launch.weight_bytes:
        weight = launch.arguments["weight"]
        bytes_a_pass = blocks["BLOCK_N"] * blocks["BLOCK_K"] * weight.element_size()
    assert launch.weight_bytes == bytes_a_pass


def in_turn(work: Iterable[Work]) -> None:
    """Compute all work, one after the other."""
    for one in work:
        plain(one) if isinstance(one, Launch) else one()


def _lines(x: Tensor, width: int) -> Tensor:
    """What a kernel addresses as rows of `width` numbers."""
    assert x.is_contiguous()
    return x.view(-1, width)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    scale = torch.rsqrt(wide.square().sum(-1, keepdim=True) / x.shape[-1] + eps)
    return (wide * scale * (1 + weight.float())).bfloat16()


def _ids(a: Any, rows: int) -> None:
    assert a.ids.shape == (rows,) and a.ids.dtype == torch.int32


def _token(a: Any, row: int) -> int:
    return min(max(int(a.ids[row]), 0), a.vocab - 1)


def _norm(a: Any, rows: int, *rest: int) -> None:
    assert rest == (1, 1) and a.BLOCK >= a.D and (rows == 1 or not a.LAST)
    x, out = _lines(a.x, a.D), _lines(a.out, a.D)
    for row in range(rows):
        source = int(a.count[0]) - 1 if a.LAST else row
        out[row] = _normed(x[source], a.weight, a.eps)


def _embed(a: Any, rows: int, *rest: int) -> None:
    _ids(a, rows)
    assert rest == (1, 1) and a.BLOCK >= a.D
    for row in range(rows):
        value = a.table[_token(a, row)]
        _lines(a.out, a.D)[row] = value
        _lines(a.scaled, a.D)[row] = (value.float() * (1 + a.next_norm.float())).bfloat16()
        a.squares[0, row] = value.float().square().sum()


def _embed_part(a: Any, rows: int, *rest: int) -> None:
    _ids(a, rows)
    assert rest == (1, 1) and a.BLOCK >= a.D
    for row in range(rows):
        own = int(a.ids[row]) - a.first
        _lines(a.out, a.D)[row] = a.table[own] if 0 <= own < a.count else 0.0


def _mtp_input(a: Any, rows: int, *rest: int) -> None:
    _ids(a, rows)
    assert rest == (2, 1) and a.BLOCK >= a.D
    table, hidden, out = (_lines(x, a.D) for x in (a.table, a.hidden, a.out))
    for row in range(rows):
        out[2 * row] = _normed(table[_token(a, row)], a.embedding_norm, a.eps)
        out[2 * row + 1] = _normed(hidden[row], a.hidden_norm, a.eps)


def _linear(a: Any, blocks: int, *rest: int) -> None:
    assert rest == (1, 1) and a.K % a.BLOCK_K == 0 and a.rows <= a.ROWS
    for name in ("residual", "next_norm", "scaled", "out_squares", "start", "squares"):
        assert isinstance(getattr(a, name), Tensor), (
            f"{name} is no tensor, also where it is not read"
        )
    exact = _lines(a.x, a.K)[: a.rows].float() @ _lines(a.weight, a.K).float().T
    if a.PARTS:
        sums = a.squares[: a.PARTS].sum(0)[: a.rows]
        exact = exact * torch.rsqrt(sums / a.K + a.eps)[:, None]
    if a.ACTIVATED:
        gate, up = exact[:, ::2], exact[:, 1::2]
        _lines(a.out, a.N // 2)[: a.rows] = (gate * gate.sigmoid() * up).bfloat16()
        return
    if a.HAS_RESIDUAL:
        exact = exact + _lines(a.residual, a.N)[: a.rows].float()
    out = _lines(a.out, a.N)
    places = [(int(a.start[0]) + row) % a.RING if a.RING else row for row in range(a.rows)]
    for block in range(blocks):
        columns = slice(block * a.BLOCK_N, min((block + 1) * a.BLOCK_N, a.N))
        kept = exact[:, columns].bfloat16()
        out[places, columns] = kept
        if a.HAS_NEXT:
            factor = 1 + a.next_norm[columns].float()
            _lines(a.scaled, a.N)[: a.rows, columns] = (kept.float() * factor).bfloat16()
            a.out_squares[block, : a.rows] = kept.float().square().sum(-1)


def _prefill_linear(a: Any, blocks: int, *rest: int) -> None:
    assert rest == (1, 1) and not (a.ACTIVATED and a.HAS_RESIDUAL)
    rows = int(a.filled[0])
    assert blocks == math.ceil(len(a.x) / a.BLOCK_M) * math.ceil(a.N / a.BLOCK_N)
    exact = _lines(a.x, a.K)[:rows].float() @ _lines(a.weight, a.K).float().T
    if a.ACTIVATED:
        gate, up = exact[:, ::2], exact[:, 1::2]
        _lines(a.out, a.N // 2)[:rows] = (gate * gate.sigmoid() * up).to(a.out.dtype)
        return
    beside = _lines(a.residual, a.N)[:rows].float() if a.HAS_RESIDUAL else 0
    _lines(a.out, a.N)[:rows] = (exact + beside).to(a.out.dtype)


def _head(a: Any, blocks: int, *rest: int) -> None:
    assert rest == (1, 1) and a.K % a.BLOCK_K == 0 and a.rows <= a.ROWS
    x = torch.zeros(a.ROWS, a.K)
    x[: a.rows] = _lines(a.x, a.K)[: a.rows].float()
    logits = (x @ _lines(a.weight, a.K)[: a.N].float().T).bfloat16()  # [ROWS, N]
    best, place = _lines(a.best, a.ROWS), _lines(a.place, a.ROWS)
    for block in range(blocks):
        ids = torch.arange(block * a.BLOCK_N, min((block + 1) * a.BLOCK_N, a.N))
        _lines(a.logits, a.N)[: a.rows, ids] = logits[: a.rows, ids]
        for row in range(a.ROWS):
            value = logits[row, ids].float()
            candidate = torch.where((ids < a.vocab) & ~value.isnan(), value, -math.inf)
            best[block, row] = candidate.max()
            first = ids[candidate == candidate.max()].min()
            place[block, row] = first if bool((value < math.inf).all()) else NOT_FINITE


def _pick(a: Any, rows: int, *rest: int) -> None:
    assert rest == (1, 1)
    best, place = (x.as_strided((a.blocks, rows), (a.STRIDE, 1)) for x in (a.best, a.place))
    for row in range(rows):
        values, ids = best[:, row].tolist(), place[:, row].tolist()
        highest = max(values)
        token = min(i for v, i in zip(values, ids, strict=True) if v == highest)
        if a.OF_PART:
            a.largest[row] = highest
            token += a.first
        a.tokens[row] = NOT_FINITE if NOT_FINITE in ids else token


def _accept(a: Any, *grid: int) -> None:
    assert grid == (1, 1, 1) and a.BLOCK > a.DRAFTS
    own, drafts = a.picked[: a.DRAFTS + 1].tolist(), a.rows_ids[1 : a.DRAFTS + 1].tolist()
    wrong = [i for i, draft in enumerate(drafts) if draft != own[i]]
    count = min([*wrong, a.DRAFTS]) + 1
    before = int(a.starts[0])
    after = before + count
    starts = [after, before, *range(after, after + a.DRAFTS)][: a.DRAFTS + 1]
    a.starts[: a.DRAFTS + 1] = torch.tensor(starts, dtype=torch.int32)
    a.rows_ids[0] = own[count - 1]
    a.fresh[0] = count
    a.report[: a.DRAFTS + 2] = torch.tensor([count, *own], dtype=torch.int32)


_KERNELS: dict[str, Callable[..., None]] = {
    "norm.norm": _norm,
    "embedding.embed": _embed,
    "embedding.embed_part": _embed_part,
    "embedding.mtp_input": _mtp_input,
    "linear.linear": _linear,
    "prefill.linear.linear": _prefill_linear,
    "head.head": _head,
    "head.pick": _pick,
    "head.accept": _accept,
}
