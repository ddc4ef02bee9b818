from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from graphopt_passes.quant.blockwise._packing import pack, pack_rows, row_bytes, unpack

TYPES = {2: ml_dtypes.uint2, 4: ml_dtypes.uint4}


def draw(bits: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**bits, shape).astype(np.uint8)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(1,), (7, 3), (5, 9), (16, 4), (33, 31)])
def test_what_is_packed_unpacks_whatever_its_size(bits: int, shape: tuple[int, ...]) -> None:
    codes = draw(bits, *shape)
    packed = pack(codes, bits)
    assert packed.size == -(-codes.size * bits // 8)
    np.testing.assert_array_equal(unpack(packed, bits, codes.size), codes.reshape(-1))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("shape", [(3, 5), (8, 16)])
def test_codes_are_packed_as_onnx_packs_them(bits: int, shape: tuple[int, ...]) -> None:
    codes = draw(bits, *shape)
    assert pack(codes, bits).tobytes() == ir.tensor(codes.astype(TYPES[bits])).tobytes()


def test_codes_of_any_memory_order_are_packed_in_order() -> None:
    codes = draw(4, 6, 10)
    np.testing.assert_array_equal(pack(codes.T, 4), pack(np.ascontiguousarray(codes.T), 4))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_packed_row_comes_apart_by_masks_and_shifts(bits: int) -> None:
    codes = draw(bits, 5, 24)
    packed = pack_rows(codes, bits)
    assert packed.shape == (5, row_bytes(24, bits))
    parts = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), codes)
