"""How the ranks of a tensor-parallel group combine their results, as work of a pass.

`OneShot` sends packets through memory that the ranks' cards share. Its sum is one launch, which also adds
the residual and prepares the next norm. `Gathered` is for cards that cannot share memory: an all-gather
of the process group, and a launch with the same arithmetic. Either way a sum is taken in the order of
ranks in fp32 and rounded once, so all ranks have the same bits.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fast.launch import Launch, Scratch, Work
from fast.linear import Norm, written
from fast.target import MAX_ROWS, ROWS
from qwen35.errors import InputError

# The most packets that a program sends to each rank, and the most programs of a launch. All programs of a
# launch have to run at the same time as those of the other ranks, so a gather has few.
SUM_PACKETS, SUM_PROGRAMS = 64, 1024
GATHER_PACKETS, GATHER_PROGRAMS = 512, 128
SIZES = (SUM_PROGRAMS, SUM_PACKETS), (GATHER_PROGRAMS, GATHER_PACKETS)


class Ranks(Protocol):
    """What is needed of a group of ranks: `qwen35.parallel.ranks.Ranks`."""

    rank: int
    size: int

    def gather(self, x: Tensor) -> Tensor: ...

    def sum(self, x: Tensor) -> Tensor: ...

    def exchange(self, value: Any) -> list[Any]: ...


class AllReduce(ABC):
    """The exchange of one rank with the others of its group."""

    kind: str  # for print(model)

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.rank, self.size = ranks, ranks.rank, ranks.size

    def sum(
        self, part: Tensor, target: str, scratch: Scratch, *,
        residual: Tensor | None = None, then: Norm | None = None, out: str = "sum",
    ) -> tuple[list[Work], Any]:  # fmt: skip
        """The work that adds up part [N, D] bf16 of all ranks, for 1 to 8 rows, and the result [N, D].

        residual, then, out: as in `fast.linear.product`. InputError for a D that no kernel takes.
        """
        N, D = part.shape
        packets = math.gcd(SUM_PACKETS, D // 2)
        blocks = D // (2 * packets)
        if D % 2 or MAX_ROWS * blocks > SUM_PROGRAMS:
            raise InputError(
                f"an all-reduce of {D} columns in blocks of {2 * packets}; the fast path takes at most "
                f"{SUM_PROGRAMS // MAX_ROWS} blocks"
            )
        writes, result = written(out, N, D, blocks, target, then, scratch)
        arguments = {
            "residual": part if residual is None else residual, **writes, "D": D,
            "HAS_RESIDUAL": residual is not None, "RANKS": self.size, "PACKETS": packets,
            "ROWS": ROWS[target],
        }  # fmt: skip
        return self._sum(part, (N, blocks, 1), arguments, scratch), result

    @abstractmethod
    def _sum(
        self, part: Tensor, grid: tuple[int, int, int], arguments: dict[str, Any], scratch: Scratch
    ) -> list[Work]:
        """The work of `sum`. arguments: those that the kernels of all kinds take."""

    @abstractmethod
    def gather(self, x: Tensor, out: Tensor) -> list[Work]:
        """The work that writes x [N, M] of all ranks, joined along the last axis, to out [N, size * M].

        InputError when a row of x does not consist of whole 32-bit words.
        """

    def total(self, part: Tensor, residual: Tensor, scratch: Scratch) -> tuple[Work, Tensor]:
        """The work that adds up part [N, D] of all ranks and adds the residual, for the rows of a prompt,
        and the result [N, D]."""
        out = scratch("total", *part.shape, dtype=part.dtype)

        def work() -> None:
            torch.add(self.ranks.sum(part), residual, out=out)

        return work, out


class OneShot(AllReduce):
    """Every rank writes its packets into all ranks' memory (kernels/allreduce.py).

    sums, gathers: the slots of both kinds of launches.
    """

    kind = "one-shot"

    def __init__(self, ranks: Ranks, sums: "Slots", gathers: "Slots") -> None:
        super().__init__(ranks)
        self.sums, self.gathers = sums, gathers

    @classmethod
    def connected(cls, ranks: Ranks, device: torch.device) -> "OneShot":
        """Allocate the slots, and exchange their addresses with the other ranks. InputError where cards
        cannot share memory."""
        sums, gathers = (Slots.shared(ranks, device, *sizes) for sizes in SIZES)
        torch.cuda.synchronize(device)
        ranks.exchange(None)  # no rank sends before all slots are cleared
        return cls(ranks, sums, gathers)

    @classmethod
    def alone(cls, ranks: Ranks, device: torch.device) -> "OneShot":
        """The same for one process, which has the slots of all ranks. It is for compiling."""
        sums, gathers = (Slots.alone(ranks.size, device, *sizes) for sizes in SIZES)
        return cls(ranks, sums, gathers)

    def _sum(
        self, part: Tensor, grid: tuple[int, int, int], arguments: dict[str, Any], scratch: Scratch
    ) -> list[Work]:
        from fast.kernels import allreduce as kernels  # Triton is needed from here on

        launch = Launch(
            f"allreduce D={part.shape[1]} RANKS={self.size}",
            kernels.allreduce,
            grid,
            {"part": part, **self.sums.arguments(self.rank), **arguments},
            {"num_warps": 1},
            reaches=self.sums.of_ranks,
        )
        return [launch]

    def gather(self, x: Tensor, out: Tensor) -> list[Work]:
        from fast.kernels import allreduce as kernels  # Triton is needed from here on

        words, joined = _words(x), _words(out)
        blocks = -(-words.numel() // GATHER_PACKETS)
        launch = Launch(
            f"gather RANKS={self.size}",
            kernels.gather,
            (min(blocks, GATHER_PROGRAMS), 1, 1),
            {
                "x": words, **self.gathers.arguments(self.rank), "out": joined, "words": words.shape[1],
                "rows": len(words), "RANKS": self.size, "PACKETS": GATHER_PACKETS,
            },
            {"num_warps": 4},
            reaches=self.gathers.of_ranks,
        )  # fmt: skip
        return [launch]


class Gathered(AllReduce):
    """An all-gather of the process group moves all data."""

    kind = "all-gather"

    def _sum(
        self, part: Tensor, grid: tuple[int, int, int], arguments: dict[str, Any], scratch: Scratch
    ) -> list[Work]:
        from fast.kernels import allreduce as kernels  # Triton is needed from here on

        parts = scratch("parts", self.size, *part.shape)

        def work() -> None:
            parts.copy_(self.ranks.gather(part))

        launch = Launch(
            f"add D={part.shape[1]} RANKS={self.size}",
            kernels.add,
            grid,
            {"parts": parts, "rows": len(part), **arguments},
            {"num_warps": 1},
        )
        return [work, launch]

    def gather(self, x: Tensor, out: Tensor) -> list[Work]:
        def work() -> None:
            out.copy_(self.ranks.gather(x).transpose(0, 1).flatten(1))

        return [work]


class Slots:
    """Memory for packets on one rank.

    of_ranks: the slots of every rank, int64 [programs, 2, size, packets]. epochs [programs] int32: how
    often this rank's programs have used theirs.
    """

    def __init__(self, of_ranks: tuple[Tensor, ...], device: torch.device) -> None:
        self.of_ranks = of_ranks
        self.epochs = torch.zeros(len(of_ranks[0]), dtype=torch.int32, device=device)

    @classmethod
    def shared(cls, ranks: Ranks, device: torch.device, programs: int, packets: int) -> "Slots":
        """Slots in memory that the cards of all ranks address."""
        from torch import distributed as dist
        from torch.distributed import _symmetric_memory as symmetric

        shape = (programs, 2, ranks.size, packets)
        own: Any = symmetric.empty(*shape, dtype=torch.int64, device=device)
        own.zero_()
        group: Any = dist.group.WORLD
        handle = symmetric.rendezvous(own, group)
        every = (handle.get_buffer(rank, shape, torch.int64) for rank in range(ranks.size))
        return cls(tuple(own if rank == ranks.rank else o for rank, o in enumerate(every)), device)

    @classmethod
    def alone(cls, size: int, device: torch.device, programs: int, packets: int) -> "Slots":
        """The slots of all ranks in the memory of one process."""
        shape = (programs, 2, size, packets)
        every = (torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(size))
        return cls(tuple(every), device)

    def arguments(self, rank: int) -> dict[str, Any]:
        """A kernel's arguments on a rank."""
        own = self.of_ranks[rank]
        # To compile without memory, any address of 64 bits will do.
        addresses = tuple(slots.data_ptr() or 1 << 40 for slots in self.of_ranks)
        return {"own": own, "addresses": addresses, "epochs": self.epochs, "rank": rank}


