"""Builds a model from a checkpoint."""

import copy
import gc
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from qwen35.arguments import as_device, shown
from qwen35.cache import KV_CACHE_DTYPES
from qwen35.config import Config
from qwen35.errors import InputError
from qwen35.parallel.checkpoint import contents
from qwen35.parallel.nodes import joined
from qwen35.parallel.ranks import ALONE, Ranks
from qwen35.paths import check_mxfp4, choose_path
from qwen35.swap import Replacement, Swaps, as_swaps, instead, matching, outermost
from reference.model import Model
from reference.quantized import FP8Linear, MXFP4Linear
from reference.rope import rope_table
from weights.checkpoint import Checkpoint
from weights.command import UNFINISHED
from weights.entry import PLAIN, Entry
from weights.output import cut
from weights.ranks import rank_folders, without_config
from weights.shard import Plan, Shard
from weights.storage import same_values, some

TINY = Path(__file__).parent / "tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def locate(model: str | Path | None, ranks: Ranks = ALONE) -> Path:
    """Find a model's folder. model: a path, "tiny" (or None) for the embedded one, or a hub id to
    download.

    If `tools.convert --tp` wrote the folder, the result is the folder of this rank. InputError if
    there is no such model.
    """
    if model is None or str(model) == "tiny":
        return TINY
    if not isinstance(model, str | Path) or not str(model):
        raise InputError(f"model = {shown(model)}; expected 'tiny', a folder or a hub id")
    path = Path(model)
    if path.is_dir():
        if (path / "config.json").exists():
            return path
        if ranks.size > 1 and not (path / UNFINISHED).exists() and (parts := rank_folders(path)):
            if len(parts) != ranks.size:
                raise InputError(
                    f"{path}: holds the folders of {len(parts)} ranks, and --tp is {ranks.size}"
                )
            return parts[ranks.rank]
        raise InputError(without_config(path))
    if path.is_file():
        raise InputError(f"{model}: is a file; expected a folder or a hub id")
    from weights.hub import is_hub_id, one_line  # here, because the hub's client is slow to import

    if not is_hub_id(str(model)):
        raise InputError(f"{model}: no such folder (a hub id has the form owner/name)")
    from huggingface_hub import snapshot_download

    with one_line(f"{model} (no such folder here)"):
        return Path(snapshot_download(str(model), ignore_patterns=["*.bin", "*.pt", "*.pth"]))


def load(
    model: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    path: str = "reference",
    swaps: Swaps = (),
    kv_cache_dtype: str = "auto",
    moe_kernel: str = "triton",
    ranks: Ranks = ALONE,
) -> Model:
    """Build the reference model of a checkpoint, in eval mode, without gradients.

    model: "tiny" (the embedded checkpoint), a folder, or a hub id, which is downloaded.

    dtype: that of activations and dense weights, also by its name, as in "float32". None is the
    checkpoint's own. On a CPU, weights that are in this dtype already stay mapped files. Experts
    always do, in the format of the file; they are cast or decoded when a token needs them, so experts
    that no token needs are never read. Other weights in FP8 or MXFP4 are decoded here. A_log and the
    delta net's norm keep the file's float32.

    device: where the model computes.

    path: "fast" uses the fast path's layers (this needs a GPU). "auto" uses them if possible, and
    warns otherwise.

    swaps: replacements of nodes (`qwen35/swap.py`): pairs (PATTERN, class), or the command line's
    "PATTERN=MODULE:CLASS". A node is replaced as soon as its layer is loaded, so that at most one
    layer exists twice.

    kv_cache_dtype: "fp8" keeps keys and values in e4m3 (`qwen35.cache.FP8KVCache`), "auto" in the
    model's own dtype.

    moe_kernel: "hip" takes the HIP kernels for MXFP4 experts and their router (only gfx950 has them).

    ranks: the group of which this process is one rank. The model is then the part of this rank, with
    nodes that combine the ranks' results. It is read from a whole checkpoint, or from the part that
    `tools.convert --tp` wrote for the rank.

    A checkpoint without MTP tensors gives a model with `mtp` None. InputError if a tensor is missing,
    unknown or of another shape, and if a GPU has too little memory for the weights. A warning if the
    file is not quantised as its config claims.
    """
    if kv_cache_dtype not in KV_CACHE_DTYPES:
        raise InputError(
            f"kv_cache_dtype {kv_cache_dtype!r}; expected {' or '.join(KV_CACHE_DTYPES)}"
        )
    folder = locate(model, ranks)
    loader = Loader(
        folder, dtype=dtype, device=device, path=path, swaps=swaps, moe_kernel=moe_kernel, ranks=ranks
    )  # fmt: skip
    if loader.path.reason:
        warnings.warn(f"the reference path runs: {loader.path.reason}", stacklevel=2)
    check_memory(loader.nbytes, loader.device)
    built = loader.skeleton
    for stage in loader.stages:
        built.set_submodule(stage, loader.fill(stage, built.get_submodule(stage)))
    if loader.config.tie_word_embeddings:
        built.lm_head.weight = built.embed_tokens.weight  # pyright: ignore (a Parameter)
    built.folder, built.kv_cache_dtype = folder, kv_cache_dtype
    return built.eval()


