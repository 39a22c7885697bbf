"""Small checkpoint folders with random weights, in every dialect of the published checkpoints.

`write` returns the parameters that a reader should find, so that no test has to trust the reader.
The packings are implemented here again, in the simplest form, independently of the loader.
Quantised weights have random codes and scales, and their values follow from the tables of the
formats.
"""

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor

from qwen35.config import Config
from qwen35.errors import InputError
from reference.model import Model
from tests.support.family import FAMILY, randomise

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
IDS = torch.arange(3, 80)[None]
TEXT_VOCAB = 320  # for the byte-level tokenizer below (261 ids), with padding
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n"
    "{% if not enable_thinking %}\n</think>\n\n{% endif %}{% endif %}"
)


@dataclass(frozen=True)
class Packing:
    """How a matrix [N, K] is quantised: what shares a scale, and the name and dtype of scales in a
    file."""

    serves: str  # "group" (32 along K, MXFP4) or, in FP8, "block", "channel", "tensor"
    scale: str = "weight_scale"
    scale_dtype: torch.dtype = torch.uint8


FP4 = Packing("group")
FP4_E8M0 = Packing("group", scale_dtype=torch.float8_e8m0fnu)
FP8 = Packing("block", "weight_scale_inv", torch.bfloat16)
FP8_QUARK = Packing("block", "weight_scale", torch.bfloat16)
FP8_CHANNEL = Packing("channel", "weight_scale", torch.float32)
FP8_CHANNEL_BF16 = Packing("channel", "weight_scale", torch.bfloat16)
FP8_TENSOR = Packing("tensor", "weight_scale", torch.float32)


@dataclass(frozen=True)
class Dialect:
    """How a checkpoint is laid out. The defaults are those of the published Qwen3.5 checkpoints."""

    prefix: str = "model.language_model."
    nested: bool = True  # config.json keeps the text model under text_config
    fused_trunk: bool = True  # experts of the trunk in two tensors per layer
    fused_mtp: bool = False
    wide: bool = True  # A_log and the delta net's norm in F32
    visual: bool = True
    shards: int = 1
    grouped: bool = False  # Qwen3-Next's in_proj_qkvz and in_proj_ba
    old_rope: bool = False  # rope_theta and partial_rotary_factor at the top level
    mtp: bool = True
    # glob patterns of module names without the prefix, and the packings of these modules
    quantized: tuple[tuple[str, Packing], ...] = ()
    claim: str = ""  # quant_method in config.json; "": no quantization_config
    excluded: tuple[str, ...] | None = None  # excluded modules; None: every plain module
    block: tuple[int, int] = (128, 128)


QWEN3_5 = Dialect()
QWEN3_6 = Dialect(fused_mtp=True, wide=False, shards=3)
QWEN3_NEXT = Dialect(
    prefix="model.", nested=False, fused_trunk=False, wide=False, visual=False, shards=2,
    grouped=True, old_rope=True,
)  # fmt: skip


def _modules(packing: Packing, *globs: str) -> tuple[tuple[str, Packing], ...]:
    return tuple((glob, packing) for glob in globs)


EXPERTS = ("layers.*.mlp.experts.*",)
MTP_EXPERTS = ("mtp.layers.*.mlp.experts.*",)
SHARED_EXPERT = ("layers.*.mlp.shared_expert.*",)
MIXERS = (
    "layers.*.self_attn.*_proj", "layers.*.linear_attn.in_proj_qkv", "layers.*.linear_attn.in_proj_z",
    "layers.*.linear_attn.out_proj",
)  # fmt: skip
QUARK_GLOBS = (
    "lm_head", "model.visual.*", "mtp.*", "*mlp.gate", "*shared_expert_gate*", "*.linear_attn.*",
    "*.self_attn.*",
)  # fmt: skip
ATTENTION_GLOBS = (
    "lm_head", "model.visual.*", "mtp.*", "*mlp.gate", "*shared_expert_gate*", "*.in_proj_[ab]",
    "*.conv1d",
)  # fmt: skip

