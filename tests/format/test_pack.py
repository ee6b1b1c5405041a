"""The bytes of the format: written out by hand, and compared with slow obvious code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from twofour import FormatError, PatternError, ShapeError, SparseMatrix, UnsupportedError
from twofour.format import pack as packing
from twofour.format import pad
from twofour.pattern import Pattern
from twofour.testing import assert_same_bits, hostile_tensor, random_mask, strategies

EXAMPLE = [
    [0, 3, 0, -1, 5, 0, 0, 2],
    [0, 0, 0, 0, 0, 0, 7, 0],
    [-2, 0, 0, 0, 0, 4, 0, 0],
    [1, 2, 0, 0, 0, -3, 6, 0],
]
"""The matrix of SPEC.md, section 4."""


def obvious_pack(weight: Tensor, wanted: Tensor, pattern: Pattern) -> tuple[list[list[float]], list[list[int]]]:
    """SPEC.md sections 1 to 3, one weight at a time."""
    values, metadata = [], []
    for row, kept in zip(weight.double().tolist(), wanted.tolist(), strict=True):
        row_values: list[float] = []
        bits = ""  # lowest bit first
        for start in range(0, len(row), pattern.group):
            group = range(pattern.group)
            stored = [i for i in group if kept[start + i]]
            for i in range(pattern.group - pattern.keep, pattern.group):
                if len(stored) < pattern.keep and i not in stored:
                    stored.append(i)
            stored.sort()
            row_values += [row[start + i] if kept[start + i] else 0.0 for i in stored]
            if pattern.group == 4 and pattern.keep in (1, 2):
                bits += "".join(f"{i % 2}{i // 2}" for i in stored)
            else:
                bits += "".join("1" if i in stored else "0" for i in group)
        values.append(row_values)
        metadata.append([int(bits[i : i + 8][::-1], 2) for i in range(0, len(bits), 8)])
    return values, metadata


@pytest.mark.of_cpu
def test_the_example_of_the_specification_byte_by_byte() -> None:
    matrix = SparseMatrix.from_dense(torch.tensor(EXAMPLE, dtype=torch.int8), "2:4")
    assert matrix.values.view(torch.uint8).numpy().tobytes() == bytes.fromhex("03FF0502 00000700 FE000400 0102FD06")
    assert matrix.metadata.numpy().tobytes() == bytes.fromhex("CD EE 98 94")


@pytest.mark.of_cpu
def test_the_example_as_4_8_byte_by_byte() -> None:
    matrix = SparseMatrix.from_dense(torch.tensor(EXAMPLE, dtype=torch.int8), "4:8")
    assert matrix.values.view(torch.uint8).numpy().tobytes() == bytes.fromhex("03FF0502 00000700 FE000400 0102FD06")
    assert matrix.metadata.numpy().tobytes() == bytes.fromhex("9A F0 71 63")


def test_the_example_as_1_4_byte_by_byte() -> None:
    matrix = SparseMatrix.from_dense(torch.tensor([[0, 0, 0, -1, 5, 0, 0, 0]], dtype=torch.int8), "1:4")
    assert matrix.values.tolist() == [[-1, 5]]
    assert matrix.metadata.tolist() == [[0b0011]]


@pytest.mark.parametrize(
    ("group", "nibble"),
    [
        ((1, 1, 0, 0), 0x4),
        ((1, 0, 1, 0), 0x8),
        ((1, 0, 0, 1), 0xC),
        ((0, 1, 1, 0), 0x9),
        ((0, 1, 0, 1), 0xD),
        ((0, 0, 1, 1), 0xE),
        ((1, 0, 0, 0), 0x8),
        ((0, 1, 0, 0), 0x9),
        ((0, 0, 1, 0), 0xE),
        ((0, 0, 0, 1), 0xE),
        ((0, 0, 0, 0), 0xE),
    ],
)
def test_the_table_of_2_4_codes(group: tuple[int, ...], nibble: int) -> None:
    alone = SparseMatrix.from_dense(torch.tensor([group], dtype=torch.float32))
    assert alone.metadata.tolist() == [[nibble]]
    second = SparseMatrix.from_dense(torch.tensor([(1, 1, 0, 0, *group)], dtype=torch.float32))
    assert second.metadata.tolist() == [[nibble << 4 | 0x4]]


def test_bitmask_groups_run_on_across_bytes() -> None:
    """Groups of 3: bits 0-2, 3-5, 6-8, 9-11 of the row's bits."""
    matrix = SparseMatrix.from_dense(torch.tensor([[1.0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0]]), "1:3")
    assert matrix.metadata.tolist() == [[0b00010001, 0b00000011]]