def exchange_of(node: nn.Module) -> AllReduce | None:
    """The exchange of a node whose results the ranks add up (`qwen35.parallel.nodes.Summed`), or None for
    a node of a whole model."""
    ranks: Any = getattr(node, "ranks", None)
    if ranks is None:
        return None
    if ranks not in _MADE:
        _MADE[ranks] = of(ranks, next(node.parameters()).device)
    return _MADE[ranks]


_MADE: WeakKeyDictionary[Any, AllReduce] = WeakKeyDictionary()  # one for each group


def of(ranks: Ranks, device: torch.device) -> AllReduce:
    """The exchange of a group whose ranks compute on such devices: `OneShot` if all can share memory."""
    if all(ranks.exchange(_shares(ranks, device))):
        return OneShot.connected(ranks, device)
    return Gathered(ranks)


def _shares(ranks: Ranks, device: torch.device) -> bool:
    """Whether this rank's card can address the memory of the other cards of its host, which are enough
    for all ranks."""
    if device.type != "cuda" or torch.cuda.device_count() < ranks.size:
        return False
    others = (i for i in range(ranks.size) if i != device.index)
    return all(torch.cuda.can_device_access_peer(device, i) for i in others)


def _words(x: Tensor) -> Tensor:
    """A tensor [N, M] as 32-bit words."""
    if x.shape[1] * x.element_size() % 4:
        raise InputError(f"rows of {x.shape[1]} numbers in {x.dtype}; expected whole 32-bit words")
    return x.view(torch.int32)
