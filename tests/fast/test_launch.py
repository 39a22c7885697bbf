"""The elements that Triton packs for one instruction, read from its layouts: Hopper needs whole words."""

import re
import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fast.launch import Launch, Scratch, check_packing
from qwen35.errors import InputError

pytest.importorskip("triton")

from fast.moe import Experts
from tools.gfx950.target import TARGETS, compile_launch, stand_in_driver

META, CPU = torch.device("meta"), torch.device("cpu")
TORN = "down D=4096 I=512: Triton gives an instruction 4 elements that are not neighbours"

IR = """
#blocked = #ttg.blocked<{sizePerThread = [1, 4], threadsPerWarp = [8, 4], warpsPerCTA = [4, 1], order = [1, 0]}>
#rows = #ttg.blocked<{sizePerThread = [4, 1], threadsPerWarp = [8, 4], warpsPerCTA = [4, 1], order = [0, 1]}>
#two = #ttg.blocked<{sizePerThread = [1, 2], threadsPerWarp = [8, 4], warpsPerCTA = [4, 1], order = [1, 0]}>
#run = #ttg.linear<{register = [[0, 1], [0, 2], [8, 0]], lane = [[0, 4], [1, 0]], warp = [], block = []}>
#torn = #ttg.linear<{register = [[0, 32], [0, 16], [0, 1], [0, 2]], lane = [[0, 8], [1, 0]], warp = [], block = []}>
#turned = #ttg.linear<{register = [[0, 2], [0, 1], [8, 0]], lane = [[0, 4], [1, 0]], warp = [], block = []}>
#down = #ttg.linear<{register = [[1, 1], [0, 2], [8, 0]], lane = [[0, 4], [1, 0]], warp = [], block = []}>
#deep = #ttg.linear<{register = [[0, 1, 1], [0, 0, 2], [0, 8, 0]], lane = [[0, 0, 4]], warp = [], block = []}>
#cube = #ttg.linear<{register = [[0, 0, 1], [0, 0, 2], [0, 8, 0]], lane = [[0, 0, 4]], warp = [], block = []}>
%0 = tt.elementwise_inline_asm "prmt;" {constraints = "=r", packed_element = 1 : i32, pure = false} -> i32
%1:2 = tt.elementwise_inline_asm "a { b" {constraints = "=r,r", packed_element = 4 : i32, pure = true} %w, %m : tensor<64x64xi8, LAYOUT>, tensor<64x64xi32, #torn> -> tensor<64x64xbf16, #torn>
"""  # noqa: E501
OF_A_PRODUCT = "#ttg.dot_op<{opIdx = 0, parent = #mma, kWidth = %d}>"


@pytest.mark.parametrize(
    "layout", ["#blocked", "#run", "#cube", OF_A_PRODUCT % 4, OF_A_PRODUCT % 8]
)
def test_four_neighbours_of_a_row_are_taken(layout: str):
    check_packing("a kernel", IR.replace("LAYOUT", layout))


@pytest.mark.parametrize(
    "layout", ["#rows", "#two", "#torn", "#turned", "#down", "#deep", "#unknown", OF_A_PRODUCT % 2]
)
def test_any_other_four_are_refused(layout: str):
    with pytest.raises(InputError, match="a kernel: Triton gives an instruction 4 elements"):
        check_packing("a kernel", IR.replace("LAYOUT", layout))


def test_an_instruction_that_takes_two_elements_needs_two_neighbours():
    of_two = IR.replace("= 4 : i32", "= 2 : i32")
    check_packing("a kernel", of_two.replace("LAYOUT", "#two"))
    with pytest.raises(InputError, match="gives an instruction 2 elements"):
        check_packing("a kernel", of_two.replace("LAYOUT", "#rows"))


def test_a_tensor_that_offsets_of_32_bits_do_not_reach_is_refused():
    """Unless the kernel addresses it with 64 bits."""
    most, more = (torch.empty(n, dtype=torch.uint8, device=META) for n in (2**31 - 1, 2**31))
    for name, x in (("keys", most), ("weight", more), ("out", more)):
        Launch("a kernel", None, (1, 1, 1), {"n": 3, name: x}, {})
    with pytest.raises(InputError) as caught:
        Launch("a kernel", None, (1, 1, 1), {"n": 3, "keys": more}, {})
    assert str(caught.value) == (
        "a kernel: keys has 2147483648 elements; its offsets have 32 bits and reach 2147483647"
    )


def test_buffers_of_a_name_are_shared_if_they_are_alike():
    scratch = Scratch(CPU)
    with META:
        first = scratch("one", 3, 4)
        counts = scratch("counts", 5, dtype=torch.int32)
    assert (first.shape, first.dtype, first.device) == ((3, 4), torch.bfloat16, CPU)
    assert (counts.tolist(), counts.dtype, counts.device) == ([0] * 5, torch.int32, CPU)
    assert scratch("one", 3, 4) is first
    others = [scratch("one", 4, 3), scratch("one", 3, 4, dtype=torch.float32), scratch("two", 3, 4)]
    assert len({x.data_ptr() for x in (first, *others)}) == 4


def test_waves_share_the_weights():
    launch = Launch("a kernel", None, (1, 1, 1), {}, {}, weight_bytes=1024)
    assert launch.bytes_of_a_wave(4) == 256