@settings(deadline=None, max_examples=120)
@given(st.data(), strategies.patterns())
def test_bytes_equal_those_of_slow_obvious_code(data: st.DataObject, pattern: Pattern) -> None:
    weight = data.draw(strategies.weights(pattern, torch.float32, finite=True, max_groups=4))
    wanted = data.draw(strategies.masks(pattern, tuple(weight.shape)))
    values, metadata = packing.pack(weight, wanted, pattern)
    expected_values, expected_metadata = obvious_pack(weight, wanted, pattern)
    assert metadata.tolist() == expected_metadata
    assert values.tolist() == expected_values
    shapes = packing.packed_shapes(tuple(weight.shape), pattern)
    assert (tuple(values.shape), tuple(metadata.shape)) == shapes


@settings(deadline=None, max_examples=160)
@given(st.data(), strategies.patterns(), strategies.dtypes())
def test_unpack_of_pack_is_where_bit_for_bit(data: st.DataObject, pattern: Pattern, dtype: torch.dtype) -> None:
    weight = data.draw(strategies.weights(pattern, dtype, max_groups=3))
    wanted = data.draw(strategies.masks(pattern, tuple(weight.shape)))
    dense = packing.unpack(*packing.pack(weight, wanted, pattern), tuple(weight.shape), pattern)
    bits = weight.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize])
    assert_same_bits(dense, torch.where(wanted, bits, 0).to(bits.dtype).view(dtype))


@settings(deadline=None, max_examples=80)
@given(st.data(), strategies.patterns())
def test_held_places_are_the_wanted_and_exactly_keep(data: st.DataObject, pattern: Pattern) -> None:
    wanted = data.draw(strategies.masks(pattern, (3, 3 * pattern.group)))
    held = packing.held_mask(wanted, pattern)
    assert bool((held | ~wanted).all())
    assert bool((held.unflatten(-1, (-1, pattern.group)).sum(-1) == pattern.keep).all())
    assert torch.equal(packing.held_mask(held, pattern), held)
    assert torch.equal(
        packing.unpack_mask(packing.pack(wanted.float(), wanted, pattern)[1], (3, 3 * pattern.group), pattern), held
    )


def test_every_byte_of_2_4_metadata_is_accepted_or_refused_rightly() -> None:
    valid = {0x4, 0x8, 0xC, 0x9, 0xD, 0xE}
    for byte in range(256):
        metadata = torch.tensor([[byte]], dtype=torch.uint8)
        if {byte & 15, byte >> 4} <= valid:
            packing.require_metadata(metadata, (1, 8), Pattern())
            held = packing.unpack_mask(metadata, (1, 8), Pattern())
            assert held.nonzero()[:, 1].tolist() == [byte & 3, byte >> 2 & 3, 4 + (byte >> 4 & 3), 4 + (byte >> 6)]
        else:
            for check in (packing.require_metadata, packing.unpack_mask):
                with pytest.raises(FormatError, match=r"indices that repeat or descend: row 0, group [01] \(code 0x"):
                    check(metadata, (1, 8), Pattern())
        if byte >> 4 == 0 and byte in valid:
            packing.require_metadata(metadata, (1, 4), Pattern())
        else:
            with pytest.raises(FormatError, match="metadata has"):
                packing.require_metadata(metadata, (1, 4), Pattern())


def test_the_first_bad_group_is_named() -> None:
    metadata = torch.full((3, 2), 0xEE, dtype=torch.uint8)
    metadata[1, 1] = 0x5E  # row 1, group 3: indices 1, 1
    with pytest.raises(FormatError, match=r"indices that repeat or descend: row 1, group 3 \(code 0x5\)"):
        packing.require_metadata(metadata, (3, 16), Pattern())
    masks = torch.tensor([[0b00001111, 0b00011111]], dtype=torch.uint8)
    with pytest.raises(FormatError, match=r"a bitmask without exactly 4 bits: row 0, group 1 \(code 0x5\)"):
        packing.require_metadata(masks, (1, 16), Pattern.parse("4:8"))


@pytest.mark.parametrize(("text", "columns"), [("2:4", 4), ("1:4", 12), ("3:7", 14), ("1:2", 2)])
def test_bits_after_the_last_group_are_refused(text: str, columns: int) -> None:
    pattern = Pattern.parse(text)
    matrix = SparseMatrix.from_dense(torch.zeros(2, columns), pattern)
    broken = matrix.metadata.clone()
    broken[1, -1] |= 0x80
    with pytest.raises(FormatError, match="bits set after the last group of a row"):
        packing.require_metadata(broken, (2, columns), pattern)


