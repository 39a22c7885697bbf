"""Sums over ranks as gfx950 code in the emulator: one rank at a time, whose packets of the others are
there already, and whole rounds of ranks that take turns."""

from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fast.allreduce import GATHER_PACKETS, AllReduce, Gathered, OneShot, Slots, exchange_of, of
from fast.kernels import embedding, head
from fast.launch import Launch, Scratch, Work
from fast.layer import embedded_part
from fast.linear import Norm
from fast.prefill.layer import added_over_ranks
from qwen35.errors import InputError
from qwen35.parallel.reduce import ordered_sum
from tests.support.fast_cases import CPU, TARGET, integers, random
from tools.gfx950.emulator import EmulatorError
from tools.gfx950.target import compile_launch, emulate

EPS = 1e-6


class Group:
    """A group as one rank sees it. together: what `gather` returns, whatever the rank gives."""

    def __init__(self, rank: int, size: int, together: Tensor | None = None) -> None:
        self.rank, self.size, self.together = rank, size, together

    def gather(self, x: Tensor) -> Tensor:
        assert self.together is not None and torch.equal(x, self.together[self.rank])
        return self.together

    def sum(self, x: Tensor) -> Tensor:
        return ordered_sum(self.gather(x))

    def exchange(self, value: Any) -> list[Any]:
        return [value] * self.size


def slots(size: int, programs: int, packets: int) -> Slots:
    """Slots of all ranks in this process, with packets of another epoch."""
    made = Slots.alone(size, CPU, programs, packets)
    for one in made.of_ranks:
        one.fill_((7 << 32) | 0x7FC07FC0)
    return made


def one_shot(rank: int, size: int, sums: tuple[int, int] = (64, 64)) -> OneShot:
    return OneShot(Group(rank, size), slots(size, *sums), slots(size, 2, GATHER_PACKETS))


def packets(words: Tensor, epoch: int) -> Tensor:
    """Words int32 as packets int64."""
    return (words.long() & 0xFFFFFFFF) | (epoch << 32)