QWEN3_5_FP8 = Dialect(
    fused_trunk=False, claim="fp8", shards=2,
    quantized=_modules(
        FP8, *MIXERS, "mtp.layers.*.self_attn.*_proj", "*.mlp.experts.*", "*.mlp.shared_expert.*"
    ),
)  # fmt: skip
QWEN3_NEXT_FP8 = replace(
    QWEN3_NEXT, claim="fp8",
    quantized=_modules(
        FP8, "*.self_attn.*_proj", "*.in_proj_qkvz", "*.out_proj", "*.mlp.experts.*",
        "*.mlp.shared_expert.*",
    ),
)  # fmt: skip
MXFP4 = Dialect(fused_trunk=False, claim="quark", shards=2, quantized=_modules(FP4, *EXPERTS))
MXFP4_MTP = replace(MXFP4, quantized=_modules(FP4, *EXPERTS, *MTP_EXPERTS))
MXFP4_SHARED = replace(
    MXFP4, quantized=_modules(FP4, *EXPERTS, *SHARED_EXPERT), excluded=QUARK_GLOBS
)
MXFP4_ATTENTION = replace(
    MXFP4_SHARED,
    quantized=MXFP4_SHARED.quantized + _modules(FP8_QUARK, *MIXERS),
    excluded=ATTENTION_GLOBS,
)
MXFP4_CHANNEL = replace(
    MXFP4_ATTENTION, quantized=MXFP4_SHARED.quantized + _modules(FP8_CHANNEL, *MIXERS)
)
# The MTP layer is plain, but not in the list. Such a repository is published.
MXFP4_V2 = replace(
    MXFP4_CHANNEL, excluded=tuple(glob for glob in ATTENTION_GLOBS if glob != "mtp.*")
)
# Sizes that are no multiples of an FP8 block. Those that MXFP4 packs are multiples of its group.
QUANTIZED_SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "hidden_size": 160,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 192,
    "shared_expert_intermediate_size": 96,
}


def parameters(config: Config, seed: int = 0) -> dict[str, Tensor]:
    """Random float32 parameters that BF16 represents exactly, so that each dialect can store
    them."""
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
    """Write a checkpoint of a family member's small shape. Returns its parameters: plain ones in
    float32, quantised ones in float64, which represents code times scale exactly.

    changes: keys of the config to be changed. tokenizer: also write tokenizer.json, the chat
    template and generation_config.json (this needs a vocabulary of TEXT_VOCAB).
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = FAMILY[member] | ({"vocab_size": TEXT_VOCAB} if tokenizer else {}) | changes
    config = Config.from_dict(sizes)
    expected = parameters(config, seed)
    if not dialect.mtp:
        expected = {n: t for n, t in expected.items() if not n.startswith("mtp.")}
    tensors = stored(expected, config, dialect, dtype)
    document = config_document(sizes, dialect)
    if dialect.claim:
        document["quantization_config"] = quantization_config(dialect, tensors)
    expected |= quantize(tensors, config, dialect, seed)
    (folder / "config.json").write_text(json.dumps(document, indent=2))
    write_tensors(folder, tensors, dialect.shards)
    if tokenizer:
        write_tokenizer(folder)
    return expected


def write_plain(
    folder: Path, expected: dict[str, Tensor], dtype: torch.dtype, sizes: dict[str, Any]
) -> None:
    """Write a plain checkpoint of these values in `dtype`. They are rounded to float32 first,
    except for float64."""
    folder.mkdir(parents=True, exist_ok=True)
    rounded = {
        name: tensor.to(dtype) if dtype == torch.float64 else tensor.float().to(dtype)
        for name, tensor in expected.items()
    }
    tensors = stored(rounded, Config.from_dict(sizes), QWEN3_5, dtype)
    (folder / "config.json").write_text(json.dumps(config_document(sizes, QWEN3_5)))
    write_tensors(folder, tensors)


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


def packing_of(name: str, dialect: Dialect) -> Packing | None:
    """The packing of the tensor with this name in the file, or None if it is plain."""
    module = name.removeprefix(dialect.prefix).removesuffix(".weight")
    fitting = (packing for glob, packing in dialect.quantized if fnmatchcase(module, glob))
    return next(fitting, None) if name.endswith(".weight") else None


def quantize(
    tensors: dict[str, Tensor], config: Config, dialect: Dialect, seed: int
) -> dict[str, Tensor]:
    """Replace the weights that the dialect quantises by random codes and scales, in place. Returns
    their values in float64, by parameter name."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name in sorted(tensors):
        packing = packing_of(name, dialect)
        if packing is None:
            continue
        shape = tuple(tensors[name].shape)
        packed, scale, value = random_packed(shape, packing, generator, dialect.block)
        tensors[name] = packed
        tensors[f"{name.removesuffix('weight')}{packing.scale}"] = scale
        values[name.removeprefix(dialect.prefix)] = value
    return ungroup_projections(values, config)


