"""The ranks of one model: started by torchrun, one process each.

`on_ranks` runs a command line's main on each of them. Tensors are exchanged by torch.distributed
(`reduce.py`), and other values as JSON in its store (`store.py`). `watch.py` ends all ranks if one
fails.
"""

import argparse
import hashlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from qwen35.arguments import from_environment
from qwen35.cli import Parser, counted, installed
from qwen35.errors import InputError
from qwen35.parallel.reduce import AllGather, Transport
from qwen35.parallel.store import JOIN_S, Connection
from qwen35.parallel.watch import RankLostError, Watch
from weights.shard import SIZES

# How long a collective waits for a live rank that does not join it.
COLLECTIVE = timedelta(minutes=10)
SOURCES = ("qwen35", "reference", "fast", "weights", "tools")
T = TypeVar("T")


class Ranks:
    """The rank of this process in its group. `ALONE` is a group of one, which needs no
    connection."""

    def __init__(
        self, rank: int = 0, size: int = 1, transport: Transport | None = None,
        connection: Connection | None = None,
    ) -> None:  # fmt: skip
        self.rank, self.size = rank, size
        self.transport, self.connection = transport, connection
        self.exchanges = 0

    def __repr__(self) -> str:
        return f"Ranks(rank {self.rank} of {self.size})"

    def gather(self, x: Tensor) -> Tensor:
        """The tensors of all ranks, in their order: [ranks, *x.shape]. Shapes and dtypes have to be
        equal."""
        return x[None] if self.transport is None else self._joined(self.transport.gather, x)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of the ranks' tensors. They are added in the order of ranks in float32, and
        rounded once."""
        return x if self.transport is None else self._joined(self.transport.sum, x)

    def _joined(self, operation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        try:
            return operation(x)
        except RuntimeError as error:  # the connection to another rank broke
            raise RankLostError(str(error).splitlines()[0]) from error

    def exchange(self, value: Any, wait_s: float | None = None) -> list[Any]:
        """The values of all ranks, in their order, sent as JSON. wait_s: seconds after which a
        missing value is an InputError; None: wait as long as all ranks live."""
        if self.connection is None:
            return [value]
        self.exchanges += 1
        return self.connection.exchange(f"value/{self.exchanges}", value, wait_s)

    def share(self, make: Callable[[], T]) -> T:
        """Return the result of `make` on rank 0 on every rank, sent as JSON. It serves input that only
        one process can read."""
        if self.connection is None:
            return make()
        return self.exchange(make() if self.rank == 0 else None)[0]

    def agree(self, **values: Any) -> None:
        """InputError, with its name, for the first of these values that differs between ranks."""
        everyone = self.exchange(values, JOIN_S)
        for name, ours in everyone[0].items():
            for rank, theirs in enumerate(everyone):
                if theirs[name] != ours:
                    raise InputError(
                        f"{name} is {ours} on rank 0 and {theirs[name]} on rank {rank}"
                    )


ALONE = Ranks()


def add_ranks(parser: Parser) -> None:
    """Add the option `--tp` to a command line whose main runs by `on_ranks`."""
    parser.add_argument(
        "--tp", type=int, choices=SIZES, default=1, metavar="N",
        help="share the model among N processes that torchrun has started (tensor parallel; default: 1)",
    )  # fmt: skip
    parser.set_defaults(ranks=ALONE)


def on_ranks(
    parser: Parser, main: Callable[[argparse.Namespace], int]
) -> Callable[[argparse.Namespace], int]:
    """A function that runs `main(args)` on each rank, with its group in `args.ranks`. Only rank 0
    prints.

    An error on one rank ends all ranks: rank 0 prints it in one line, and each exits with its
    status.
    """

    def run(args: argparse.Namespace) -> int:
        size = started_by_torchrun()
        if size == 1 and args.tp == 1:
            return main(args)
        if size == 1:
            module = parser.prog.removeprefix("python -m ")
            words = shlex.join(sys.argv[1:])
            raise InputError(
                f"--tp {args.tp} needs {args.tp} processes: "
                f"torchrun --nproc-per-node {args.tp} -m {module} {words}"
            )
        with group(parser.prog, size, args) as args.ranks:
            return main(args)

    return run


def started_by_torchrun() -> int:
    """The number of processes that torchrun has started, of which this is one; 1 without it."""
    return from_environment("WORLD_SIZE", "1") if "RANK" in os.environ else 1


@contextmanager
def group(prog: str, size: int, args: argparse.Namespace) -> Iterator[Ranks]:
    """Join the group of torchrun's environment for a block, and leave it together with the other
    ranks.

    prog: the command, for errors. size: as `started_by_torchrun` says. args: with tp and debug, and
    with a device if it is not the CPU, which becomes that of this rank.
    """
    rank = from_environment("RANK")
    if rank >= size:
        raise InputError(f"RANK = {rank} and WORLD_SIZE = {size}; expected a rank below the size")
    with Watch(prog, rank, debug=args.debug) as watch:
        if not dist.is_available():
            raise InputError(
                f"torch {torch.__version__} has no torch.distributed, which --tp needs"
            )
        connection = watch.start(lambda: connect(rank, size))
        ranks = Ranks(rank, size, None, connection)
        device = place(args)
        ranks.agree(**versions(device))
        ranks.agree(**given(args))
        if args.tp != size:
            raise InputError(f"--tp {args.tp}, but torchrun started {size} processes")
        dist.init_process_group(
            backend_of(device), store=connection.part("transport"), rank=rank, world_size=size,
            timeout=COLLECTIVE, device_id=device if device.type == "cuda" else None,
        )  # fmt: skip
        ranks.transport = AllGather(size)
        yield ranks
    dist.destroy_process_group()


def connect(rank: int, size: int) -> Connection:
    """Connect to the group's store at the address in torchrun's environment."""
    host, port = os.environ.get("MASTER_ADDR"), from_environment("MASTER_PORT")
    if not host or not 0 < port < 1 << 16:
        raise InputError(
            f"MASTER_ADDR = {host!r} and MASTER_PORT = {port} do not say where rank 0 is"
        )
    is_kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Connection(rank, size, host, port, is_kept=is_kept)


def place(args: argparse.Namespace) -> torch.device:
    """The device of this rank. For CUDA it is the GPU of the local rank, and is stored in
    `args.device`."""
    asked: torch.device = getattr(args, "device", torch.device("cpu"))
    if asked.type != "cuda":
        return torch.device("cpu")
    if asked.index is not None:
        raise InputError(f"--device {asked}: each rank takes a card of its own; give --device cuda")
    local, cards = from_environment("LOCAL_RANK", "0"), torch.cuda.device_count()
    if local >= cards:
        raise InputError(
            f"--device cuda: local rank {local} needs cuda:{local}; "
            f"this host has {counted(cards, 'card')}"
        )
    args.device = torch.device("cuda", local)
    torch.cuda.set_device(local)
    return args.device


def backend_of(device: torch.device) -> str:
    """The backend of torch.distributed for a device. InputError if this torch lacks it."""
    name = "nccl" if device.type == "cuda" else "gloo"
    if not (dist.is_nccl_available() if name == "nccl" else dist.is_gloo_available()):
        raise InputError(
            f"torch {torch.__version__} has no {name}, which --tp needs on {device.type}"
        )
    return name


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The options as JSON, to be compared over ranks. Paths may differ, so only whether they are
    given counts."""
    paths = ("model", "prefix_cache", "prompt_file", "requests", "report")
    own = ("ranks", "debug", "device", "command")
    values = {n: v is not None if n in paths else v for n, v in vars(args).items() if n not in own}
    return {
        f"--{n.replace('_', '-')}": json.loads(json.dumps(v, default=str))
        for n, v in values.items()
    }


def versions(device: torch.device) -> dict[str, str]:
    """The facts that the bits depend on, except the checkpoint and the arguments."""
    from qwen35.prefix.keys import processor  # here: it imports the nodes, which import this file

    is_card = device.type == "cuda"
    return {
        "version": f"{installed('qwen35')} ({sources()})",
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if is_card else processor(),
    }


def sources() -> str:
    """Eight hex digits of the project's own Python files."""
    root, total = Path(__file__).parents[2], hashlib.sha256()
    for file in sorted(file for package in SOURCES for file in (root / package).rglob("*.py")):
        total.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return total.hexdigest()[:8]
