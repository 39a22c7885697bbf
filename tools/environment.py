"""`python -m tools.environment`: print versions, processor and GPU of this machine for a bug report."""

import argparse
import os
import platform

import torch

from qwen35.cli import Parser, installed, print_json, run
from qwen35.prefix.keys import processor

PACKAGES = (
    "qwen35", "torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "einops",
    "huggingface-hub",
)  # fmt: skip


def build_parser() -> Parser:
    parser = Parser(
        "python -m tools.environment",
        "Print versions, the processor and the GPU of this machine, for a bug report.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def environment() -> dict[str, str]:
    """Facts by name. The version of a missing package is "not installed"."""
    found = {name: installed(name) for name in PACKAGES}
    found["python"] = platform.python_version()
    found["system"] = platform.platform()
    found["processor"] = processor()  # with the instruction set that torch uses
    found["cores"] = str(os.cpu_count())
    found["threads"] = str(torch.get_num_threads())
    found["waiting"] = waiting()
    found["GPU"] = _gpu()
    return found


def waiting() -> str:
    """How torch's threads wait for each other, from the variables that libgomp reads."""
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    return ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none"
    driver = torch.version.hip or torch.version.cuda
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{', '.join(names)}; {'HIP' if torch.version.hip else 'CUDA'} {driver}"


def main(args: argparse.Namespace) -> int:
    found = environment()
    if args.json:
        print_json(found)
    else:
        width = max(map(len, found))
        for name, value in found.items():
            print(f"{name:{width}}  {value}")
    return 0


if __name__ == "__main__":
    run(build_parser(), main)
