"""A whole decoder layer as gfx950 code in the emulator; norms and residuals go with other launches."""

import copy

import pytest
import torch

pytest.importorskip("triton")

from fast import configs
from fast.launch import Scratch
from fast.linear import Norm, Stream, interleaved, product
from tests.support.fast_cases import CPU, TARGET, emulated, random, too_far
from tests.support.fast_nodes import a_pass, fast, fast_node, node_findings, row_findings


@pytest.mark.filterwarnings("ignore:.*is not in configs.json")
@pytest.mark.parametrize("linear", [True, False], ids=["delta net", "attention"])
@pytest.mark.parametrize("name", ["27B", "397B-A17B"])
def test_outputs_and_states(name: str, linear: bool):
    """A dense layer, and one with a single expert: of several, a near-tie might choose another."""
    sizes = {"num_experts": 1, "num_experts_per_tok": 1, "shared_expert_intermediate_size": 48}
    what = a_pass("layer", 4, name=name, linear=linear, **(sizes if name != "27B" else {}))
    assert not node_findings(what)


@pytest.mark.filterwarnings("ignore:.*is not in configs.json")
@pytest.mark.parametrize("linear", [True, False], ids=["delta net", "attention"])
def test_rows_have_the_same_bits_in_one_pass_and_in_several(linear: bool):
    sizes = {"shared_expert_intermediate_size": 48}
    assert not row_findings(a_pass("layer", 4, linear=linear, **sizes), (1, 3))


@pytest.mark.filterwarnings("ignore:.*is not in configs.json")
def test_a_nan_in_a_row_stays_in_that_row_and_is_not_hidden():
    what = a_pass("layer", 3, shared_expert_intermediate_size=48)
    clean = fast(what).out
    what.x[2, 7] = torch.nan
    dirty = fast(what).out
    assert torch.equal(dirty[:2], clean[:2]) and dirty[2].isnan().all()


def test_six_launches_with_a_delta_net_seven_with_attention():
    from tests.support.fast_nodes import slow_model

    model = copy.deepcopy(slow_model("397B-A17B", shared_expert_intermediate_size=48))
    from fast.layer import DecoderLayer
    from fast.step import Step

    for i, layer in enumerate(model.layers):
        model.layers[i] = DecoderLayer.from_reference(layer, TARGET)
    names = [work.name for work in Step(model, 32, 0).work]  # pyright: ignore
    experts = ["route N=121 K=64 E=24", "gate_up D=64 I=32 bf16", "down D=64 I=32 bf16"]
    delta = ["delta_in N=592 K=64", "delta H=2 HV=8 K=16 V=32", "delta_out N=64 K=256", *experts]
    attention = [
        "attention_in N=640 K=64", "attend H=8 G=2 K=32", "combine H=8 G=2 K=32",
        "attention_out N=64 K=256", *experts,
    ]  # fmt: skip
    assert names == [
        "embed D=64", *delta, *delta, *delta, *attention,
        "norm D=64", "head N=160 K=64", "pick N=160", "accept DRAFTS=0",
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*is not in configs.json")
@pytest.mark.parametrize("name", ["27B", "397B-A17B"])
def test_its_weights_take_no_gradients(name: str):
    for linear in (True, False):
        node = fast_node(a_pass("layer", 1, name=name, linear=linear).node)
        assert not [weight for weight, p in node.named_parameters() if p.requires_grad]


# ---- the product by itself


def test_a_product_takes_the_tables_row_of_its_own_shape(monkeypatch: pytest.MonkeyPatch):
    own = {"BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 2, "num_stages": 1}
    monkeypatch.setitem(configs.table()[TARGET], "linear", {"N=96 K=128": own})
    x, weight = torch.zeros(2, 128).bfloat16(), torch.zeros(96, 128).bfloat16()
    launch, _ = product(x, weight, TARGET, Scratch(CPU))
    assert launch.grid == (3, 1, 1) and launch.options["num_warps"] == 2


def test_gate_and_up_rows_take_turns():
    """The layers' own weights are views of the matrix."""
    gate, up = (torch.nn.Linear(8, 3, dtype=torch.bfloat16) for _ in range(2))
    both = gate.weight.clone(), up.weight.clone()
    whole = interleaved(gate, up)
    assert whole.shape == (6, 8) and not whole.requires_grad
    assert torch.equal(whole[0::2], both[0]) and torch.equal(whole[1::2], both[1])
    whole[1], whole[2] = 7, 8
    assert (up.weight[0] == 7).all() and (gate.weight[1] == 8).all()


@pytest.mark.parametrize("rows", [1, 5, 8])
@pytest.mark.parametrize(("M", "K"), [(48, 64), (50, 96), (272, 1040)])
def test_a_product_with_a_norm_before_it_a_residual_and_a_norm_after_it(rows: int, M: int, K: int):
    x, weight = random(1, rows, K).bfloat16(), (random(2, M, K) * K**-0.5).bfloat16()
    before, after = (random(3 + i, n) * 0.5 for i, n in enumerate((K, M)))
    residual = random(5, rows, M).bfloat16()
    squares = torch.zeros(2, 16)
    half = K // 2
    squares[:, :rows] = torch.stack([x[:, :half], x[:, half:]]).float().square().sum(-1)
    scaled = (x.float() * (1 + before)).bfloat16()
    stream = Stream(x, scaled, squares, 1e-6)
    launch, out = product(
        stream, weight, TARGET, Scratch(CPU), residual=residual, then=Norm(after.bfloat16(), 1e-6)
    )
    emulated([launch])

    def expected(dtype: torch.dtype) -> torch.Tensor:
        wide = x.to(dtype)
        mean = wide.double().square().mean(-1, keepdim=True)
        normed = (wide.double() * torch.rsqrt(mean + 1e-6) * (1 + before)).to(dtype)
        return residual.to(dtype) + normed @ weight.to(dtype).T

    assert not too_far(out.x, expected(torch.bfloat16), expected(torch.float64))
    again = (out.x.float() * (1 + after.bfloat16().float())).bfloat16()
    assert torch.equal(out.scaled, again)
    sums = out.squares[:, :rows].double().sum(0)
    assert torch.allclose(sums, out.x.double().square().sum(-1), rtol=1e-5)
    assert not out.squares[:, rows:].any()
