"""The fast mixture of experts as gfx950 code in the emulator, beside the reference; what it refuses."""

import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

import fast.attention
import fast.kernels.attention
import fast.kernels.moe
import fast.moe
import reference.moe
from fast import configs
from fast.launch import Scratch
from fast.moe import MLP, Experts, SparseMoeBlock
from fast.router import Router
from qwen35.errors import InputError
from qwen35.swap import swap, swapped
from reference.model import Model
from reference.quantized import FP8Linear
from tests.support.family import randomise
from tests.support.fast_cases import (
    CPU,
    TARGET,
    bits,
    case,
    config,
    emulated,
    exact_router,
    exact_rows,
    fast_block,
    fast_experts,
    findings,
    launches_of,
    output,
    picks,
    quantised,
    quiet_router,
    random,
    repeated_work,
    routing,
    slow_block,
    slow_experts,
    too_far,
    waits_for_stores,
)
from tools.gfx950.target import compile_launch
from weights import fp8, layout, words

Refused = Callable[[Callable[[], object]], str]


@pytest.fixture
def refused() -> Refused:
    """The message of the InputError that a call raises, which must be one line."""

    def message(call: Callable[[], object]) -> str:
        with pytest.raises(InputError) as caught:
            call()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return message


# ---- numbers


@pytest.mark.parametrize("rows", range(1, 9))
def test_no_row_is_off_by_more_than_twice_the_bf16_references_error(rows: int):
    assert not findings(case(routing("random", rows, 3, 24), seed=rows))


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("scale", [1.0, 0.01])
@pytest.mark.parametrize("kind", ["same", "different", "overlapping", "twice", "ends"])
def test_whatever_the_rows_choose(kind: str, scale: float, residual: bool):
    assert not findings(case(routing(kind, 5, 3, 24), scale=scale, residual=residual))


@pytest.mark.parametrize("I", [256, 512, 1024])
def test_every_slice_of_an_expert_that_a_rank_may_hold(I: int):
    assert not findings(case(routing("overlapping", 2, 2, 3), E=3, I=I))


@pytest.mark.parametrize(("D", "I"), [(384, 128), (256, 384), (640, 128), (256, 96), (256, 160)])
def test_sizes_that_the_tables_blocks_do_not_divide(D: int, I: int):
    """96 and 160 are padded to multiples of 128."""
    assert not findings(case(routing("overlapping", 2, 2, 3), E=3, D=D, I=I))


def test_the_real_hidden_size():
    """The sizes of one of 8 ranks of the 397B, in the configuration that the table has for them."""
    assert not findings(case(routing("overlapping", 4, 2, 3), E=3, D=4096, residual=True))


def test_eight_rows_of_ten_experts_each():
    assert not findings(case(routing("overlapping", 8, 10, 24), residual=True))


def test_as_many_pairs_as_there_may_be():
    assert not findings(case(routing("same", 8, 16, 24)))


def test_an_experts_weights_are_read_once_however_many_rows_chose_it():
    assert not repeated_work(4, 3)


# ---- bits


@pytest.mark.parametrize("kind", ["random", "returning"])
def test_a_rows_bits_do_not_depend_on_the_rows_beside_it_or_on_who_arrives_last(kind: str):
    chosen = case(routing(kind, 4, 3, 24), residual=True, cancelling=kind == "returning")
    assert not bits(chosen, batches=(1, 5))


def test_waves_in_random_order_give_equal_bits():
    chosen = case(routing("returning", 2, 3, 24), cancelling=True)
    assert not bits(chosen, seeds=(1, 2), rows=False)


def test_a_second_run_needs_no_preparation():
    """The counters are left as they were found."""
    chosen = case(routing("random", 4, 3, 24))
    first = output(chosen)
    launches, again = launches_of(chosen)
    emulated(launches)
    assert torch.equal(again, first)


def test_every_wave_waits_for_its_stores_before_the_counter_is_raised():
    """The wave that raises it waits for its own stores alone. The emulator, in which a store completes at
    once, cannot show it."""
    launches, _ = launches_of(case(routing("random", 4, 3, 24)))
    assert waits_for_stores(compile_launch(launches[1], TARGET))


# ---- swapped into a model