def check_memory(nbytes: int, device: torch.device) -> None:
    """InputError if a GPU has too little free memory for the weights. Other devices are not
    checked."""
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    if nbytes > free:
        raise InputError(
            f"the weights take {nbytes / 1e9:.1f} GB; {device} has {free / 1e9:.1f} GB free of "
            f"{total / 1e9:.1f} GB"
        )


def _as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in (torch.float16, *DTYPES.values()):
        raise InputError(f"dtype = {shown(dtype)}; expected {', '.join(DTYPES)}")
    return found


class Loader:
    """Builds a checkpoint's model stage by stage, so that only one stage has to be in memory.

    stages: names of the modules that a pass goes through one after the other: embed_tokens, each layer,
    norm, lm_head, mtp. skeleton: the model on the meta device.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        path: str = "reference",
        swaps: Swaps = (),
        moe_kernel: str = "triton",
        ranks: Ranks = ALONE,
    ) -> None:
        dtype, device, swaps = _as_dtype(dtype), as_device(device), as_swaps(swaps)
        self.checkpoint = Checkpoint(folder, rank=ranks.rank, size=ranks.size)
        self.checkpoint.check_idle()
        try:
            stored = text_model(self.checkpoint)
            _check_count(self.checkpoint, stored)
            self.skeleton = lay_out(stored)
            self.checkpoint.check(shapes(self.skeleton))
        finally:
            warn_of_problems(self.checkpoint, stacklevel=4)
        self.whole = replace(
            self.checkpoint.whole_config,
            tie_word_embeddings=stored.tie_word_embeddings,
            mtp_num_hidden_layers=stored.mtp_num_hidden_layers,
        )
        self.config, self.ranks, self.plan = self.whole, ranks, Plan(self.whole, ranks.size)
        if ranks.size > 1:
            # Embedding and head show the whole vocabulary, so ids are checked against it.
            own = self.plan.rank_config()
            self.config = replace(own, vocab_size=self.whole.vocab_size)
            self.skeleton = lay_out(own)
            self.skeleton.config = self.config
            ranks.agree(checkpoint=contents(self.checkpoint, self.plan))
        self.dtype, self.device = dtype or own_dtype(self.checkpoint), device
        self.path = choose_path(path, self.config, device, self.dtype, moe_kernel)
        if self.path.moe_kernel == "hip":
            check_mxfp4(self.checkpoint.entries)
        layers = [f"layers.{i}" for i in range(self.config.num_hidden_layers)]
        last = ["mtp"] if self.skeleton.mtp is not None else []
        self.stages = ["embed_tokens", *layers, "norm", "lm_head", *last]
        self.swaps = self._nodes_of(swaps)
        for name, _ in self.skeleton.named_modules():
            around = [node for node in self.swaps if name.startswith(f"{node}.")]
            if around and self.plan.is_summed(name):
                raise InputError(
                    f"{around[0]} holds {name}, whose results the ranks add up; swap a node inside of it"
                )
        # The fast path replaces whole stages, except those with a node that the caller replaces.
        self.fast = {
            stage: replacement
            for stage, replacement in self._nodes_of(self.path.swaps).items()
            if not any(node == stage or node.startswith(f"{stage}.") for node in self.swaps)
        }

    @property
    def nbytes(self) -> int:
        """A lower bound of the bytes of the model's weights: experts in the format of the file,
        others in `dtype`."""
        total = 0
        for name, shape in shapes(self.skeleton).items():
            entry = self.checkpoint.entries[self._parameter(name)]
            if ".experts." in name:
                total += entry.nbytes * math.prod(shape) // math.prod(entry.shape)
            else:
                total += math.prod(shape) * _kept_dtype(name, entry.dtype, self.dtype).itemsize
        return total

    def _parameter(self, name: str) -> str:
        """The name of a parameter in the checkpoint. A tied head is the embedding."""
        tied = name == "lm_head.weight" and self.config.tie_word_embeddings
        return "embed_tokens.weight" if tied else name

    def _nodes_of(self, swaps: list[tuple[str, Replacement]]) -> dict[str, Replacement]:
        """The replacements, by the names of the nodes that they replace."""
        return {
            name: replacement
            for pattern, replacement in swaps
            if pattern != "mtp" or self.skeleton.mtp is not None
            for name in outermost(matching(self.skeleton, pattern))
        }

    def stage(self, name: str) -> nn.Module:
        """A new copy of one stage, with its weights."""
        return self.fill(name, copy.deepcopy(self.skeleton.get_submodule(name))).eval()

    def fill(self, stage: str, module: nn.Module) -> nn.Module:
        """Load the weights of a stage on the meta device, and then swap its nodes. Returns the
        stage."""
        for name in [name for name, _ in module.named_parameters()]:
            self._assign(module, name, f"{stage}.{name}")
        for node, replacement in self.swaps.items():
            if node == stage:
                module = instead(node, module, replacement)
            elif node.startswith(f"{stage}."):
                inner = node.removeprefix(f"{stage}.")
                module.set_submodule(inner, instead(node, module.get_submodule(inner), replacement))
        if self.ranks.size > 1:
            module = joined(stage, module, self.plan, self.ranks)
        # Without `instead`, since errors of the fast path keep their tracebacks.
        return self.fast[stage].from_reference(module) if stage in self.fast else module

    def _assign(self, module: nn.Module, name: str, parameter: str) -> None:
        entry = self.checkpoint.entries[self._parameter(parameter)]
        shard = self._shard(parameter, entry)
        path, _, leaf = name.rpartition(".")
        if ".experts." in parameter and entry.format != "plain":
            module.set_submodule(path, _quantized_linear(entry, shard).to(self.device))
            return
        dtype = _kept_dtype(parameter, entry.dtype, self.dtype)
        # A mapped tensor is cut first, so that bytes of other ranks are not read.
        tensor = shard.cut(entry.read(None if entry.format == "plain" else dtype)).to(dtype)
        if ".experts." not in parameter:  # experts stay mapped, also if columns are cut
            tensor = tensor.contiguous()
        weight = nn.Parameter(tensor.to(self.device), requires_grad=False)
        setattr(module.get_submodule(path), leaf, weight)

    def _shard(self, parameter: str, entry: Entry) -> Shard:
        """The part of a stored parameter that this rank takes."""
        if self.ranks.size == 1 or self.checkpoint.is_part:
            return Shard(None)
        return self.plan.shard(parameter, entry.shape, self.ranks.rank)


def warn_of_problems(checkpoint: Checkpoint, stacklevel: int) -> None:
    for problem in checkpoint.problems:
        warnings.warn(f"{checkpoint.folder}: {problem}", stacklevel=stacklevel)


def _check_count(checkpoint: Checkpoint, config: Config) -> None:
    """InputError for a config that is far too large for its file, before such a model is laid
    out."""
    layers, experts = config.num_hidden_layers, config.num_experts
    sparse = sum(map(config.is_sparse, range(layers)))
    if len(checkpoint.entries) < layers + sparse * experts:
        raise InputError(
            f"{checkpoint.folder}: {len(checkpoint.entries)} parameters in the file, too few for "
            f"{layers} layers, {sparse} of them with {experts} experts"
        )


class _WithoutValues(TorchFunctionMode):
    """Skips the initialisation of parameters. On the meta device there is nothing to initialise,
    and `normal_` of an embedding there imports torch's compiler, which takes a second."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return None
        return func(*args, **kwargs or {})


