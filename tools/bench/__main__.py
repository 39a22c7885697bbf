"""Choose a benchmark: `python -m tools.bench OP ...`."""

import sys

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


def main() -> None:
    about = "Benchmarks; each has its own --help."
    choose = Parser("python -m tools.bench", about, computes=False)
    choose.add_argument("op", choices=OPS)
    op = OPS[choose.parse_args(sys.argv[1:2]).op]
    parser = Parser(f"python -m tools.bench {sys.argv[1]}", op.__doc__ or "")
    parser.add_argument("--json", action="store_true", help="print the JSON document alone")
    op.add_arguments(parser)
    run(parser, op.main, sys.argv[2:])


if __name__ == "__main__":
    main()