class OnGfx950:
    """Packs a class for the card, wherever the model is."""

    @classmethod
    def from_reference(cls, module: nn.Module) -> SparseMoeBlock:
        return SparseMoeBlock.from_reference(module, target=TARGET)


@pytest.fixture
def tiny() -> Model:
    """Four layers whose experts the kernels can take."""
    model = Model(config(4, 1024, 128, top_k=2, shared=256))
    randomise(model, 0)
    return model.to(torch.bfloat16).eval().requires_grad_(False)


@pytest.mark.filterwarnings("ignore:.*is not in configs.json")
def test_swapping_every_block_of_a_model(tiny: Model, refused: Refused):
    before = tiny.layers[3].mlp
    with swapped(tiny, "layers.*.mlp", OnGfx950) as names:
        assert names == [f"layers.{i}.mlp" for i in range(4)]
        shown = str(tiny.layers)  # three alike are shown as one
        assert shown.count("1024 -> top 2 of 4, and a shared expert of 256, gfx950") == 2
        assert shown.count("(experts): Experts(4 of 1024 -> 128 -> 1024, bf16, gfx950)") == 2
        assert isinstance(tiny.layers[3].mlp, SparseMoeBlock)
        ids = torch.tensor([[1, 2, 3]])
        message = refused(lambda: tiny(ids, tiny.new_cache()))
        assert message == "the fast path runs on gfx950 and sm_90; this is cpu"
    assert tiny.layers[3].mlp is before
    assert isinstance(before.experts, reference.moe.Experts)


@pytest.mark.filterwarnings("ignore:.*is not in configs.json")
def test_experts_and_router_may_be_swapped_by_themselves(tiny: Model, refused: Refused):
    class Only:
        def __init__(self, kind: type) -> None:
            self.kind = kind

        def from_reference(self, module: nn.Module) -> nn.Module:
            return self.kind.from_reference(module, TARGET)

    assert swap(tiny, "layers.0.mlp.experts", Only(Experts)) == ["layers.0.mlp.experts"]
    assert swap(tiny, "layers.1.mlp.gate", Only(Router)) == ["layers.1.mlp.gate"]
    x = exact_rows(0, 3, 1024)
    for node in (tiny.layers[0].mlp, tiny.layers[1].mlp):
        assert refused(lambda node=node: node(x[None])).endswith("this is cpu")
    message = refused(lambda: swap(tiny, "layers.2.mlp.experts", OnGfx950Router))
    assert message == (
        "layers.2.mlp.experts: Router.forward takes (x), "
        "GroupedExperts.forward (x, experts, weights)"
    )


class OnGfx950Router:
    @classmethod
    def from_reference(cls, module: nn.Module) -> Router:
        return Router(torch.zeros(4, 1024).bfloat16(), 4, 2, True, TARGET)


@pytest.mark.filterwarnings("ignore:.*is not in configs.json")
def test_without_a_target_the_device_decides(tiny: Model, refused: Refused):
    message = refused(lambda: swap(tiny, "layers.*.mlp", SparseMoeBlock))
    assert message == "layers.0.mlp: the fast path runs on gfx950 and sm_90; this is cpu"
    assert isinstance(tiny.layers[0].mlp, reference.moe.SparseMoeBlock)


# ---- packing

quiet = pytest.mark.filterwarnings("ignore:.*is not in configs.json")