def lay_out(config: Config) -> Model:
    """The model on the meta device, without memory. Garbage collection is off meanwhile, because it
    would traverse a hundred thousand new modules again and again. InputError if tensors are too
    large."""
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.device("meta"), _WithoutValues():
            return Model(config)
    except RuntimeError as error:  # from 2^63 bytes on, even on the meta device
        raise InputError(f"config: no tensors of such sizes: {error}") from None
    finally:
        if collects:
            gc.enable()


def shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters by name. A tied head is named once, as embed_tokens."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


# Copies of the trunk's own matrices that some clients store under the MTP head.
COPIES = {
    "mtp.embed_tokens.weight": "embed_tokens.weight",
    "mtp.layers.0.embed_tokens.weight": "embed_tokens.weight",
    "mtp.lm_head.weight": "lm_head.weight",
    "mtp.layers.0.shared_head.head.weight": "lm_head.weight",
}


def text_model(checkpoint: Checkpoint) -> Config:
    """The config of the model that a checkpoint's tensors make.

    It differs from the checkpoint's config if the file has no MTP head, or a head that is not tied to
    the embedding although the config says so. Tensors that are no part of the model are moved to
    `checkpoint.ignored`. If they contradict the config, `checkpoint.problems` gets a line. If the
    checkpoint is hollow, a note says what was not compared. InputError for an MTP head with an embedding
    or a head of its own.
    """
    _compare_frequencies(checkpoint)
    config = _settle_head(checkpoint, checkpoint.config)
    mtp = [entry.stored_as for name, entry in checkpoint.entries.items() if name.startswith("mtp.")]
    if mtp and not config.mtp_num_hidden_layers:
        checkpoint.ignore("mtp.", "mtp_num_hidden_layers is 0")
        checkpoint.problems.append(
            f"mtp_num_hidden_layers is 0, and an MTP head is stored, which is not used: {some(mtp)}"
        )
    for copy_, original in COPIES.items():
        if copy_ not in checkpoint.entries:
            continue
        if config.tie_word_embeddings:
            original = "embed_tokens.weight"
        if checkpoint.is_hollow:
            checkpoint.notes.append(f"{copy_} is stored; loading compares it with {original}")
        elif not _equal(checkpoint, copy_, original):
            raise InputError(
                f"{checkpoint.folder}: {copy_} differs from {original}; an MTP head with one of its "
                "own is not read here"
            )
        checkpoint.ignore(copy_, f"the same as {original}")
    if not any(name.startswith("mtp.") for name in checkpoint.entries):
        config = replace(config, mtp_num_hidden_layers=0)
    return config


