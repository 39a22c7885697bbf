"""`python -m tools.bench OP ...`: choose a benchmark, and run it."""

import argparse
import sys
from typing import NoReturn

from qwen35.cli import Parser, run
from tools.bench import (
    allreduce,
    busy,
    diff,
    exactness,
    generate,
    hip_port,
    language,
    mapped,
    moe,
    node,
    prefill,
    quantize,
    router,
    step,
    stream,
    ttft,
)

OPS = {
    "allreduce": allreduce,
    "busy": busy,
    "diff": diff,
    "exactness": exactness,
    "generate": generate,
    "hip_port": hip_port,
    "language": language,
    "mapped": mapped,
    "moe": moe,
    "node": node,
    "prefill": prefill,
    "quantize": quantize,
    "router": router,
    "step": step,
    "stream": stream,
    "ttft": ttft,
}


def main() -> NoReturn:
    about = (
        "Run one of the benchmarks. `python -m tools.bench OP --help` says what it measures and which "
        "options it has."
    )
    parser = Parser("python -m tools.bench", about, computes=False)
    parser.add_argument("op", choices=OPS, metavar="OP", help=f"one of {', '.join(OPS)}")
    run(parser, run_chosen, sys.argv[1:2])


def run_chosen(args: argparse.Namespace) -> NoReturn:
    """Run one benchmark with the words after its name."""
    op = OPS[args.op]
    parser = Parser(f"python -m tools.bench {args.op}", op.__doc__ or "")
    parser.add_argument("--json", action="store_true", help="print only one JSON document")
    op.add_arguments(parser)
    run(parser, op.main, sys.argv[2:])


if __name__ == "__main__":
    main()