def stacked(E: int, D: int, I: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tensors of `slow_experts` as a fused checkpoint has them."""
    parts: list[list[Tensor]] = [[], [], [], []]
    for expert in slow_experts(E, D, I):
        gate, up, down = expert.gate_proj, expert.up_proj, expert.down_proj
        parts[0].append(torch.cat([gate.weight, up.weight]))
        parts[1].append(torch.cat([gate.weight_scale, up.weight_scale]))
        parts[2].append(down.weight)
        parts[3].append(down.weight_scale)
    gate_up, gate_up_scale, down_codes, down_scale = map(torch.stack, parts)
    return gate_up, gate_up_scale, down_codes, down_scale


def same(a: Experts, b: Experts) -> bool:
    names = ("gate_up", "gate_up_scale", "down", "down_scale")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


@quiet
def test_mxfp4_experts_keep_their_codes_in_the_checkpoints_order():
    slow = slow_experts(3, 256, 128)
    fast = Experts.from_reference(slow, TARGET)
    for e, expert in enumerate(slow):
        assert torch.equal(fast.gate_up[e, 0::2], expert.gate_proj.weight)
        assert torch.equal(fast.gate_up[e, 1::2], expert.up_proj.weight)
        assert torch.equal(fast.gate_up_scale[e, 0::2], expert.gate_proj.weight_scale)
        assert torch.equal(fast.gate_up_scale[e, 1::2], expert.up_proj.weight_scale)
        assert torch.equal(fast.down[e], expert.down_proj.weight)
        assert torch.equal(fast.down_scale[e], expert.down_proj.weight_scale)
    assert set(fast.state_dict()) == {"gate_up", "gate_up_scale", "down", "down_scale"}


@quiet
@pytest.mark.parametrize("kind", ["bfloat16", "float32", "fp8"])
def test_other_experts_are_kept_in_bf16(kind: str):
    """FP8 ones are decoded as the reference decodes them."""
    slow = reference.moe.Experts(config(2, 256, 128))
    randomise(slow, 1)
    slow = slow.to(torch.float32 if kind == "float32" else torch.bfloat16)
    if kind == "fp8":
        for expert in slow:
            for name in ("gate_proj", "up_proj", "down_proj"):
                N, K = getattr(expert, name).weight.shape
                weight, scale = fp8.quantize_blocks(random(N + K, N, K))
                setattr(expert, name, FP8Linear(weight, scale, "a test's"))
    fast = Experts.from_reference(slow, TARGET)
    eye = {K: torch.eye(K).bfloat16() for K in (256, 128)}
    for e, expert in enumerate(slow):
        for packed, linear in (
            (fast.gate_up[e, 0::2], expert.gate_proj),
            (fast.gate_up[e, 1::2], expert.up_proj),
            (fast.down[e], expert.down_proj),
        ):
            decoded = linear(eye[packed.shape[1]]).T if kind == "fp8" else linear.weight.bfloat16()
            assert packed.dtype == torch.bfloat16 and torch.equal(packed, decoded)


@quiet
@pytest.mark.parametrize("rows", [1, 4, 8])
def test_experts_in_bf16_and_of_an_odd_intermediate_size(rows: int):
    slow = reference.moe.Experts(config(5, 64, 48))
    randomise(slow, 2)
    slow = slow.bfloat16().requires_grad_(False)
    x, weights = random(3, rows, 64).bfloat16(), random(4, rows, 3).softmax(-1)
    ids = routing("random", rows, 3, 5)
    fast = Experts.from_reference(slow, TARGET)
    launches, out = fast.launches(x, ids.int(), weights, Scratch(CPU))
    emulated(launches)
    assert not too_far(out, slow(x, ids, weights), slow(x.double(), ids, weights.double()))


@quiet
@pytest.mark.parametrize("target", ["gfx950", "sm_90"])
def test_an_intermediate_size_that_128_does_not_divide_is_padded(target: str):
    slow = quantised(reference.moe.Experts(config(3, 256, 96)), seed=5)
    fast = Experts.from_reference(slow, target)
    assert fast.I == 128
    for e, expert in enumerate(slow):
        gate_up, down = fast.expert(e)
        eye = torch.eye(256).bfloat16()
        assert torch.equal(gate_up[0:192:2], expert.gate_proj(eye).T)
        assert torch.equal(gate_up[1:192:2], expert.up_proj(eye).T)
        assert torch.equal(down[:, :96], expert.down_proj(torch.eye(96).bfloat16()).T)
        assert not gate_up[192:].any() and not down[:, 96:].any()


@quiet
@pytest.mark.parametrize("target", ["gfx950", "sm_90"])
@pytest.mark.parametrize("rows", ["", "interleaved16+"])
def test_aiters_shuffled_tensors_come_back_as_the_same_experts(target: str, rows: str):
    """The tensors go through `weights.layout`. Rows of gate and up are interleaved, or one after
    the other."""
    codes, scales, *down = stacked(3, 256, 128)
    gate_up = layout.pack(codes, f"{rows}aiter_weight")
    gate_up_scale = layout.pack(scales, f"{rows}aiter_scale")
    shuffled = layout.pack(down[0], "aiter_weight"), layout.pack(down[1], "aiter_scale")
    assert not torch.equal(gate_up.data, codes)
    unpacked = [layout.unpack(packed) for packed in (gate_up, gate_up_scale, *shuffled)]
    fast = Experts.from_tensors(*unpacked, target=target)
    assert same(fast, Experts.from_reference(slow_experts(3, 256, 128), target))


@quiet
def test_for_sm_90_codes_lie_in_the_order_that_hopper_decodes():
    slow = slow_experts(3, 512, 128)
    fast, plain = Experts.from_reference(slow, "sm_90"), Experts.from_reference(slow, TARGET)
    for name in ("gate_up", "down", "gate_up_scale"):
        assert not torch.equal(getattr(fast, name), getattr(plain, name))
    assert torch.equal(words.decode(fast.down), plain.down)
    assert torch.equal(fast.down_scale, plain.down_scale)
    for e in range(3):
        codes = words.rows(fast.gate_up[e], fast.tile_k // 2)
        assert torch.equal(words.decode(codes), plain.gate_up[e])
        scale = words.rows(fast.gate_up_scale[e], fast.tile_k // 32)
        assert torch.equal(scale, plain.gate_up_scale[e])


@quiet
def test_the_largest_scales_that_a_target_decodes_are_taken():
    for target, largest in (("gfx950", 254), ("sm_90", 128)):
        tensors = stacked(1, 256, 128)
        tensors[1][0, 5, 3] = tensors[3][0, 7, 1] = largest
        assert int(Experts.from_tensors(*tensors, target=target).gate_up_scale.max()) == largest


# ---- bad input: one line that names the thing and both values


@pytest.mark.filterwarnings("ignore:.*is not in configs.json")
@pytest.mark.parametrize(("fp4", "bits"), [(True, 4), (False, 16)])
def test_a_program_reads_one_block_of_weights_in_each_pass(fp4: bool, bits: int):
    experts = Experts(2, 256, 128, TARGET, CPU, fp4=fp4)
    x, ids = torch.zeros(1, 256).bfloat16(), torch.zeros(1, 1, dtype=torch.int32)
    work, _ = experts.launches(x, ids, torch.ones(1, 1), Scratch(CPU))
    for launch in work:
        sizes = launch.arguments["BLOCK_N"] * launch.arguments["BLOCK_K"]
        assert launch.weight_bytes == sizes * bits // 8


def test_a_dense_layers_weights_take_no_gradients():
    node = MLP(torch.zeros(64, 32).bfloat16(), torch.zeros(32, 32).bfloat16(), TARGET)
    assert [p.requires_grad for p in node.parameters()] == [False, False]


def test_a_hidden_size_that_is_no_multiple_is_refused(refused: Refused):
    message = "experts of hidden size {} and intermediate size 128; both must be multiples of {}"
    assert refused(lambda: Experts(2, 192, 128, TARGET, CPU)) == message.format(192, 128)
    call = lambda: Experts(2, 72, 128, TARGET, CPU, fp4=False)  # noqa: E731
    assert refused(call) == message.format(72, 16)


@pytest.mark.parametrize(
    ("x", "what"),
    [
        (torch.zeros(0, 256).bfloat16(), "[0, 256] and torch.bfloat16"),
        (torch.zeros(2, 128).bfloat16(), "[2, 128] and torch.bfloat16"),
        (torch.zeros(1, 2, 256).bfloat16(), "[1, 2, 256] and torch.bfloat16"),
        (torch.zeros(2, 256), "[2, 256] and torch.float32"),
    ],
)
def test_rows_that_the_kernels_cannot_take_are_refused(x: Tensor, what: str, refused: Refused):
    ids, shares = torch.zeros(len(x), 2, dtype=torch.int64), torch.ones(len(x), 2)
    assert refused(lambda: fast_experts(24, 256, 128)(x, ids, shares)) == (
        f"experts: x of shape {what}; expected [1 to 8, 256], torch.bfloat16"
    )


@quiet
def test_a_block_and_a_router_refuse_rows_by_their_own_names(refused: Refused):
    block = fast_block(slow_block(16, 1024, 128, 4, 256))
    many = torch.zeros(9, 1024).bfloat16()
    message = "{}: x of shape [9, 1024] and torch.bfloat16; expected [1 to 8, 1024], torch.bfloat16"
    launch = lambda: block.launches(many, Scratch(CPU))  # noqa: E731
    assert refused(launch) == message.format("the router")


@pytest.mark.parametrize("wrong", [24, -1])
def test_an_expert_that_is_not_there_is_refused(wrong: int, refused: Refused):
    chosen = case(routing("random", 2, 3, 24))
    ids = chosen.experts.clone()
    ids[1, 2] = wrong
    call = lambda: fast_experts(24, 256, 128)(chosen.x, ids, chosen.weights)  # noqa: E731
    assert refused(call) == f"expert {wrong}; there are 24, from 0 to 23"


@pytest.mark.parametrize("wrong", [24, -1])
def test_an_expert_that_is_not_there_is_refused_among_more_than_8_rows_too(
    wrong: int, refused: Refused
):
    x, ids = random(1, 9, 256).bfloat16(), routing("random", 9, 3, 24)
    ids[1, 2] = wrong
    call = lambda: fast_experts(24, 256, 128)(x, ids, torch.ones(9, 3))  # noqa: E731
    assert refused(call) == f"expert {wrong}; there are 24, from 0 to 23"


def test_choices_of_fewer_rows_are_refused_among_more_than_8_rows_too(refused: Refused):
    x, ids = random(1, 9, 256).bfloat16(), routing("random", 9, 3, 24)
    call = lambda: fast_experts(24, 256, 128)(x, ids[:7], torch.ones(7, 3))  # noqa: E731
    assert "experts [7, 3]" in refused(call)
    wide = lambda: fast_experts(24, 256, 128)(x.float(), ids, torch.ones(9, 3))  # noqa: E731
    assert refused(wide) == (
        "experts: x of shape [9, 256] and torch.float32; expected [rows, 256], torch.bfloat16"
    )


def test_choices_that_do_not_belong_to_the_rows_are_refused(refused: Refused):
    experts, x = fast_experts(24, 256, 128), torch.zeros(8, 256).bfloat16()

    def shapes(ids: tuple[int, int], shares: tuple[int, int]) -> str:
        return refused(lambda: experts(x, torch.zeros(ids).long(), torch.ones(shares)))

    tail = "for 8 rows; expected [8, k] twice"
    assert shapes((8, 17), (8, 17)) == "8 rows of 17 experts; expected at most 128 in all"
    assert shapes((7, 2), (7, 2)) == f"experts [7, 2] and weights [7, 2] {tail}"
    assert shapes((8, 2), (8, 3)) == f"experts [8, 2] and weights [8, 3] {tail}"


@quiet
@pytest.mark.parametrize(
    ("target", "scale", "message"),
    [
        ("gfx950", 255, "a scale of 255 (NaN); gfx950 decodes scales up to 254"),
        ("sm_90", 255, "a scale of 255 (NaN); sm_90 decodes scales up to 128"),
        ("sm_90", 200, "a scale of 200; sm_90 decodes scales up to 128"),
        ("sm_90", 129, "a scale of 129; sm_90 decodes scales up to 128"),
    ],
)
def test_a_scale_that_the_target_cannot_decode_is_refused(
    target: str, scale: int, message: str, refused: Refused
):
    tensors = stacked(2, 256, 128)
    tensors[1][1, 128 + 3, 2] = scale  # the up rows are the second half
    call = lambda: Experts.from_tensors(*tensors, target=target)  # noqa: E731
    assert refused(call) == f"expert 1, up_proj: {message}"


@quiet
def test_tensors_that_do_not_belong_together_are_refused(refused: Refused):
    gate_up, gate_up_scale, down, down_scale = stacked(2, 256, 128)
    beside = "beside a gate_up of [2, 256, 128]"
    cases = {
        f"gate_up_scale: [2, 256, 7] torch.uint8, expected [2, 256, 8] torch.uint8 {beside}": (
            gate_up, gate_up_scale[..., :7], down, down_scale,
        ),
        f"down: [1, 256, 64] torch.uint8, expected [2, 256, 64] torch.uint8 {beside}": (
            gate_up, gate_up_scale, down[:1], down_scale,
        ),
        f"down_scale: [2, 256, 4] torch.int8, expected [2, 256, 4] torch.uint8 {beside}": (
            gate_up, gate_up_scale, down, down_scale.view(torch.int8),
        ),
    }  # fmt: skip
    for message, tensors in cases.items():
        assert refused(lambda tensors=tensors: Experts.from_tensors(*tensors, TARGET)) == message


@quiet
def test_a_router_and_a_shared_expert_in_fp8_are_refused(refused: Refused):
    gate = exact_router(torch.zeros(1, 24).bfloat16(), 3)
    gate.weight = nn.Parameter(gate.weight.to(torch.float8_e4m3fn), requires_grad=False)
    message = "a weight in torch.float8_e4m3fn; the fast path needs bf16 here"
    assert refused(lambda: Router.from_reference(gate, TARGET)) == message


def test_an_unknown_target_is_refused(refused: Refused):
    message = "target 'gfx942'; expected gfx950 or sm_90"
    assert refused(lambda: Experts(2, 256, 128, "gfx942", CPU)) == message


def test_a_device_that_is_no_target_is_refused(refused: Refused):
    message = "the fast path runs on gfx950 and sm_90; this is cpu"
    assert refused(lambda: Experts.from_reference(slow_experts(3, 256, 128))) == message
    assert refused(lambda: Experts.from_tensors(*stacked(3, 256, 128))) == message
    chosen = case(routing("random", 2, 3, 24))
    experts = fast_experts(24, 256, 128)
    assert refused(lambda: experts(chosen.x, chosen.experts, chosen.weights)) == message


def test_without_triton_packing_works_and_launching_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, refused: Refused
):
    for name in [name for name in sys.modules if name.startswith("fast.kernels")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    chosen = case(routing("random", 2, 3, 24))
    fast_experts.cache_clear()
    message = (
        "the fast path needs Triton 3.6 or later, which is not installed (pip install -e '.[fast]')"
    )
    assert refused(lambda: launches_of(chosen)) == message
    gate = quiet_router(exact_router(torch.zeros(1, 24).bfloat16(), 3))
    assert refused(lambda: gate.launch(picks(1), Scratch(CPU))) == message


@quiet
def test_a_hidden_size_that_the_matrix_unit_does_not_take_is_refused(refused: Refused):
    gate = Router(torch.zeros(24, 1000).bfloat16(), 24, 3, True, TARGET)
    assert refused(lambda: gate.launch(torch.zeros(1, 1000).bfloat16(), Scratch(CPU))) == (
        "a router of hidden size 1000; the matrix unit takes multiples of 16"
    )


# ---- configurations


def test_a_shape_that_is_not_in_the_table_runs_as_the_nearest_with_a_warning():
    configs.lookup.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        experts = Experts(2, 256, 512, TARGET, CPU)
    assert [str(warning.message) for warning in caught] == [
        f"{kernel} D=256 I=512 is not in configs.json for gfx950; it runs with the configuration of "
        "D=4096 I=512 (python -m tools.tune measures it)"
        for kernel in ("gate_up", "down")
    ]
    assert experts.down_config == configs.table()[TARGET]["down"]["D=4096 I=512"]


def test_a_shape_of_the_table_is_taken_without_a_warning():
    configs.lookup.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for target in ("gfx950", "sm_90"):
            for I in (1024, 512, 256, 128):
                experts = Experts(2, 4096, I, target, torch.device("meta"))
                expected = configs.table()[target]["gate_up"][f"D=4096 I={I}"]
                assert experts.gate_up_config == expected


def test_a_block_that_is_no_whole_tile_is_refused(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
):
    """The kernel would go through half a tile and read the next one's rows: wrong numbers, no error."""
    half = {"BLOCK_N": 64, "BLOCK_K": words.TILE_K // 2, "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(configs, "lookup", lambda *_: half)
    assert refused(lambda: Experts(2, 512, 128, "sm_90", CPU)) == (
        "gate_up D=512 I=128 for sm_90: BLOCK_K = 128; expected a multiple of 256, the columns of a "
        "weight tile"
    )
    assert Experts(2, 512, 128, "gfx950", CPU).tile_n == 1  # which has no tiles


def test_the_kernels_limits_are_the_nodes():
    assert fast.kernels.moe.MAX_PAIRS.value == fast.moe.MAX_PAIRS
    assert fast.kernels.attention.SHORT.value == fast.attention.SHORT


def test_a_target_that_is_not_in_the_table_is_refused(refused: Refused):
    message = "configs.json has no configuration of gate_up for gfx942"
    assert refused(lambda: configs.lookup("gfx942", "gate_up", "D=4096 I=128")) == message
