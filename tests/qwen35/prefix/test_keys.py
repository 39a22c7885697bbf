"""The keys themselves: files that an earlier program wrote must be found by the same hashes."""

import copy
import hashlib
import json
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from qwen35.parallel.nodes import VocabularyHead
from qwen35.parallel.ranks import Ranks
from qwen35.prefix.keys import chained, identity, processor, root_of
from qwen35.swap import swapped
from tests.support.family import small_model
from tests.support.prefix_machine import small


def test_a_block_is_hashed_with_the_hash_before_it() -> None:
    """Its 64 ids are integers of 8 bytes, the lowest byte first. Ids behind the last whole block
    are not hashed."""
    ids = [*range(1000, 1130)]
    expected = ["ab" * 32]
    for first in (0, 64):
        block = b"".join(i.to_bytes(8, "little") for i in ids[first : first + 64])
        expected.append(hashlib.sha256(bytes.fromhex(expected[-1]) + block).hexdigest())
    assert chained("ab" * 32, ids) == expected
    assert chained("ab" * 32, ids[:128]) == expected
    assert chained("ab" * 32, ids[:127]) == expected[:2]


def test_the_root_does_not_depend_on_the_order_of_the_fields() -> None:
    expected = hashlib.sha256(b'{"a": "1", "b": "2"}').hexdigest()
    assert root_of({"a": "1", "b": "2"}) == root_of({"b": "2", "a": "1"}) == expected


class Stand(nn.Module):
    @classmethod
    def from_reference(cls, module: nn.Module) -> nn.Module:
        return cls()

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_what_the_bits_depend_on() -> None:
    model = small(0)
    found = identity(model, "mark")
    nodes = found.pop("nodes")
    assert found == {
        "checkpoint": "mark",
        "dtype": str(model.dtype).removeprefix("torch."),
        "kv_cache_dtype": "auto",
        "path": "reference",
        "device": processor(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
    }
    assert len(nodes) == 16 and int(nodes, 16)
    with swapped(model, "layers.[01].mlp", Stand):
        other = identity(model, "mark")
    stands = [f"layers.{i}.mlp={__name__}.Stand" for i in (0, 1)]
    assert sorted(other["path"].split("; ")) == stands
    assert other["nodes"] != nodes
    assert json.dumps(other)  # the metadata of a file
    meta = identity(copy.deepcopy(small(0)).to("meta"), "")
    assert meta["threads"] == "" and meta["device"] == processor()


def test_a_rank_has_keys_of_its_own() -> None:
    model = copy.deepcopy(small(0))
    model.lm_head = VocabularyHead(model.lm_head, Ranks(1, 2))
    assert identity(model, "")["part"] == "rank 1 of 2"


def test_a_card_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own one of several. The number of threads does not count there."""
    model, card = small_model("27B"), torch.device("cuda", 1)
    del model._modules["embed_tokens"]
    weight = SimpleNamespace(device=card, dtype=torch.bfloat16)
    model.__dict__["embed_tokens"] = SimpleNamespace(weight=weight)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"the card {device}")
    found = identity(model, "")
    assert (found["device"], found["threads"]) == ("the card cuda:1", "")
    assert found["dtype"] == "bfloat16"