def arrive(exchange: OneShot, parts: Tensor, epoch: int) -> None:
    """Write the packets of parts [size, N, D] bf16 of all other ranks, as each program expects them."""
    size, N, D = parts.shape
    width = exchange.sums.of_ranks[0].shape[-1]
    blocks = parts.view(torch.int32).view(size, N * D // (2 * width), width)  # a program each
    own = exchange.sums.of_ranks[exchange.rank]
    for sender in range(size):
        if sender != exchange.rank:
            own[: blocks.shape[1], epoch % 2, sender] = packets(blocks[sender], epoch)


def summed(exchange: AllReduce, part: Tensor, residual: Tensor | None, norm: Norm | None) -> Any:
    scratch = Scratch(CPU)
    work, out = exchange.sum(part, TARGET, scratch, residual=residual, then=norm, out="sum")
    return work, out


def run(work: Iterable[Work], limit: int = 500_000) -> None:
    """Emulate, for no longer than these launches take: with a fault they might wait for ever."""
    emulate(work, limit=limit)


def parts_of(size: int, N: int, D: int) -> Tensor:
    """Numbers of very different sizes, so that the order of additions shows."""
    wide = random(N * D + size, size, N, D)
    return (wide * 2.0 ** integers(3, -6, 6, size, N, D)).bfloat16()


def expected(parts: Tensor, residual: Tensor | None) -> Tensor:
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return (total if residual is None else total + residual.float()).bfloat16()


@pytest.mark.parametrize(("size", "N", "D"), [(2, 1, 256), (4, 3, 384), (8, 8, 256), (2, 2, 48)])
def test_the_sum_has_the_bits_of_additions_in_the_order_of_ranks(size: int, N: int, D: int):
    parts, residual = parts_of(size, N, D), random(1, N, D).bfloat16()
    norm = Norm(random(2, D).bfloat16(), EPS)
    truth = expected(parts, residual)
    width = min(64, (D // 2) & -(D // 2))
    for rank in {0, 1, size - 1}:
        exchange = one_shot(rank, size, (64, width))
        for epoch in (1, 2, 3):
            arrive(exchange, parts, epoch)
            work, stream = summed(exchange, parts[rank], residual, norm)
            run(work)
            assert torch.equal(stream.x, truth)
            scaled = (truth.float() * (1 + norm.weight.float())).bfloat16()
            assert torch.equal(stream.scaled, scaled)
            squares = truth.double().square().sum(1)
            assert torch.allclose(stream.squares.double().sum(0)[:N], squares, rtol=1e-6)
            programs = N * D // (2 * width)
            assert exchange.sums.epochs.tolist() == [epoch] * programs + [0] * (64 - programs)
            blocks = parts[rank].view(torch.int32).view(programs, width)
            for of_rank in exchange.sums.of_ranks:  # every rank gets the same packets, its own too
                assert torch.equal(of_rank[:programs, epoch % 2, rank], packets(blocks, epoch))
        together, stream = summed(Gathered(Group(rank, size, parts)), parts[rank], residual, norm)
        run(together)
        assert torch.equal(stream.x, truth) and torch.equal(stream.scaled, scaled)


def test_without_residual_and_norm_and_with_signs_of_zeros():
    parts = parts_of(2, 2, 256)
    parts[:, :, ::3] = -0.0
    exchange = one_shot(1, 2)
    arrive(exchange, parts, 1)
    work, out = summed(exchange, parts[1], None, None)
    run(work)
    assert torch.equal(out.view(torch.int16), expected(parts, None).view(torch.int16))


def test_a_prompts_rows_are_summed_and_then_get_the_residual():
    """The layer of a prompt does the same: it rounds the sum, and then the sum with the residual."""
    parts, residual = parts_of(4, 20, 48), random(1, 20, 48).bfloat16()
    layer = SimpleNamespace(ranks=Gathered(Group(2, 4, parts)))

    def own(**settings: Any) -> tuple[list[Work], Tensor]:
        assert not settings, "the residual is added once, by the sum"
        return [], parts[2]

    work, out = added_over_ranks(layer, own, residual, Scratch(CPU))
    assert out.shape == residual.shape and out.dtype == residual.dtype
    for one in work:
        one()
    assert torch.equal(out, ordered_sum(parts) + residual)


@pytest.mark.parametrize("late", [0, 1])
def test_a_packet_that_has_not_arrived_is_waited_for(late: int):
    """The slot holds the packet of two epochs before. Nothing else would ever end the loop."""
    parts = parts_of(2, 1, 256)
    exchange = one_shot(0, 2)
    exchange.sums.epochs.fill_(2)
    arrive(exchange, parts, 3)
    exchange.sums.of_ranks[0][late, 1, 1, 63] = packets(torch.tensor(0), 1)
    work, _ = summed(exchange, parts[0], None, None)
    with pytest.raises(EmulatorError, match="does this loop end"):
        run(work, 100_000)


@pytest.mark.parametrize(("size", "rows", "words"), [(2, 1, 16), (4, 3, 350), (2, 4, 500)])
def test_a_gather_joins_rows_in_the_order_of_ranks(size: int, rows: int, words: int):
    x = integers(5, -(2**31), 2**31 - 1, size, rows, words).int()
    out = torch.empty(rows, size * words, dtype=torch.int32)
    blocks = -(-rows * words // GATHER_PACKETS)
    for rank in (0, size - 1):
        exchange = one_shot(rank, size)
        programs = len(exchange.gathers.of_ranks[0])
        padded = torch.zeros(size, blocks * GATHER_PACKETS, dtype=torch.int32)
        padded[:, : rows * words] = x.flatten(1)
        # The packets of the last two blocks of a program only: earlier ones are overwritten in its
        # slots, so there may not be more.
        assert blocks <= 2 * programs
        for block, sender in [(b, s) for b in range(blocks) for s in range(size) if s != rank]:
            epoch = 1 + block // programs
            words_of = padded[sender, block * GATHER_PACKETS :][:GATHER_PACKETS]
            own = exchange.gathers.of_ranks[rank]
            own[block % programs, epoch % 2, sender] = packets(words_of, epoch)
        launches = exchange.gather(x[rank], out)
        (launch,) = launches
        assert isinstance(launch, Launch)
        run([replace(launch, grid=(min(blocks, programs), 1, 1))])
        assert torch.equal(out, torch.cat(list(x), 1))
        out.zero_()
        run(Gathered(Group(rank, size, x)).gather(x[rank], out))
        assert torch.equal(out, torch.cat(list(x), 1))


def test_bf16_rows_are_gathered_as_words():
    x = random(4, 2, 3, 10).bfloat16()
    out = torch.empty(3, 20, dtype=torch.bfloat16)
    exchange = one_shot(0, 2)
    words = torch.zeros(GATHER_PACKETS, dtype=torch.int32)
    words[:15] = x[1].view(torch.int32).flatten()
    exchange.gathers.of_ranks[0][0, 1, 1] = packets(words, 1)
    run(exchange.gather(x[0], out))
    assert torch.equal(out, torch.cat(list(x), 1))
    with pytest.raises(InputError, match=r"rows of 5 numbers in torch.bfloat16; expected whole"):
        exchange.gather(x[0][:, :5].contiguous(), out)


def test_rows_that_no_kernel_takes_are_refused():
    for D in (255, 258, 16384 + 128):
        with pytest.raises(InputError, match=f"an all-reduce of {D} columns"):
            summed(one_shot(0, 2), torch.zeros(1, D).bfloat16(), None, None)


def test_as_many_columns_as_the_programs_of_a_launch_have():
    exchange = Gathered(Group(0, 2))
    work, _ = summed(exchange, torch.zeros(8, 16384).bfloat16(), None, None)
    assert [one.grid for one in work if isinstance(one, Launch)] == [(8, 128, 1)]


# ---- the group's exchange


def test_a_launch_is_named_by_its_sizes():
    (one,), _ = summed(one_shot(0, 2), torch.zeros(1, 256).bfloat16(), None, None)
    parts = torch.zeros(2, 1, 256).bfloat16()
    (_, other), _ = summed(Gathered(Group(0, 2, parts)), parts[0], None, None)
    assert isinstance(one, Launch) and isinstance(other, Launch)
    assert (one.name, other.name) == ("allreduce D=256 RANKS=2", "add D=256 RANKS=2")


def sizes(exchange: OneShot) -> list[list[tuple[int, ...]]]:
    return [[tuple(s.shape) for s in slots.of_ranks] for slots in (exchange.sums, exchange.gathers)]


WHOLE = [[(1024, 2, 3, 64)] * 3, [(128, 2, 3, 512)] * 3]  # slots of three ranks


def test_slots_without_memory():
    exchange = OneShot.alone(Group(1, 3), torch.device("meta"))
    assert sizes(exchange) == WHOLE
    for slots in (exchange.sums, exchange.gathers):
        assert slots.epochs.device.type == "meta" and slots.epochs.dtype == torch.int32
        assert slots.epochs.shape == slots.of_ranks[0].shape[:1]
        # Triton would take a smaller number to have 32 bits, and compile other code than for a card.
        addresses = slots.arguments(1)["addresses"]
        assert len(addresses) == 3 and min(addresses) >= 1 << 32


@pytest.mark.parametrize(
    ("device", "cards", "reachable", "expected"),
    [("cuda:0", 2, True, True), ("cuda:0", 3, True, True), ("cuda:0", 1, True, False),
     ("cuda:0", 2, False, False), ("cpu", 2, True, False)],
)  # fmt: skip
def test_cards_share_memory_where_each_rank_has_one_that_reaches_the_others(
    device: str, cards: int, reachable: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)

    def reaches(own: torch.device, other: int) -> bool:
        return reachable and own.index != other

    monkeypatch.setattr(torch.cuda, "can_device_access_peer", reaches)
    made = object()
    monkeypatch.setattr(OneShot, "connected", lambda ranks, device: made)
    found = of(Group(0, 2), torch.device(device))
    assert (found is made) is expected and isinstance(found, Gathered) is not expected


def test_slots_that_cards_share(monkeypatch: pytest.MonkeyPatch):
    """This rank's are its own memory, cleared before any rank sends."""
    happened: list[str] = []
    everyone = object()

    class Shared:
        """The slots of every rank as this one addresses them."""

        def __init__(self, own: Tensor, group: Any) -> None:
            assert group is everyone
            self.dtype = own.dtype

        def get_buffer(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            assert dtype == self.dtype == torch.int64
            return torch.full(shape, rank, dtype=dtype)

    class Counting(Group):
        def exchange(self, value: Any) -> list[Any]:
            happened.append("all ranks")
            return super().exchange(value)

    def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        assert dtype is torch.int64
        return torch.full(shape, -1, dtype=dtype, device=device)

    monkeypatch.setattr("torch.distributed.group", SimpleNamespace(WORLD=everyone))
    monkeypatch.setattr("torch.distributed._symmetric_memory.empty", empty)
    monkeypatch.setattr("torch.distributed._symmetric_memory.rendezvous", Shared)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: happened.append("cleared"))
    exchange = OneShot.connected(Counting(1, 3), CPU)
    assert sizes(exchange) == WHOLE and happened == ["cleared", "all ranks"]
    for slots in (exchange.sums, exchange.gathers):
        assert [int(one.unique()) for one in slots.of_ranks] == [0, 0, 2]


def test_a_group_has_one_exchange():
    """Cards that do not share memory, such as the CPU, gather."""
    first, second, alone = (torch.nn.Linear(2, 2) for _ in range(3))
    first.ranks = second.ranks = Group(0, 2)  # pyright: ignore
    exchange = exchange_of(first)
    assert isinstance(exchange, Gathered) and exchange_of(second) is exchange
    assert exchange_of(alone) is None


# ---- parts of the vocabulary


@pytest.mark.parametrize("rank", [0, 1])
def test_ids_are_looked_up_in_the_parts_of_all_ranks(rank: int):
    table, ids = random(1, 20, 48).bfloat16(), torch.tensor([3, 19, 10, 9]).int()
    found = torch.stack([table[ids] * (ids // 10 == part)[:, None] for part in range(2)])
    exchange = Gathered(Group(rank, 2, found))
    own = table[10 * rank : 10 * rank + 10].clone()
    work, out = embedded_part(own, ids, exchange, TARGET, Scratch(CPU), out="embeds")
    run(work)
    assert torch.equal(out, table[ids])


def test_a_rank_looks_up_its_own_ids_and_zeros_for_others():
    table, ids = random(1, 10, 48).bfloat16(), torch.tensor([20, 29, 19, 30, -1, 25]).int()
    out = torch.full((6, 48), torch.nan).bfloat16()
    arguments = {
        "table": table,
        "ids": ids,
        "out": out,
        "first": 20,
        "count": 10,
        "D": 48,
        "BLOCK": 64,
    }
    run([Launch("embed_part", embedding.embed_part, (6, 1, 1), arguments, {"num_warps": 4})])
    there = torch.tensor([True, True, False, False, False, True])
    assert torch.equal(out[there], table[[0, 9, 5]]) and not out[~there].any()


def test_a_rank_chooses_among_its_own_ids():
    best = torch.tensor([[1.0, -torch.inf, 2.0], [3.0, -torch.inf, 2.0], [3.0, 5.0, torch.nan]])
    place = torch.tensor([[3, 0, 1], [5, 4, 6], [9, 8, -1]]).int()
    tokens, largest = torch.zeros(3, dtype=torch.int32), torch.zeros(3)
    arguments = {
        "best": best, "place": place, "tokens": tokens, "largest": largest, "blocks": 3, "first": 100,
        "STRIDE": 3, "BLOCK": 16, "OF_PART": True,
    }  # fmt: skip
    run([Launch("pick", head.pick, (3, 1, 1), arguments, {"num_warps": 4})])
    assert tokens.tolist() == [105, 108, -1] and largest.tolist()[:2] == [3.0, 5.0]


@pytest.mark.parametrize("address", [1 << 12, 1 << 31, 1 << 44])
@pytest.mark.parametrize("target", ["gfx950", "sm_90"])
def test_an_address_may_have_any_number_of_bits(address: int, target: str):
    """Triton gives a number that fits into 32 bits 32 of them."""
    exchange = one_shot(0, 2)
    (launch,), _ = summed(exchange, parts_of(2, 1, 256)[0], None, None)
    assert isinstance(launch, Launch)
    arguments = launch.arguments | {"addresses": (address, address)}
    compile_launch(replace(launch, arguments=arguments), target)