def random_packed(
    shape: tuple[int, ...],
    packing: Packing,
    generator: torch.Generator,
    block: tuple[int, int] = (128, 128),
) -> tuple[Tensor, Tensor, Tensor]:
    """Random stored weight, scale, and values [N, K] float64. All codes occur; rows have about unit
    length."""
    N, K = shape
    n, k = torch.arange(N)[:, None], torch.arange(K)
    if packing.serves == "group":
        codes = torch.randint(16, (N, K), generator=generator)
        middle = 127 - round(math.log2(3 * K**0.5))
        scale = torch.randint(middle - 2, middle + 3, (N, K // 32), generator=generator)
        packed = codes[:, 0::2] + 16 * codes[:, 1::2]  # the even element in the low nibble
        values = E2M1[codes] * 2.0 ** (scale[n, k // 32] - 127).double()
        return packed.to(torch.uint8), scale.to(torch.uint8).view(packing.scale_dtype), values
    codes = torch.randint(254, (N, K), generator=generator)
    codes += codes > 126  # 127 and 255 are NaN
    blocks = (-(-N // block[0]), -(-K // block[1]))
    size = {"block": blocks, "channel": (N, 1), "tensor": ()}[packing.serves]
    scale = (torch.rand(size, generator=generator) + 0.5) / (150 * K**0.5)
    scale = scale.to(packing.scale_dtype)
    place = {"block": (n // block[0], k // block[1]), "channel": (n, 0), "tensor": ()}
    values = E4M3[codes] * scale.double()[place[packing.serves]]
    return codes.to(torch.uint8).view(torch.float8_e4m3fn), scale, values


def _e4m3(byte: int) -> float:
    """The value of an e4m3 byte: sign, 4 exponent bits (bias 7), 3 mantissa bits. Exponent 0 is
    subnormal."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if byte & 128 else size


E4M3 = torch.tensor([_e4m3(byte) for byte in range(256)], dtype=torch.float64)
_SIZES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1 = torch.tensor(_SIZES + [-size for size in _SIZES], dtype=torch.float64)


def quantization_config(dialect: Dialect, tensors: Iterable[str]) -> dict[str, Any]:
    """The quantization_config of config.json, in the form of Qwen's FP8 repositories or of AMD's
    Quark."""
    plain = [name.removesuffix(".weight") for name in tensors if not packing_of(name, dialect)]
    excluded = sorted(plain) if dialect.excluded is None else list(dialect.excluded)
    if dialect.claim == "fp8":
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(dialect.block),
            "modules_to_not_convert": excluded,
        }
    numbers = {
        "dtype": "fp4",
        "is_dynamic": False,
        "qscheme": "per_group",
        "group_size": 32,
        "ch_axis": -1,
        "round_method": "half_even",
        "scale_type": "float",
        "scale_format": "e8m0",
        "scale_calculation_mode": "even",
        "observer_cls": "PerBlockMXObserver",
    }
    return {
        "quant_method": dialect.claim,
        "version": "0.13+unknown",
        "quant_mode": "eager_mode",
        "global_quant_config": {
            "weight": numbers,
            "input_tensors": numbers | {"is_dynamic": True},
            "output_tensors": None,
            "bias": None,
        },
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "kv_cache_quant_config": {},
        "export": {
            "pack_method": "reorder",
            "weight_format": "real_quantized",
            "kv_cache_group": [],
            "weight_merge_groups": None,
        },
        "exclude": excluded,
    }


def fuse_experts(tensors: dict[str, Tensor], chosen: Callable[[str], bool]) -> dict[str, Tensor]:
    """Fuse the matrices of separate experts into `gate_up_proj` [E, 2I, D] and `down_proj` [E, D,
    I]."""
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
    """Group the rows of the delta net's projections by key head: [q | k | v.. | z..] and [b.. |
    a..]."""
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


def ungroup_projections(tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Split `in_proj_qkvz` again. Row numbers are grouped the same way, to find where each row came
    from."""
    qkv = config.conv_dim
    rows = torch.arange(qkv + config.linear_num_value_heads * config.linear_value_head_dim)
    heads = torch.arange(config.linear_num_value_heads)
    parts = {"qkv": rows[:qkv], "z": rows[qkv:], "b": heads, "a": heads}
    grouped = group_projections({f".in_proj_{p}.weight": t for p, t in parts.items()}, config)
    found = dict(tensors)
    for name in [n for n in tensors if n.endswith(".in_proj_qkvz.weight")]:
        whole = torch.empty_like(tensors[name])
        whole[grouped[".in_proj_qkvz.weight"]] = found.pop(name)
        stem = name.removesuffix("_qkvz.weight")
        found[f"{stem}_qkv.weight"], found[f"{stem}_z.weight"] = whole[:qkv], whole[qkv:]
    return found


def write_tensors(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    """Write one file, or several shards with an index. The shards take the tensors in turn."""
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


def write_hole(file: Path, described: Mapping[str, tuple[str, Iterable[int]]]) -> int:
    """Write tensors of zeros as a hole in a sparse file. Returns the bytes of the tensors.

    described: dtype (of safetensors) and shape by name.
    """
    width = {"BF16": 2, "F32": 4, "U8": 1, "F8_E4M3": 1}
    header, offset = {}, 0
    for name, (dtype, shape) in described.items():
        end = offset + width[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        handle.truncate(8 + len(text) + offset)
    return offset


def write_index(folder: Path, weight_map: Any) -> None:
    """Write the index of a sharded checkpoint. Any weight_map is allowed, as some tests need bad
    ones."""
    document = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(document))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite the one file of a checkpoint after `change` has altered its tensors in place."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / SINGLE).items()}
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def always(folder: Path, token: int) -> None:
    """Edit a tied model so that it always generates one token. Its row of the head is the
    largest."""

    def change(tensors: dict[str, Tensor]) -> None:
        embedding = tensors["model.language_model.embed_tokens.weight"]
        embedding.zero_()
        embedding[:, 0] = 1.0
        embedding[token, 0] = 100.0
        tensors["model.language_model.norm.weight"].zero_()
        for name, tensor in tensors.items():
            if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
                tensor.zero_()

    edit_tensors(folder, change)


def edit_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON file. The value None removes a key."""
    document = json.loads(file.read_text()) if file.exists() else {}
    document |= changes
    kept = {key: value for key, value in document.items() if value is not None}
    file.write_text(json.dumps(kept))


def write_endless(folder: Path) -> Path:
    """Write a checkpoint that generates A without end, with a long context. Returns the folder."""
    write(folder, "0.8B", tokenizer=True, max_position_embeddings=200_000)
    token = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("A")
    assert token is not None
    always(folder, token)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer without merges (one id per byte), a chat template and stop
    ids."""
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


def assert_names(caught: pytest.ExceptionInfo[InputError], words: list[str]) -> None:
    """Assert that the message is one line and contains each of these words."""
    message = str(caught.value)
    assert "\n" not in message
    assert not [word for word in words if word not in message], message


def logits_of(model: Model, ids: Tensor | None = None) -> Tensor:
    """Logits [T, V] of a prompt in one pass. ids [1, T]; None is IDS, with 77 tokens."""
    with torch.inference_mode():
        return model.lm_head(model(IDS if ids is None else ids, model.new_cache()))[0]