def _settle_head(checkpoint: Checkpoint, config: Config) -> Config:
    """Decide, as transformers does, what the head of a model is whose config ties it to the embedding.

    If only one of the two is stored, it serves as both. If both are stored and differ, each is used. A
    head that no index lists, which transformers does not see, does not change a model that is whole
    without it.
    """
    head = checkpoint.entries.get("lm_head.weight")
    embedding = checkpoint.entries.get("embed_tokens.weight")
    if not config.tie_word_embeddings or head is None:
        return config
    if embedding is None:
        checkpoint.entries["embed_tokens.weight"] = checkpoint.entries.pop("lm_head.weight")
        return config
    is_extra = (
        head.stored_as in checkpoint.unlisted and embedding.stored_as not in checkpoint.unlisted
    )
    is_same = not checkpoint.is_hollow and _equal(
        checkpoint, "lm_head.weight", "embed_tokens.weight"
    )
    if is_extra and not is_same:
        checkpoint.problems.append(
            "lm_head.weight is not used: tie_word_embeddings is true, and "
            f"{head.weight.file.name}, which has it, is in no index"
        )
    elif checkpoint.is_hollow:
        checkpoint.notes.append(
            "lm_head.weight is stored although tie_word_embeddings is true; loading compares it with "
            "the embedding"
        )
    elif not is_same:
        checkpoint.problems.append(
            "lm_head.weight differs from embed_tokens.weight although tie_word_embeddings is true; the "
            "file's head is used"
        )
        return replace(config, tie_word_embeddings=False)
    checkpoint.ignore("lm_head.", "the head is tied to the embedding")
    return config