@pytest.mark.parametrize("layout", ["#rows", "#torn", "#unknown"])
def test_an_instruction_that_takes_one_element_may_have_any_layout(layout: str):
    check_packing("a kernel", IR.replace("LAYOUT", layout).replace("= 4 : i32", "= 1 : i32"))


def down(I: int, **config: int) -> Launch:
    experts = Experts(16, 4096, I, "sm_90", META)
    experts.down_config |= config
    x = torch.empty(4, 4096, dtype=torch.bfloat16, device=META)
    chosen = torch.empty(4, 8, dtype=torch.int32, device=META)
    return experts.launches(x, chosen, torch.empty(4, 8, device=META), Scratch(META))[0][1]


def test_blocks_of_16_rows_by_128_a_warp_which_computed_garbage_on_an_h200_are_refused():
    with pytest.raises(InputError, match=re.escape(TORN)):
        compile_launch(down(512, BLOCK_N=64, BLOCK_K=128, num_warps=4), "sm_90")
    compile_launch(down(512, BLOCK_N=64, BLOCK_K=128, num_warps=2), "sm_90")


def test_a_shape_whose_blocks_become_shorter_gets_a_layout_that_decodes():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 896 is not in the table
        launch = down(896)
    assert launch.arguments["BLOCK_K"] == 128
    compile_launch(launch, "sm_90")


def test_a_launch_on_the_card_is_checked_too_and_once():
    class Compiled:
        asked, launched = 0, list[tuple[Any, ...]]()

        @property
        def asm(self) -> dict[str, str]:
            self.asked += 1
            return {"ttgir": IR.replace("LAYOUT", layout)}

        def __getitem__(self, grid: tuple[int, int, int]) -> Any:
            return lambda *arguments: self.launched.append((grid, arguments))  # pyright: ignore

    compiled, whole = Compiled(), down(512)

    class Kernel:
        params = whole.kernel.params

        def __getitem__(self, grid: tuple[int, int, int]) -> Any:
            def compile_it(**given: Any) -> Compiled:
                assert grid == launch.grid and given == launch.arguments | launch.options
                return compiled

            return compile_it

    launch = replace(whole, name="on a card", kernel=Kernel())
    layout = "#torn"
    for _ in range(2):
        with pytest.raises(InputError, match="on a card: Triton gives an instruction 4 elements"):
            launch()
    assert (compiled.asked, compiled.launched) == (2, [])
    layout = "#run"
    for _ in range(3):
        launch()
    assert compiled.asked == 3
    (grid, values), again = compiled.launched
    assert grid == launch.grid and again[0] == grid
    names = [one.name for one in launch.kernel.params]
    assert all(one is launch.arguments[name] for name, one in zip(names, values, strict=True))


@pytest.mark.parametrize("target", TARGETS)
def test_launches_that_share_a_compiled_kernel_are_specialised_alike(target: str):
    """Triton would compile no other kernel for any of them."""
    from tests.support.copy_kernel import copy

    x = torch.empty(4096)
    wide, widest = (torch.empty(2**29 - n, device=META) for n in (0, 1))  # 2 GiB, and less
    plain = {"x": x, "out": x, "rows": 40, "N": 64, "factor": 0.5, "BLOCK": 16}
    changes: list[dict[str, Any]] = [
        {}, {"x": x[4:]}, {"x": x[1:]}, {"x": x.double()}, {"x": wide}, {"x": widest}, {"rows": 48},
        {"rows": 1}, {"rows": True}, {"rows": -48}, {"rows": -(2**31) - 16}, {"rows": 2**31},
        {"rows": -(2**31)}, {"N": 65}, {"N": 67}, {"N": 1}, {"N": 80}, {"N": 2**31},
        {"N": 2**31 + 16}, {"N": 2**63}, {"factor": 1.0}, {"BLOCK": 32}, {"num_warps": 8},
    ]  # fmt: skip
    by_key: dict[Any, set[str]] = {}
    with stand_in_driver(target):
        for change in changes:
            warps = {"num_warps": change.pop("num_warps", 4)}
            launch = Launch("copy", copy, (1, 1, 1), plain | change, warps)
            compiled = copy.warmup(grid=launch.grid, **launch.arguments, **launch.options)
            key = tuple(one for one in launch.specialisation()[0] if one not in (META, CPU))
            by_key.setdefault(key, set()).add(compiled.hash)
    assert all(len(hashes) == 1 for hashes in by_key.values())
    assert 10 < len(by_key) < len(changes)


def test_a_launch_is_known_by_the_value_of_a_constant_also_in_a_tuple():
    """Of other numbers Triton's code depends on little, of None on that it is none."""
    params = [
        SimpleNamespace(name=n, is_constexpr=c) for n, c in (("x", 0), ("SIZES", 1), ("at", 0))
    ]
    kernel = type("Kernel", (), {"params": params})()

    def key(sizes: tuple[int, ...], at: Any, device: torch.device = CPU) -> Any:
        given = {"x": torch.empty(16, device=device), "SIZES": sizes, "at": at}
        return Launch("a kernel", kernel, (1, 1, 1), given, {}).specialisation()[0]

    same = key((3, 5), (32, 48))
    assert same != key((3, 5), (32, 48), META)
    assert same == key((3, 5), (64, 80)) and same != key((3, 7), (32, 48))
    assert same != key((3, 5), (32, 49)) != key((3, 5), (1, 49)) != key((3, 5), None)
