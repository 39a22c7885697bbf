"""Loads, stores and atomics one by one: a line of assembly over a few registers and a small array."""

import re
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("triton")
pytest.importorskip("tinygrad")

from tests.support.gfx950_runs import execute, fresh
from tools.gfx950.assembly import EmulatorError
from tools.gfx950.memory import Memory
from tools.gfx950.waves import EXEC, M0, Waves

LANE = np.arange(64, dtype=np.uint32)
OLD = 0xAABBCCDD  # the content of each register before
ODD = int("01" * 32, 2)  # lanes 0, 2, 4, ...
SIZES = {"ubyte": 1, "byte": 1, "sbyte": 1, "ushort": 2, "short": 2, "sshort": 2, "dword": 4}
SIZES |= {f"dwordx{n}": 4 * n for n in (2, 3, 4)}


def begun(array: NDArray[Any], *, waves: int = 1, lanes: int = 2**64 - 1) -> tuple[Waves, int]:
    """A state whose memory is one array, and the array's address."""
    state = fresh(waves)
    state.memory = Memory([array])
    state.vgpr[...], state.agpr[...] = OLD, OLD
    state.write_s64(EXEC, np.array([lanes], np.uint64))
    return state, state.memory.address(0)


def pointers(state: Waves, register: int, addresses: NDArray[np.uint64]) -> None:
    state.vgpr[register] = (addresses & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    state.vgpr[register + 1] = (addresses >> np.uint64(32)).astype(np.uint32)


def scalars(state: Waves, register: int, *numbers: int) -> None:
    for i, number in enumerate(numbers):
        state.sgpr[register + i] = number & 0xFFFFFFFF


def buffer(state: Waves, address: int, nbytes: int) -> None:
    """A descriptor in s[4:7], with bits of the last word that mean nothing here."""
    scalars(state, 4, address, address >> 32, nbytes, 0x00027000)


def expected_load(data: bytes, kind: str, half: str, old: int = OLD) -> list[int]:
    """What a load of these bytes leaves in its registers."""
    value = int.from_bytes(data, "little", signed=kind in ("sbyte", "sshort"))
    if half:
        value &= 0xFFFF
        return [(old & 0xFFFF0000) | value if half == "low" else (old & 0xFFFF) | value << 16]
    return [value >> 32 * i & 0xFFFFFFFF for i in range(-(-len(data) // 4))]


LOADS = [(kind, "") for kind in SIZES if kind not in ("byte", "short")]
LOADS += [(kind, half) for kind in ("ubyte", "sbyte", "short") for half in ("low", "high")]


@pytest.mark.parametrize(("kind", "half"), LOADS)
@pytest.mark.parametrize("lanes", [2**64 - 1, ODD])
def test_a_load(kind: str, half: str, lanes: int) -> None:
    """By a pointer a lane, by a base and an offset a lane, and through a buffer. Inactive lanes keep
    what they have."""
    array = np.random.default_rng(0).integers(0, 256, 4096, np.uint8)
    mnemonic = f"load_{kind}{ {'': '', 'low': '_d16', 'high': '_d16_hi'}[half] }"
    size = SIZES[kind]
    count = max(size // 4, 1)
    result = f"v[20:{19 + count}]" if count > 1 else "v20"
    places = 100 + 24 * (63 - LANE.astype(np.int64))
    for form in ("pointer", "base", "buffer"):
        state, address = begun(array, waves=2, lanes=lanes)
        state.vgpr[2] = 24 * (63 - LANE)
        if form == "pointer":
            pointers(state, 2, (address + places + 8).astype(np.uint64))
            line = f"global_{mnemonic} {result}, v[2:3], off offset:-8"
        elif form == "base":
            scalars(state, 4, address + 36, (address + 36) >> 32)
            line = f"global_{mnemonic} {result}, v2, s[4:5] offset:64 sc1 nt"
        else:
            buffer(state, address, 4096)
            scalars(state, 8, 40)
            line = f"buffer_{mnemonic} {result}, v2, s[4:7], s8 offen offset:60"
        execute(line, state)
        for lane in range(64):
            data = array[places[lane] : places[lane] + size].tobytes()
            want = expected_load(data, kind, half)
            if not lanes >> lane & 1:
                want = [OLD] * count
            for wave in range(2):
                found = [int(state.vgpr[20 + i, wave, lane]) for i in range(count)]
                assert found == want, (form, lane)
        assert (state.vgpr[20 + count] == OLD).all()


def test_a_load_to_accumulators() -> None:
    array = np.arange(256, dtype=np.uint32)
    for lanes in (2**64 - 1, ODD):
        state, address = begun(array, lanes=lanes)
        scalars(state, 4, address, address >> 32)
        state.vgpr[2] = 8 * LANE
        execute("global_load_dwordx2 a[3:4], v2, s[4:5]", state)
        active = LANE % 2 == 0 if lanes == ODD else LANE >= 0
        for i in range(2):
            want = np.where(active, 2 * LANE + i, OLD)
            assert (state.agpr[3 + i, 0] == want).all() and (state.vgpr[3 + i] == OLD).all()


STORES = [("byte", ""), ("short", ""), *((f"dword{x}", "") for x in ("", "x2", "x3", "x4"))]
STORES += [("byte", "_d16_hi"), ("short", "_d16_hi")]


@pytest.mark.parametrize(("kind", "hi"), STORES)
@pytest.mark.parametrize("bank", ["v", "a"])
def test_a_store(kind: str, hi: str, bank: str) -> None:
    """Of active lanes alone; a byte or two are the lowest, or those of the high half."""
    rng = np.random.default_rng(1)
    size = SIZES[kind]
    count = max(size // 4, 1)
    value = f"{bank}[4:{3 + count}]" if count > 1 else f"{bank}4"
    for form in ("pointer", "base", "buffer"):
        array = np.full(64 * 16 + 64, 0xEE, np.uint8)
        state, address = begun(array, lanes=ODD)
        registers = state.vgpr if bank == "v" else state.agpr
        registers[4:8] = rng.integers(0, 2**32, (4, 1, 64), np.uint32)
        state.vgpr[2] = 16 * LANE
        if form == "pointer":
            pointers(state, 2, (address + 16 * LANE.astype(np.int64)).astype(np.uint64))
            line = f"global_store_{kind}{hi} v[2:3], {value}, off offset:16"
        elif form == "base":
            scalars(state, 8, address, address >> 32)
            line = f"global_store_{kind}{hi} v2, {value}, s[8:9] offset:16"
        else:
            scalars(state, 8, address, address >> 32, len(array), 0)
            line = f"buffer_store_{kind}{hi} {value}, v2, s[8:11], 0 offen offset:16"
        given = registers[4:8, 0].copy()
        execute(line, state)
        want = np.full_like(array, 0xEE)
        for lane in range(0, 64, 2):
            data = given[:, lane].tobytes()[2 if hi else 0 :][:size]
            want[16 + 16 * lane : 16 + 16 * lane + size] = np.frombuffer(data, np.uint8)
        assert (array == want).all(), form


@pytest.mark.parametrize(
    ("nbytes", "inside"), [(0, 0), (44, 0), (45, 1), (164, 15), (165, 16), (4096, 64)]
)
def test_beyond_a_buffer(nbytes: int, inside: int) -> None:
    """Loads give 0 and stores do nothing where the sum of the offsets is not below the buffer's size,
    whatever the memory has there."""
    array = np.arange(1024, dtype=np.uint32)
    state, address = begun(array)
    buffer(state, address, nbytes)
    scalars(state, 12, 12)
    state.vgpr[2] = 8 * LANE
    places = [11 + 2 * lane for lane in range(64)]
    execute("buffer_load_dword v20, v2, s[4:7], s12 offen offset:32", state)
    assert state.vgpr[20, 0].tolist() == places[:inside] + [0] * (64 - inside)
    state.vgpr[21] = 5000
    execute("buffer_store_dword v21, v2, s[4:7], s12 offen offset:32", state)
    assert np.flatnonzero(array == 5000).tolist() == places[:inside]


def test_a_buffer_without_offsets() -> None:
    array = np.arange(64, dtype=np.uint32)
    state, address = begun(array)
    buffer(state, address, 256)
    execute("buffer_load_dword v20, off, s[4:7], 0 offset:20", state)
    assert (state.vgpr[20] == 5).all()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("buffer_load_dword v20, v2, s[4:7], 0 idxen", "idxen is not emulated"),
        ("buffer_load_dword v20, v2, s[4:7]", "3 operands, expected 4"),
        ("global_load_dword v20, v[2:3]", "2 operands, expected 3"),
        ("global_store_dword v[2:3], off", "2 operands, expected 3"),
        ("global_load_lds_dword v[2:3]", "1 operands, expected 2"),
        ("global_atomic_add v20, v[2:3], off sc0", "3 operands, expected 4"),
        ("global_atomic_add v20, v[2:3], v1, off", "4 operands, expected 3"),
        ("buffer_load_ubyte off, s[4:7], 0 lds", "loads of less than a dword to the LDS"),
        ("global_load_dword v20, v[2:3], off gds", "modifier 'gds' is not known here"),
        ("ds_read_b32 v20, v2 gds", "modifier 'gds' is not known here"),
        ("ds_read2_b32 v[20:21], v2 offset:4 glc", "modifier 'glc' is not known here"),
    ],
)
def test_what_is_refused(line: str, said: str) -> None:
    state, address = begun(np.zeros(64, np.uint32))
    buffer(state, address, 256)
    with pytest.raises(EmulatorError, match=re.escape(said)):
        execute(line, state)


def test_a_buffer_with_a_stride_is_refused() -> None:
    for bits in (1, 0x3FFF):
        state, address = begun(np.zeros(64, np.uint32))
        scalars(state, 4, address, address >> 32 | bits << 16, 256, 0)
        with pytest.raises(EmulatorError, match="a buffer with a stride is not emulated"):
            execute("buffer_load_dword v20, off, s[4:7], 0", state)
    state, address = begun(np.zeros(64, np.uint32))
    scalars(state, 4, address, address >> 32 | 3 << 30, 256, 0)  # of the swizzle
    execute("buffer_load_dword v20, off, s[4:7], 0", state)


# --- atomics

# Name -> the numbers after, from 10 and the operand of each of lanes 0, 1 and 2 in turn.
AFTER = {
    "swap": [5, 4, 3], "add": [15, 19, 22], "sub": [5, 1, -2], "and": [0, 0, 0],
    "or": [15, 15, 15], "xor": [15, 11, 8], "umin": [5, 4, 3], "umax": [10, 10, 10],
    "smin": [5, 4, 3], "smax": [10, 10, 10], "inc": [0, 1, 2], "dec": [5, 4, 3],
}  # fmt: skip


@pytest.mark.parametrize("name", AFTER)
@pytest.mark.parametrize("wide", ["", "_x2"])
@pytest.mark.parametrize("space", ["global", "buffer"])
def test_an_atomic_goes_lane_by_lane(space: str, wide: str, name: str) -> None:
    """All on one number; the old value of each goes to a register if it is asked for."""
    bits = 64 if wide else 32
    for returns in ("", " sc0"):
        array = np.array([99, 10, 99], f"u{bits // 8}")
        state, address = begun(array, lanes=0b111)
        state.vgpr[6, 0, :3], state.vgpr[7] = [5, 4, 3], 0
        scalars(state, 4, address, address >> 32, array.nbytes, 0)
        state.vgpr[2] = bits // 8
        value = "v[6:7]" if wide else "v6"
        result = "v[20:21]" if wide else "v20"
        if space == "global":
            given = f"{result}, v2, {value}" if returns else f"v2, {value}"
            line = f"global_atomic_{name}{wide} {given}, s[4:5]{returns}"
        else:
            result = value
            line = f"buffer_atomic_{name}{wide} {value}, v2, s[4:7], 0 offen{returns}"
        execute(line, state)
        assert array.tolist() == [99, AFTER[name][2] % 2**bits, 99]
        place = 6 if space == "buffer" else 20
        found = state.vgpr[place, 0, :3].tolist()
        if returns:
            assert found == [10, *(n % 2**32 for n in AFTER[name][:2])]
        else:
            assert found == ([5, 4, 3] if space == "buffer" else [OLD] * 3)
        assert (state.vgpr[place, 0, 3:] == (0 if place == 7 else OLD)).all()


@pytest.mark.parametrize(
    ("name", "dtype", "old", "operand", "new"),
    [
        ("inc", np.uint32, 5, [6], 6), ("inc", np.uint32, 6, [6], 0),
        ("dec", np.uint32, 6, [6], 5), ("dec", np.uint32, 7, [6], 6), ("dec", np.uint32, 0, [6], 6),
        ("cmpswap", np.uint32, 5, [9, 5], 9), ("cmpswap", np.uint32, 5, [9, 6], 5),
        ("cmpswap_x2", np.uint64, 2**33 + 1, [7, 8, 1, 2], 2**35 + 7),
        ("cmpswap_x2", np.uint64, 2**33 + 1, [7, 8, 1, 3], 2**33 + 1),
        ("add_f32", np.float32, 1.5, [0x40000000], 3.5),
    ],
)  # fmt: skip
def test_an_atomic_of_one_lane(name: str, dtype: Any, old: Any, operand: Any, new: Any) -> None:
    array = np.array([old], dtype)
    state, address = begun(array, lanes=1 << 7)
    pointers(state, 2, np.array([address], np.uint64))
    for i, word in enumerate(operand):
        state.vgpr[10 + i] = word
    value = f"v[10:{9 + len(operand)}]" if len(operand) > 1 else "v10"
    execute(f"global_atomic_{name} v[2:3], {value}, off", state)
    assert array[0] == new


def test_an_atomic_of_pairs() -> None:
    for name, pair, more, total in (
        ("pk_add_bf16", (0x3F80, 0x4000), (0x4040, 0xC000), (0x4080, 0x0000)),
        ("pk_add_f16", (0x3C00, 0x4000), (0x4200, 0xC000), (0x4400, 0x0000)),
    ):
        array = np.array(pair, np.uint16)
        state, address = begun(array, lanes=1)
        pointers(state, 2, np.array([address], np.uint64))
        state.vgpr[10] = more[0] | more[1] << 16
        execute(f"global_atomic_{name} v[2:3], v10, off", state)
        assert array.tolist() == [*total], name


def test_an_atomic_beyond_its_buffer_does_nothing() -> None:
    array = np.zeros(4, np.uint32)
    state, address = begun(array)
    buffer(state, address, 8)
    state.vgpr[2], state.vgpr[20] = 4 * (LANE % 4), 1
    execute("buffer_atomic_add v20, v2, s[4:7], 0 offen sc0", state)
    assert array.tolist() == [16, 16, 0, 0]
    assert state.vgpr[20, 0, :8].tolist() == [0, 0, 1, 1, 1, 1, 1, 1]


# --- the LDS


@pytest.mark.parametrize("kind", ["b32", "b64", "b96", "b128"])
def test_whole_registers_go_through_the_lds(kind: str) -> None:
    """Of two waves at places of their own, with an offset; inactive lanes keep what they have."""
    count = int(kind[1:]) // 32
    state, _ = begun(np.zeros(1, np.uint8), waves=2, lanes=ODD)
    state.vgpr[4:8] = np.random.default_rng(2).integers(0, 2**32, (4, 2, 64), np.uint32)
    state.vgpr[2] = 16 * LANE + 1024 * np.arange(2, dtype=np.uint32)[:, None]
    value, result = (f"v[{n}:{n + count - 1}]" if count > 1 else f"v{n}" for n in (4, 20))
    execute(f"ds_write_{kind} v2, {value} offset:32", state)
    state.vgpr[2] -= 64
    execute(f"ds_read_{kind} {result}, v2 offset:96", state)
    for i in range(count):
        want = np.where(LANE % 2 == 0, state.vgpr[4 + i], OLD)
        assert (state.vgpr[20 + i] == want).all()
    assert (state.vgpr[20 + count] == OLD).all()


@pytest.mark.parametrize("kind", ["b32", "b64"])
@pytest.mark.parametrize(("stride", "unit"), [("", 1), ("st64", 64)])
def test_two_places_at_a_time(kind: str, stride: str, unit: int) -> None:
    """Their offsets count elements, or 64 elements."""
    size = int(kind[1:]) // 8
    count = size // 4
    state, _ = begun(np.zeros(1, np.uint8), lanes=0b11)
    state.vgpr[2] = size * LANE
    state.vgpr[4:8] = np.random.default_rng(3).integers(0, 2**32, (4, 1, 64), np.uint32)
    one, two = (f"v[{n}:{n + count - 1}]" if count > 1 else f"v{n}" for n in (4, 6))
    execute(f"ds_write2{stride}_{kind} v2, {one}, {two} offset0:1 offset1:4", state)
    execute(f"ds_read2{stride}_{kind} v[20:{19 + 2 * count}], v2 offset0:4 offset1:1", state)
    for i in range(count):
        assert (state.vgpr[20 + i, 0, :2] == state.vgpr[6 + i, 0, :2]).all()
        assert (state.vgpr[20 + count + i, 0, :2] == state.vgpr[4 + i, 0, :2]).all()
    state.vgpr[2] = size * unit + size * LANE
    execute(f"ds_read_{kind} {'v[30:31]' if count > 1 else 'v30'}, v2", state)
    assert (state.vgpr[30, 0, :2] == state.vgpr[4, 0, :2]).all()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("ds_read_u8", 0x00000091), ("ds_read_i8", 0xFFFFFF91), ("ds_read_u16", 0x0000A291),
        ("ds_read_i16", 0xFFFFA291), ("ds_read_u8_d16", 0xAABB0091),
        ("ds_read_u8_d16_hi", 0x0091CCDD), ("ds_read_i8_d16", 0xAABBFF91),
        ("ds_read_i8_d16_hi", 0xFF91CCDD), ("ds_read_u16_d16", 0xAABBA291),
        ("ds_read_u16_d16_hi", 0xA291CCDD),
    ],
)  # fmt: skip
def test_parts_of_a_register_from_the_lds(line: str, found: int) -> None:
    state, _ = begun(np.zeros(1, np.uint8))
    state.vgpr[2], state.vgpr[4] = 8, 0xC4B3A291
    execute("ds_write_b32 v2, v4 offset:4", state)
    execute(f"{line} v20, v2 offset:4", state)
    assert (state.vgpr[20] == found).all()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("ds_write_b8", 0xFFFFFF91), ("ds_write_b16", 0xFFFFA291),
        ("ds_write_b8_d16_hi", 0xFFFFFFB3), ("ds_write_b16_d16_hi", 0xFFFFC4B3),
    ],
)  # fmt: skip
def test_parts_of_a_register_to_the_lds(line: str, found: int) -> None:
    state, _ = begun(np.zeros(1, np.uint8))
    state.vgpr[2], state.vgpr[4], state.vgpr[5] = 8, 0xC4B3A291, 0xFFFFFFFF
    execute("ds_write_b32 v2, v5", state)
    execute(f"{line} v2, v4", state)
    execute("ds_read_b32 v20, v2", state)
    assert (state.vgpr[20] == found).all()


