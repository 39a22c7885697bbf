"""The outline of a conversion: the files that it will write, with their sizes on the disk."""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from weights.checkpoint import Checkpoint
from weights.hub import BESIDE, WEIGHTS
from weights.output import Item, Options, OutputFile, arrange, fit, items_of
from weights.quantization import PREFIX, fp8_claim, mxfp4_claim, name_pattern
from weights.ranks import REPORT, folder_names
from weights.shard import Plan, Shard
from weights.source import Source
from weights.storage import DTYPE_NAMES, INDEX, Stored, header, same_values

BLOCK = 4096  # bytes in which a file takes space on the disk
OF_A_KIND = 1024  # upper bound of bytes in the report per kind of tensor, without its name
ENDS = ("embed_tokens.weight", "lm_head.weight")


class Outline:
    """The plan of everything that a conversion writes.

    files: the files of a rank, in order; they are alike on all ranks.
    folders: the ranks' folders below the target, or one, "", if there is one rank.
    total: the bytes of all tensors of all ranks.
    beside: the small files of the source that are copied.

    check: called with the source before anything else; its exceptions pass. InputError as in
    `Checkpoint` for bad input, and as in `weights.output.fit` for tensors that cannot be cut so.
    """

    def __init__(
        self, source: Source, options: Options, check: Callable[[Checkpoint], object]
    ) -> None:
        self.source, self.options = source, options
        self.checkpoint = Checkpoint(source.folder, is_hollow=source.is_hollow)
        check(self.checkpoint)
        items = items_of(self.checkpoint, options)
        held = fit(items, self.checkpoint.config, options.tp)
        self.files = arrange(held, options.shard_bytes)
        self.ranks = Plan(self.checkpoint.config, options.tp)
        self.folders = folder_names(options.tp) if options.tp > 1 else [""]
        self.total = sum(file.nbytes for file in self.files) * options.tp
        self.beside = [
            file
            for file in sorted(self.checkpoint.beside.iterdir())
            if file.name.endswith(BESIDE) and file.name not in ("config.json", INDEX, REPORT)
            if file.is_file()
        ]

    def name(self, number: int) -> str:
        """The name of an output file, which is the same for all ranks."""
        return f"model-{number + 1:05d}-of-{len(self.files):05d}{WEIGHTS}"

    def header(self, file: OutputFile) -> bytes:
        return header([(slot.name, slot.dtype, slot.shape) for slot in file.slots])

    def shard(self, item: Item, rank: int) -> Shard:
        """The part of an item that a rank holds."""
        if self.options.tp == 1:
            return Shard(None)
        return self.ranks.shard(item.name, item.entry.shape, rank)

    def index(self) -> str:
        """The index of a rank's folder, as JSON."""
        size = sum(file.nbytes for file in self.files)
        index = {
            "metadata": {"total_size": size},
            "weight_map": dict(sorted(self.file_names().items())),
        }
        return json.dumps(index, indent=2)

    def config(self, rank: int, *, is_tied: bool) -> dict[str, Any]:
        """The source's config.json, changed to describe the formats and the head of the output."""
        document = dict(self.checkpoint.document)
        document.pop("quantization_config", None)
        if isinstance(text := document.get("text_config"), dict):
            document["text_config"] = {k: v for k, v in text.items() if k != "quantization_config"}
        if self.checkpoint.config.tie_word_embeddings and not is_tied:
            document["tie_word_embeddings"] = False
            if "tie_word_embeddings" in document.get("text_config", {}):
                document["text_config"]["tie_word_embeddings"] = False
        if self.options.to == "mxfp4":
            claim = mxfp4_claim(self._excluded(), self.options.activations)
            document["quantization_config"] = claim
        elif self.options.to == "fp8":
            document["quantization_config"] = fp8_claim(self._excluded())
        if self.options.tp > 1:
            document["tensor_parallel"] = {"rank": rank, "size": self.options.tp}
        return document

    def is_tied(self, written: Callable[[str, str], Stored]) -> bool:
        """Whether the config ties the head to the embedding, and the written head has the same values.

        written: a function that returns a tensor of the output, by a rank's folder and its name.
        """
        if not self.checkpoint.config.tie_word_embeddings:
            return False
        ends = [name for name in self.file_names() if PREFIX.sub("", name) in ENDS]
        if len(ends) < len(ENDS):
            return True
        pairs = ([written(folder, name) for name in ends] for folder in self.folders)
        return all(same_values(one, other) for one, other in pairs)

    def file_names(self) -> dict[str, str]:
        """The file of each tensor of the output, which is the same for all ranks."""
        return {
            slot.name: self.name(number)
            for number, file in enumerate(self.files)
            for slot in file.slots
        }

    def _excluded(self) -> list[str]:
        """The modules with an unquantised matrix or convolution, by their names in the file. Fused
        experts are listed one by one, because engines look up each."""
        excluded = ["lm_head"]
        for item in (item for file in self.files for item, _ in file.items):
            is_quantised = item.format == self.options.to
            if is_quantised or len(item.entry.shape) < 2 or "embed_tokens" in item.name:
                continue
            bare = PREFIX.sub("", item.name)
            if bare in self.checkpoint.run_time:
                continue
            is_fused = item.name == item.entry.stored_as and item.entry.is_fused_experts
            names = self.checkpoint.parts[item.name] if is_fused else [bare]
            prefix = item.name.removesuffix(bare)
            excluded += [prefix + name.removesuffix(".weight") for name in names]
        return list(dict.fromkeys(excluded))

    # --- room -----------------------------------------------------------------------------------------

    def room(self, left: list[int]) -> int:
        """An upper bound of the disk space that a conversion still needs, in bytes.

        left: numbers of the files that are not there yet.
        """
        todo = [self.files[number] for number in left]
        weights = sum(_on_disk(len(self.header(file)) + file.nbytes) for file in todo)
        kinds = {number: self._kinds(self.files[number]) for number in range(len(self.files))}
        notes = sum(_on_disk(_said(kinds[number])) for number in left)
        report = _said({kind for found in kinds.values() for kind in found})
        config = len(json.dumps(self.config(0, is_tied=False), indent=2))
        small = [len(self.index()), config, report, *(f.stat().st_size for f in self.beside)]
        of_a_rank = weights + sum(map(_on_disk, small)) + BLOCK  # and the folder itself
        traces = 4 * BLOCK  # the folder UNFINISHED, the task and the lock
        return of_a_rank * self.options.tp + notes + traces + self.source.room()

    def _kinds(self, file: OutputFile) -> set[str]:
        """The kinds of tensors in a file that change their format, as the report names them."""
        changed = [item.name for item, _ in file.items if item.to != "copy"]
        return {name_pattern(PREFIX.sub("", name)) for name in changed}

    def describe(self) -> dict[str, Any]:
        """The document that `tools.convert --dry-run` prints, without the keys about the target."""
        nbytes: Counter[str] = Counter()
        for file in self.files:
            for slot in file.slots:
                nbytes[DTYPE_NAMES[slot.dtype]] += slot.nbytes * self.options.tp
        becomes = Counter(item.to for file in self.files for item, _ in file.items)
        return {
            "folders": [folder for folder in self.folders if folder],
            "files": [
                {
                    "file": self.name(number),
                    "tensors": len(file.slots),
                    "bytes": len(self.header(file)) + file.nbytes,
                }
                for number, file in enumerate(self.files)
            ],
            "beside": ["config.json", INDEX, REPORT, *(file.name for file in self.beside)],
            "parameters": dict(becomes),
            "bytes_by_dtype": dict(nbytes),
            "bytes": self.total,
        }


def _on_disk(nbytes: int) -> int:
    return -(-nbytes // BLOCK) * BLOCK


def _said(kinds: set[str]) -> int:
    """An upper bound of the bytes of a note on these kinds of tensors."""
    return OF_A_KIND + sum(OF_A_KIND + len(kind) for kind in kinds)
