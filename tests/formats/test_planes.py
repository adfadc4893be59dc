"""Bit planes keep every value, in exactly the bytes and the order that the module describes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.formats.planes import least_size, levels_from, numbers_of, pack, packed_size, stages_of, unpack
from compress.widths import levels_of


@settings(deadline=None)
@given(
    bits=st.one_of(st.integers(1, 8), st.sampled_from("tsabfim")),
    size=st.integers(0, 200),
    seed=st.integers(0, 2**32 - 1),
)
def test_unpack_gives_back_what_pack_was_given(bits: int | str, size: int, seed: int) -> None:
    levels = np.random.default_rng(seed).integers(
        0, 2**bits if isinstance(bits, int) else levels_of(bits).count(), size, dtype=np.uint8
    )
    data = pack(levels, bits)
    assert least_size(size, bits) <= data.size
    assert stages_of(bits) or data.size == packed_size(size, bits)
    assert np.array_equal(unpack(data, bits, size), levels)
    assert np.array_equal(unpack(data.tobytes(), bits, size), levels)


def test_bytes_are_laid_out_as_documented() -> None:
    assert pack(np.array([5, 2, 7], dtype=np.uint8), 3).tolist() == [0b00_11_10_01, 0b00000_1_0_1]
    assert pack(np.array([1, 15, 2], dtype=np.uint8), 4).tolist() == [0xF1, 0x02]
    assert pack(np.array([1, 2, 0, 0, 2, 1], dtype=np.uint8), "t").tolist() == [1 + 2 * 3 + 2 * 81, 1]
    assert pack(np.array([5, 4, 3], dtype=np.uint8), "s").tolist() == [5 + 4 * 6 + 3 * 36]


def test_stages_are_laid_out_as_documented() -> None:
    assert pack(np.array([0, 7, 2, 3], dtype=np.uint8), "b").tolist() == [0b11_10_11_00, 0b00_11, 1]
    assert numbers_of(np.array([0, 1, -1, 2, -2, 3], dtype=np.int16), "b").tolist() == [0, 1, 2, 3, 4, 5]
    assert numbers_of(np.array([0, 1, -1], dtype=np.int16), "t").tolist() == [1, 2, 0]


@pytest.mark.parametrize("bits", [2, 8, "t", "a", "b", "g", "h", "k", "m"])
def test_numbers_are_those_of_every_level(bits: int | str) -> None:
    levels = np.arange(levels_of(bits).low, levels_of(bits).high + 1, dtype=np.int16)
    numbers = numbers_of(levels, bits)
    assert np.array_equal(levels_from(numbers, bits), levels)
    assert len(set(numbers.tolist())) == len(levels)
    assert np.array_equal(unpack(pack(numbers, bits), bits, len(levels)), numbers)


def test_whole_bytes_cost_exactly_the_bits() -> None:
    assert [packed_size(800, bits) for bits in range(1, 9)] == [100 * bits for bits in range(1, 9)]


def test_a_level_beyond_its_bits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"level 8 doesn't fit 3 bits \(0 to 7\)"):
        pack(np.array([8], dtype=np.uint8), 3)
    with pytest.raises(ValueError, match="level 3 is none of 3 levels"):
        pack(np.array([3], dtype=np.uint8), "t")
    with pytest.raises(ValueError, match="level 9 is none of 9 levels"):
        pack(np.array([9], dtype=np.uint8), "b")


def test_a_width_that_no_plane_has_is_refused() -> None:
    with pytest.raises(ValueError, match="9 bits; a plane holds 1 to 8"):
        packed_size(1, 9)
    with pytest.raises(ValueError, match="width 4 isn't one of digits"):
        packed_size(1, "4")


def test_data_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="3 levels of 4 bits are 2 B, not 1"):
        unpack(b"\0", 4, 3)
    for data in (b"\0", b"\0\0\0"):
        with pytest.raises(ValueError, match="5 levels of"):
            unpack(data, "b", 5)
