"""The launches that are compiled for cards that are not here: which there are, and of which sizes."""

import warnings
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fast import catalogue
from fast.hip import HipLaunch
from fast.launch import Launch
from fast.layer import DecoderLayer
from fast.target import TARGETS
from qwen35.config import Config
from qwen35.errors import InputError
from qwen35.load import lay_out

META = torch.device("meta")
WHOLE = Config.published("397B-A17B")
# Of one of 8 ranks: a sixteenth of the heads of 2 keys is half of one, so each rank has a whole one.
SIZES = {
    "num_attention_heads": 32, "num_key_value_heads": 2, "linear_num_key_heads": 16,
    "linear_num_value_heads": 64, "moe_intermediate_size": 1024,
    "shared_expert_intermediate_size": 1024, "vocab_size": 248320,
}  # fmt: skip
SHARED = ("num_key_value_heads",)
# Kernels of a decode round.
ROUND = {
    "allreduce.add", "allreduce.allreduce", "allreduce.gather", "attention.attend", "attention.combine",
    "deltanet.delta", "embedding.embed", "embedding.embed_part", "embedding.mtp_input", "head.accept",
    "head.head", "head.pick", "linear.linear", "moe.down", "moe.gate_up", "norm.norm", "router.route",
}  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_a_ranks_share_has_part_of_the_heads_of_the_experts_and_of_the_vocabulary(ranks: int):
    share = catalogue.sliced(WHOLE, ranks)
    divided = {name: size // ranks for name, size in SIZES.items() if name not in SHARED}
    assert share == replace(WHOLE, **divided, num_key_value_heads=max(1, 2 // ranks))


# Value heads are a multiple of key heads, and ranks may share heads of keys.
@pytest.mark.parametrize("name", [n for n in SIZES if n not in ("linear_num_value_heads", *SHARED)])
def test_a_size_that_the_ranks_do_not_divide_is_named(name: str):
    with pytest.raises(InputError) as caught:
        catalogue.sliced(replace(WHOLE, **{name: 4}), 8)
    assert str(caught.value) == f"{name} = 4 does not divide by 8 ranks"


def built(target: str) -> tuple[list[Launch], list[tuple[Config, Any]]]:
    """The launches, and for each number of ranks the config that a model is made of, and the model."""
    models: list[tuple[Config, Any]] = []

    def build(config: Config) -> Any:
        models.append((config, lay_out(config)))
        return models[-1][1]

    return list(catalogue.launches(target, build)), models


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_and_shape_is_there_once(target: str):
    found, _ = built(target)
    names = Counter(launch.name for launch in found)
    assert set(names.values()) == {1}
    kernels = {
        f"{launch.kernel.__module__.removeprefix('fast.kernels.')}.{launch.kernel.__name__}"
        for launch in found
    }
    assert {kernel for kernel in kernels if not kernel.startswith("prefill.")} == ROUND
    for ranks in (1, 2, 4, 8):
        heads, keys = f"H={32 // ranks} G={max(1, 2 // ranks)} K=256", f"H={16 // ranks}"
        for name in (
            f"attend {heads}", f"attend {heads} FP8", f"delta {keys} HV={64 // ranks} K=128 V=128",
            f"attention_out N=4096 K={8192 // ranks}", f"gate_up D=4096 I={1024 // ranks}",
            f"down D=4096 I={1024 // ranks}", f"head N={248320 // ranks} K=4096",
            f"route N={513 + 2048 // ranks} K=4096 E=512",
        ):  # fmt: skip
            assert name in names, name
        prompts = [n for n in names if n.startswith("prefill") and f"I={1024 // ranks}" in n]
        assert bool(prompts) is (ranks in (1, 8))
        for name in (
            f"turn {heads}", f"turn {heads} FP8", f"attend {heads}", f"attend {heads} split",
            f"join {heads} last",
        ):  # fmt: skip
            assert (f"prefill {name}" in names) is (ranks in (1, 8)), name
        for kind in ("add D=4096", "allreduce D=4096", "gather", "pick"):
            assert (f"{kind} RANKS={ranks}" in names) is (ranks > 1)
        assert (f"pick N={248320 // ranks} of a part" in names) is (ranks > 1)
    for name in (
        "prefill decode G=2 K=256",
        "prefill decode G=1 K=256",
        "embed_part D=4096",
        "embed D=4096",
        "mtp_input D=4096",
        "accept DRAFTS=3",
    ):
        assert name in names


def test_the_sizes_of_a_pass():
    """Four rows, and a prompt's 2,048; room for 16,384 positions."""
    found = {launch.name: launch for launch in built("gfx950")[0]}
    assert found["embed D=4096"].grid == (4, 1, 1)
    attend = found["attend H=32 G=2 K=256"].arguments
    assert attend["keys"].shape == (2, 16_384, 256)
    added = found["add D=4096 RANKS=8"]
    assert added.grid[0] == 4 and added.arguments["parts"].shape == (8, 4, 4096)
    prompts = [launch.arguments for launch in found.values() if launch.name.startswith("prefill")]
    assert {len(given["q"]) for given in prompts if "q" in given} == {2048}
    assert (2048, 4096) in {tuple(given["x"].shape) for given in prompts if "x" in given}
    for given in prompts:
        assert {x.device for x in given.values() if isinstance(x, torch.Tensor)} == {META}
    experts = found["gate_up D=4096 I=1024"].arguments
    assert experts["weight"].shape[0] == 512


@pytest.mark.parametrize("target", TARGETS)
def test_every_layer_is_fast_and_sends_to_its_ranks(target: str):
    _, models = built(target)
    assert [len(model.layers) for _, model in models] == [4, 4, 4, 4]
    for (config, model), ranks in zip(models, (1, 2, 4, 8), strict=True):
        assert (config.num_experts, config.num_experts_per_tok) == (1, 1), "experts take memory"
        assert config.layer_types == ("linear_attention",) * 3 + ("full_attention",)
        assert model.config.num_experts == 512 and model.config.num_experts_per_tok == 10
        for layer in (*model.layers, model.mtp.layer):
            assert isinstance(layer, DecoderLayer) and layer.target == target
            block = layer.feed_forward
            assert (block.gate.top_k, block.gate.E) == (10, 512)
            assert (512, 1024 // ranks) == (block.experts.E, block.experts.I)
            assert block.experts.fp4 and block.experts.target == target
            exchange = layer.ranks
            if ranks == 1:
                assert exchange is None
                continue
            assert (exchange.rank, exchange.size) == (0, ranks)
            assert [slots.device for slots in exchange.sums.of_ranks] == [META] * ranks


def test_a_group_that_is_not_there_exchanges_nothing():
    alone = catalogue.Alone(4)
    assert (alone.rank, alone.size) == (0, 4)
    for ask in (alone.gather, alone.sum, alone.exchange):
        with pytest.raises(NotImplementedError):
            ask(torch.zeros(1))


def test_hip_kernels_come_with_tritons_for_the_same_sizes():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of the smaller model Triton's table has no sizes
        found = list(catalogue.hip_launches("gfx950"))
    names = [(isinstance(one, HipLaunch), one.name) for one in found]
    expected = []
    for ranks in (1, 2, 4, 8):
        I = 1024 // ranks
        rows = f"N={513 + 2 * I} K=4096 E=512"
        expected += [
            (True, f"router {rows}"), (True, f"experts D=4096 I={I}"), (False, f"route {rows}"),
            (False, f"gate_up D=4096 I={I}"), (False, f"down D=4096 I={I}"),
        ]  # fmt: skip
    for ranks in (1, 2, 4):
        I = 512 // ranks
        expected += [
            (True, f"router N={257 + 2 * I} K=2048 E=256"),
            (True, f"experts D=2048 I={I}"),
        ]
    assert names == expected
    assert {one.arguments["x"].shape for one in found if one.name.startswith("route")} == {
        (4, 4096), (4, 2048),
    }  # fmt: skip
    for one in found:
        tensors = [x for x in one.arguments.values() if isinstance(x, torch.Tensor)]
        assert tensors and {x.device for x in tensors} == {META}


@pytest.mark.parametrize("kernel", ["triton", "hip"])
@pytest.mark.parametrize("norm", [True, False])
def test_a_block_of_experts_has_a_models_sizes(norm: bool, kernel: str):
    config = replace(
        WHOLE, norm_topk_prob=norm, num_experts_per_tok=7,
        moe_intermediate_size=384, shared_expert_intermediate_size=512,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block = catalogue.moe_block(config, 40, "gfx950", kernel, META)
    gate, experts = block.gate, block.experts
    assert (gate.E, gate.top_k, gate.norm, gate.kernel) == (40, 7, norm, kernel)
    assert (experts.E, experts.D, experts.I, experts.kernel) == (40, 4096, 384, kernel)
    assert gate.target == experts.target == "gfx950"
    assert [*block.parameters()] and {p.device for p in block.parameters()} <= {META}
    shapes = {tuple(p.shape) for p in block.parameters() if p.dtype == torch.bfloat16}
    assert {(40 + 1 + 2 * 512, 4096), (4096, 512)} <= shapes
