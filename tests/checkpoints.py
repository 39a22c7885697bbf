"""Small checkpoint folders of random weights, in every dialect that the family is published in.

`write` returns the parameters that a reader should find, so that no test has to trust the reader.
The packings are written a second time here, in the plainest form, not borrowed from the loader.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor

from qwen35.config import Config
from reference.model import Model
from tests.family import FAMILY, randomise

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
TEXT_VOCAB = 320  # a head for the byte-level tokenizer below (261 ids), with rows of padding
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n"
    "{% if not enable_thinking %}\n</think>\n\n{% endif %}{% endif %}"
)


@dataclass(frozen=True)
class Dialect:
    """How a checkpoint is laid out; the defaults are those of the published Qwen3.5."""

    prefix: str = "model.language_model."
    nested: bool = True  # config.json keeps the text model under text_config
    fused_trunk: bool = True  # experts of the trunk in two tensors a layer
    fused_mtp: bool = False
    wide: bool = True  # A_log and the delta net's norm in F32
    visual: bool = True
    shards: int = 1
    grouped: bool = False  # Qwen3-Next's in_proj_qkvz and in_proj_ba
    old_rope: bool = False  # rope_theta and partial_rotary_factor at the top level
    mtp: bool = True


QWEN3_5 = Dialect()
QWEN3_6 = Dialect(fused_mtp=True, wide=False, shards=3)
QWEN3_NEXT = Dialect(
    prefix="model.", nested=False, fused_trunk=False, wide=False, visual=False, shards=2,
    grouped=True, old_rope=True,
)  # fmt: skip


def parameters(config: Config, seed: int = 0) -> dict[str, Tensor]:
    """Random values that BF16 holds exactly, as float32, so that each dialect can store them."""
    model = Model(config)
    randomise(model, seed)
    return {name: p.detach().bfloat16().float() for name, p in model.named_parameters()}


def write(
    folder: Path,
    member: str = "35B-A3B",
    dialect: Dialect = QWEN3_5,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    tokenizer: bool = False,
    **changes: Any,
) -> dict[str, Tensor]:
    """Write a checkpoint of a family member's small shape; return its parameters in float32.

    changes: keys of the config to be set otherwise. tokenizer: also write tokenizer.json, the chat
    template and generation_config.json (this needs a vocabulary of TEXT_VOCAB).
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = FAMILY[member] | ({"vocab_size": TEXT_VOCAB} if tokenizer else {}) | changes
    config = Config.from_dict(sizes)
    expected = parameters(config, seed)
    if not dialect.mtp:
        expected = {n: t for n, t in expected.items() if not n.startswith("mtp.")}
    (folder / "config.json").write_text(json.dumps(config_document(sizes, dialect), indent=2))
    write_tensors(folder, stored(expected, config, dialect, dtype), dialect.shards)
    if tokenizer:
        write_tokenizer(folder)
    return expected


def config_document(sizes: dict[str, Any], dialect: Dialect) -> dict[str, Any]:
    """`config.json`, flat or nested, with the rope numbers where the dialect keeps them."""
    text = dict(sizes)
    if dialect.old_rope:
        rope = text.pop("rope_parameters")
        text |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor")}
    if not dialect.nested:
        return text
    return {
        "model_type": text["model_type"].removesuffix("_text"),
        "tie_word_embeddings": text.pop("tie_word_embeddings"),
        "text_config": text,
    }