def _compare_frequencies(checkpoint: Checkpoint) -> None:
    """Add a note on stored RoPE frequencies that differ from the config's. Those of the config are
    used."""
    config = checkpoint.config
    if not checkpoint.computed:
        return
    if checkpoint.is_hollow:
        names = [stored.name for stored in checkpoint.computed]
        checkpoint.notes.append(f"loading compares with the config: {some(names)}")
        return
    cos, sin = rope_table(torch.ones(1), config.rotary_dim, config.rope_theta, torch.float32)
    ours = torch.atan2(sin, cos)[0]  # the angles at position 1
    wrong: dict[str, list[str]] = {}
    for stored in checkpoint.computed:
        if stored.shape != ours.shape:
            text = f"has shape {list(stored.shape)} in the file, {list(ours.shape)} by the config"
            wrong.setdefault(text, []).append(stored.name)
            continue
        kind = torch.finfo(stored.dtype if stored.dtype in PLAIN else torch.float32)
        theirs = stored.read().float()
        step = kind.tiny * kind.eps  # between the smallest numbers
        apart = ~torch.isclose(theirs, ours, rtol=max(1e-5, kind.eps), atol=step)
        if apart.any():
            i = int(apart.nonzero()[0])
            text = f"[{i}] is {theirs[i]:.6g} in the file, {ours[i]:.6g} by the config"
            wrong.setdefault(text, []).append(stored.name)
    checkpoint.problems += [
        f"{names[0]} {text}, whose frequencies are used ({len(names)} x)"
        for text, names in wrong.items()
    ]


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether both parameters exist, are not quantised, and have the same values."""
    entries = [checkpoint.entries.get(name) for name in (one, other)]
    if any(e is None or e.format != "plain" or e.view is not None for e in entries):
        return False
    a, b = (entry.weight for entry in entries if entry is not None)
    return same_values(a, b)


def own_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The default dtype of activations and dense weights."""
    embedding = checkpoint.entries["embed_tokens.weight"]
    quantised = any(entry.format != "plain" for entry in checkpoint.entries.values())
    # float16 cannot hold MXFP4, whose scales have a larger range.
    return torch.bfloat16 if quantised and embedding.dtype.itemsize < 4 else embedding.dtype


def _kept_dtype(name: str, stored: torch.dtype, wanted: torch.dtype) -> torch.dtype:
    if ".experts." in name:
        return stored
    if name.endswith((".A_log", ".linear_attn.norm.weight")):
        return torch.promote_types(stored, wanted)
    return wanted


def _quantized_linear(entry: Entry, shard: Shard) -> MXFP4Linear | FP8Linear:
    assert entry.view is None  # experts are published whole, or as slices of a fused tensor
    weight, scale = entry.numbers()
    try:
        weight = cut(weight, shard, (1, 2) if entry.format == "mxfp4" else (1, 1))
        if entry.scale_block is not None:
            scale = cut(scale, shard, entry.scale_block)
        elif scale.numel() > 1 and shard.axis == 0:  # one a row
            scale = shard.cut(scale)
    except InputError as error:
        raise InputError(f"{entry.stored_as}: {error}; another --tp may fit") from None
    if entry.format == "mxfp4":
        return MXFP4Linear(weight, scale, entry.stored_as)
    return FP8Linear(weight, scale, entry.stored_as, entry.block)


def built_dtype(checkpoint: Checkpoint, name: str) -> torch.dtype:
    """The dtype of a parameter in the model that `load` builds. name: as in `checkpoint.entries`."""
    return _kept_dtype(name, checkpoint.entries[name].dtype, own_dtype(checkpoint))