def test_what_is_not_n_m_is_named_with_its_place_and_values() -> None:
    weight = torch.zeros(3, 8)
    weight[1, 4:] = torch.tensor([0.5, -0.0, float("nan"), -2])
    with pytest.raises(
        PatternError, match=r"w is not 2:4: row 1, columns 4:8 hold \[0\.5, -0, nan, -2\], 3 non-zeros where 2"
    ):
        packing.require_pattern(weight, Pattern(), "w")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.bool, torch.complex64])
def test_dtypes_that_cannot_be_stored(dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedError, match=r"cannot be stored as N:M: the format knows float32, .* Convert it"):
        packing.require_dtype(dtype)


def test_shapes_without_whole_groups() -> None:
    with pytest.raises(ShapeError, match=r"'fc' is \[4096, 11007\]: in_features 11007 is not a multiple of 4.*\n.*pad"):
        packing.require_groups((4096, 11007), Pattern(), "'fc'")
    with pytest.raises(ShapeError, match=r"\[8, 4, 3, 3\]: an N:M matrix is .*movedim\(1, -1\)"):
        packing.require_groups((8, 4, 3, 3), Pattern())


def test_a_convolution_flattened_as_the_message_says_has_its_groups_along_input_channels() -> None:
    weight = torch.zeros(2, 4, 3, 3)
    weight[:, :2] = 1
    flat = weight.movedim(1, -1).flatten(0, -2)
    assert SparseMatrix.from_dense(flat).to_dense().equal(flat)
    with pytest.raises(PatternError, match="weight is not 2:4"):
        SparseMatrix.from_dense(weight.flatten(1))


@pytest.mark.parametrize("dtype", packing.VALUE_DTYPES)
def test_pad_appends_zeros(dtype: torch.dtype) -> None:
    weight = hostile_tensor((3, 5), dtype)
    padded = pad(weight, "2:4")
    assert padded.shape == (3, 8)
    assert_same_bits(padded[:, :5], weight)
    assert_same_bits(padded[:, 5:], torch.zeros(3, 3).to(dtype))
    assert pad(padded, "2:4") is padded


def test_pad_of_other_shapes() -> None:
    assert pad(torch.zeros(0, 3), "4:8").shape == (0, 8)
    assert pad(torch.zeros(3, 0), "2:4").shape == (3, 0)
    assert pad(torch.zeros(2, 6, device="meta"), "2:4").shape == (2, 8)
    with pytest.raises(ShapeError, match=r"weight is \[4\]: pad takes \[out_features, in_features\]"):
        pad(torch.zeros(4), "2:4")


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8"])
@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0)])
def test_empty_matrices(text: str, shape: tuple[int, int]) -> None:
    pattern = Pattern.parse(text)
    values, metadata = packing.pack(torch.zeros(shape), torch.zeros(shape, dtype=torch.bool), pattern)
    assert (tuple(values.shape), tuple(metadata.shape)) == packing.packed_shapes(shape, pattern)
    assert packing.unpack(values, metadata, shape, pattern).shape == shape


@pytest.mark.parametrize(
    ("text", "dtype", "numerator", "denominator"),
    [
        ("2:4", torch.float32, 68, 128),
        ("2:4", torch.bfloat16, 36, 64),
        ("2:4", torch.int8, 20, 32),
        ("2:4", torch.float8_e5m2, 20, 32),
        ("1:4", torch.float32, 34, 128),
        ("1:4", torch.float16, 18, 64),
        ("1:4", torch.int8, 10, 32),
        ("4:8", torch.float32, 136, 256),
        ("4:8", torch.float16, 72, 128),
        ("4:8", torch.float8_e4m3fn, 40, 64),
    ],
)
def test_sizes_are_exactly_those_of_the_specification(
    text: str, dtype: torch.dtype, numerator: int, denominator: int
) -> None:
    weight = torch.zeros(5, 64).to(dtype)
    assert SparseMatrix.from_dense(weight, text).nbytes * denominator == weight.nbytes * numerator


def test_random_masks_hold_their_pattern() -> None:
    mask = random_mask((20, 40), "2:4", seed=3)
    assert packing.first_crowded_group(mask, Pattern()) is None
    counts = mask.unflatten(-1, (-1, 4)).sum(-1)
    assert counts.unique().tolist() == [0, 1, 2]
    assert bool((random_mask((20, 40), "2:4", full=True).unflatten(-1, (-1, 4)).sum(-1) == 2).all())