def stored(
    tensors: dict[str, Tensor], config: Config, dialect: Dialect, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of the file, by their names in the file."""
    packed = dict(tensors)
    if dialect.fused_trunk:
        packed = fuse_experts(packed, lambda name: not name.startswith("mtp."))
    if dialect.fused_mtp:
        packed = fuse_experts(packed, lambda name: name.startswith("mtp."))
    if dialect.grouped:
        packed = group_projections(packed, config)

    def as_stored(name: str, tensor: Tensor) -> Tensor:
        exact = dialect.wide and name.endswith((".A_log", ".linear_attn.norm.weight"))
        return tensor.to(torch.float32 if exact else dtype).contiguous().clone()

    def file_name(name: str) -> str:
        return name if name.startswith(("mtp.", "lm_head.")) else dialect.prefix + name

    named = {file_name(name): as_stored(name, tensor) for name, tensor in packed.items()}
    if dialect.visual:
        named["model.visual.patch_embed.proj.weight"] = torch.ones(4, 3, 2, 2, 2, dtype=dtype)
        named["model.visual.blocks.0.norm1.bias"] = torch.ones(4, dtype=dtype)
        named["model.visual.merger.linear_fc1.weight"] = torch.ones(4, 4, dtype=dtype)
    return named


def fuse_experts(tensors: dict[str, Tensor], chosen: Callable[[str], bool]) -> dict[str, Tensor]:
    """Per-expert matrices as `gate_up_proj` [E, 2I, D] and `down_proj` [E, D, I]."""
    fused = {n: t for n, t in tensors.items() if ".experts." not in n or not chosen(n)}
    blocks = sorted({n.split(".experts.")[0] for n in tensors if ".experts." in n and chosen(n)})
    for block in blocks:
        gate_up, down, e = [], [], 0
        while f"{block}.experts.{e}.gate_proj.weight" in tensors:
            stem = f"{block}.experts.{e}"
            gate, up = tensors[f"{stem}.gate_proj.weight"], tensors[f"{stem}.up_proj.weight"]
            gate_up.append(torch.cat([gate, up]))
            down.append(tensors[f"{stem}.down_proj.weight"])
            e += 1
        fused[f"{block}.experts.gate_up_proj"] = torch.stack(gate_up)
        fused[f"{block}.experts.down_proj"] = torch.stack(down)
    return fused


def group_projections(tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Rows of the delta net's projections by key head: [q | k | v.. | z..] and [b.. | a..]."""
    H, HV = config.linear_num_key_heads, config.linear_num_value_heads
    K, V = config.linear_key_head_dim, config.linear_value_head_dim
    shared = HV // H
    grouped = dict(tensors)
    for name in [n for n in tensors if n.endswith(".in_proj_qkv.weight")]:
        stem = name.removesuffix("_qkv.weight")
        qkv, z, b, a = (grouped.pop(f"{stem}_{part}.weight") for part in ("qkv", "z", "b", "a"))
        q, k, v = qkv[: H * K], qkv[H * K : 2 * H * K], qkv[2 * H * K :]
        qkvz, ba = [], []
        for head in range(H):
            keys = slice(head * K, (head + 1) * K)
            values = slice(head * shared * V, (head + 1) * shared * V)
            strengths = slice(head * shared, (head + 1) * shared)
            qkvz += [q[keys], k[keys], v[values], z[values]]
            ba += [b[strengths], a[strengths]]
        grouped[f"{stem}_qkvz.weight"] = torch.cat(qkvz)
        grouped[f"{stem}_ba.weight"] = torch.cat(ba)
    return grouped


def write_tensors(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    """One file, or shards that take the tensors in turn, with an index."""
    if shards == 1:
        save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
        return
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)


def write_index(folder: Path, weight_map: Any) -> None:
    """The index of a sharded checkpoint (any content: tests write bad ones too)."""
    document = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(document))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite the one file of a checkpoint after `change` has altered its tensors in place."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / SINGLE).items()}
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def edit_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None takes a key out."""
    document = json.loads(file.read_text()) if file.exists() else {}
    document |= changes
    kept = {key: value for key, value in document.items() if value is not None}
    file.write_text(json.dumps(kept))


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges (an id a byte), a template and stop ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL[:3]])
    backend.add_tokens([AddedToken(token, normalized=False) for token in SPECIAL[3:]])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    end, _, turn_end = (backend.token_to_id(token) for token in SPECIAL[:3])
    edit_json(folder / "generation_config.json", eos_token_id=[turn_end, end])