@pytest.mark.parametrize("words", [1, 3, 4])
@pytest.mark.parametrize("lanes", [2**64 - 1, ODD])
@pytest.mark.parametrize("space", ["global", "buffer"])
def test_a_load_to_the_lds(space: str, words: int, lanes: int) -> None:
    """The lanes one after another, each wave from its own M0 on; the offset counts on both sides."""
    array = np.arange(64 * words + 4, dtype=np.uint32)
    state, address = begun(array, waves=2, lanes=lanes)
    state.lds.write(  # zeros everywhere
        np.zeros(256, np.int64), np.zeros(256, np.int64), 16 * np.arange(256, dtype=np.uint32),
        np.zeros((256, 16), np.uint8),
    )  # fmt: skip
    buffer(state, address, array.nbytes)
    state.sgpr[M0] = np.array([16, 2048], np.uint32)
    state.vgpr[2] = 4 * words * (63 - LANE)
    size = "" if words == 1 else f"x{words}"
    if space == "global":
        execute(f"global_load_lds_dword{size} v2, s[4:5] offset:16", state)
    else:
        execute(f"buffer_load_dword{size} v2, s[4:7], 0 offen offset:16 lds", state)
    state.write_s64(EXEC, np.array([2**64 - 1], np.uint64))
    for word in range(words):
        starts = np.array([[32], [2064]], np.uint32)
        state.vgpr[3] = starts + np.uint32(4) * (words * LANE + np.uint32(word))
        execute("ds_read_b32 v20, v3", state)
        want = words * (63 - LANE) + 4 + word
        active = LANE % 2 == 0 if lanes == ODD else LANE >= 0
        assert (state.vgpr[20] == np.where(active, want, 0)).all()
