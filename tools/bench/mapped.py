"""Measure the first token and the memory of a large checkpoint beside the embedded one.

The times are the seconds to the first token, and the memory is the peak of anonymous memory. The
large checkpoint is a sparse file whose experts are holes that read as zeros, so it needs almost no
disk. Each run is a separate process. The large checkpoint is read once after its file has been
dropped from the page cache, and once again from the page cache. A first run is not counted, because
in a virtual machine the first use of memory is slower.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from qwen35.cli import Parser, at_least_one
from qwen35.config import Config
from qwen35.errors import InputError
from qwen35.progress import steps
from reference.model import Model
from tools.bench import report

MOST = 500  # gigabytes


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--gigabytes", type=float, default=8.0, metavar="G",
        help=f"let the large checkpoint have G gigabytes of routed experts, at most {MOST} (default: 8)",
    )  # fmt: skip
    parser.add_argument(
        "--repeats", type=at_least_one, default=3, metavar="R",
        help="measure each checkpoint R times (default: 3)",
    )  # fmt: skip


def large_config(gigabytes: float) -> dict[str, Any]:
    """The config of a trunk of 8 layers, with as many experts of 1024 x 512 as fill `gigabytes`.
    InputError if these are fewer than a token chooses, or more than MOST gigabytes."""
    hidden, inner, layers, top_k = 1024, 512, 8, 4
    each = layers * 3 * hidden * inner * 2 / 1e9
    if not top_k * each <= gigabytes <= MOST:
        raise InputError(f"--gigabytes {gigabytes:g}; expected {top_k * each:.3g} to {MOST}")
    experts = round(gigabytes / each)
    return {
        "model_type": "qwen3_5_moe_text", "vocab_size": 2048, "hidden_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 2,
        "head_dim": 128, "linear_num_key_heads": 4, "linear_num_value_heads": 16,
        "linear_key_head_dim": 64, "linear_value_head_dim": 64, "num_experts": experts,
        "num_experts_per_tok": top_k, "moe_intermediate_size": inner,
        "shared_expert_intermediate_size": inner, "mtp_num_hidden_layers": 0,
        "rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.25},
    }  # fmt: skip


def write_sparse(folder: Path, config: dict[str, Any], holes: str = ".experts.") -> int:
    """Write a checkpoint with fused experts and small random weights. Tensors whose name contains
    `holes` are holes in the file. Returns the size of the file in bytes."""
    with torch.device("meta"):
        model = Model(Config.from_dict(config))
    sizes = [config.get(n, 0) for n in ("num_experts", "moe_intermediate_size", "hidden_size")]
    shapes: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        layer, inside, _ = name.partition(".experts.")
        if inside:
            shapes[f"{layer}.experts.gate_up_proj"] = [sizes[0], 2 * sizes[1], sizes[2]]
            shapes[f"{layer}.experts.down_proj"] = [sizes[0], sizes[2], sizes[1]]
        else:
            shapes[name] = list(parameter.shape)
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        first, end = end, end + 2 * torch.Size(shape).numel()
        stored = name if name.startswith("lm_head.") else f"model.{name}"
        header[stored] = {"dtype": "BF16", "shape": shape, "data_offsets": [first, end]}
    packed = json.dumps(header).encode()
    packed += b" " * (-len(packed) % 8)
    generator = torch.Generator().manual_seed(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(packed).to_bytes(8, "little") + packed)
        start = file.tell()
        for name, entry in header.items():
            if holes not in name:
                values = torch.randn(entry["shape"], generator=generator) * 0.02
                file.seek(start + entry["data_offsets"][0])
                file.write(values.bfloat16().view(torch.uint8).numpy().tobytes())
        file.truncate(start + end)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return start + end


def first_token(folder: Path | None) -> tuple[float, int]:
    """The seconds of a process that generates one token, and its peak of anonymous memory in bytes.
    folder: None is the embedded checkpoint."""
    model = ["--model", str(folder)] if folder else []
    return report.watch(["qwen35.generate", "--prompt-ids", "5", "--max-new-tokens", "1", *model])


def evict(file: Path) -> None:
    """Drop a file from the page cache."""
    with file.open("rb+") as handle:
        os.fsync(handle.fileno())
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main(args: argparse.Namespace) -> int:
    config = large_config(args.gigabytes)
    with tempfile.TemporaryDirectory() as folder:
        large = Path(folder)
        size = write_sparse(large, config)
        first_token(large)
        runs: dict[str, list[tuple[float, int]]] = {}
        for _ in steps(range(args.repeats), "repeats"):
            runs.setdefault("embedded", []).append(first_token(None))
            evict(large / "model.safetensors")
            runs.setdefault("large, not in the page cache", []).append(first_token(large))
            runs.setdefault("large, in the page cache", []).append(first_token(large))
    rows: list[report.Row] = []
    for name, measured in runs.items():
        seconds = [s for s, _ in measured]
        rows.append({"name": name} | report.spread(seconds))
        rows[-1]["anonymous_gib"] = max(peak for _, peak in measured) / 2**30
        rows[-1]["more_than_embedded_ms"] = rows[-1]["median_ms"] - rows[0]["median_ms"]
    described = {"file_gb": size / 1e9, "experts": config["num_experts"], "layers": 8}
    report.emit("mapped", described, rows, only_json=args.json)
    return 0
