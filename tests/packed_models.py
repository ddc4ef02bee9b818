"""A small model that uses every coding of the container, and mutants of its container."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.random import Generator
from onnx import TensorProto, helper, numpy_helper

from graphopt.pack import pack
from graphopt.pack._symbols import xz
from graphopt.pack.decoder import HEADER, Container, ContainerError, _from_xz

Array = np.ndarray[Any, Any]


def weights(seed: int = 0) -> dict[str, Array]:
    """Weights for which different codings are the smallest."""
    rng = np.random.default_rng(seed)
    book = np.sort(rng.normal(size=16)).astype(np.float32)
    scale = np.exp(rng.normal(size=(16, 16, 1, 1)) * 1.5)
    smooth = rng.normal(size=(16, 16, 1, 1)) * scale + 0.2 * rng.normal(size=(16, 16, 3, 3)) * scale
    nearest = np.abs(book[:, None] - smooth.reshape(1, -1)).argmin(0)
    sparse = np.where(rng.random((100, 80)) < 0.9, 0, rng.normal(size=(100, 80)))
    return {
        "clustered": book[nearest].reshape(16, 16, 3, 3),
        "sparse": sparse.astype(np.float32),
        "sparse_clustered": np.where(rng.random((60, 70)) < 0.97, 0, book[rng.integers(16, size=(60, 70))]),
        "plain": rng.normal(size=(33, 17)).astype(np.float32),
        "half": rng.normal(size=(33, 17)).astype(np.float16),
        "double": rng.normal(size=(9, 17)),
        "bytes": np.clip(rng.normal(size=(24, 24, 3)) * 20, -128, 127).astype(np.int8),
        "repeating": np.tile(rng.integers(0, 256, 32).astype(np.uint8), 40),
        "random": rng.integers(0, 256, 700).astype(np.uint8),
        "shape": np.arange(100, dtype=np.int64),
        "constant": np.ones((20, 20), np.float32),
        "small": rng.normal(size=4).astype(np.float32),
    }


def save(path: Path, *, external: bool = False, seed: int = 0) -> Path:
    """Write a model of these weights, with indices in 4 bits and a tensor in a Constant node as well."""
    tensors = [numpy_helper.from_array(np.ascontiguousarray(w), name) for name, w in weights(seed).items()]
    rng = np.random.default_rng(seed + 1)
    nibbles = rng.binomial(15, 0.4, 40 * 30).astype(np.uint8)
    packed = (nibbles[::2] | nibbles[1::2] << 4).tobytes()
    tensors.append(helper.make_tensor("nibbles", TensorProto.UINT4, (40, 30), packed, raw=True))
    held = numpy_helper.from_array(rng.normal(size=(20, 20)).astype(np.float32), "")
    nodes = [helper.make_node("Constant", [], ["held"], value=held), helper.make_node("Identity", ["held"], ["y"])]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, (20, 20))
    model = helper.make_model(
        helper.make_graph(nodes, "g", [], [y], tensors), opset_imports=[helper.make_opsetid("", 21)]
    )
    onnx.save(model, path, save_as_external_data=external, location=f"{path.name}.data", size_threshold=600)
    return path


def container(folder: Path, seed: int = 0) -> tuple[bytes, list[bytes]]:
    """A container, and the files that are in it."""
    folder.mkdir(parents=True, exist_ok=True)
    model = save(folder / "model.onnx", external=bool(seed % 2), seed=seed)
    pack(model, folder / "model.gopt")
    with Container(folder / "model.gopt") as opened:
        files = [(folder / file.name).read_bytes() for file in opened.files]
    return (folder / "model.gopt").read_bytes(), files


def mutant(content: bytes, rng: Generator) -> bytes:
    """A damaged container; half of them have checksums that fit the damage."""
    kinds = (_flipped, _cut, _moved, _overwritten, _other_index, _other_block, _other_block, _other_index)
    return kinds[rng.integers(len(kinds))](content, rng)


def outcome(content: bytes, files: list[bytes], path: Path, *, native: bool = True) -> str:
    """What reading all of it comes to: `refused`, `right`, or `wrong`; anything else raises."""
    path.write_bytes(content)
    try:
        with Container(path, native=native) as opened:
            found: list[bytes] = []
            for number in range(len(opened.files)):
                stream = io.BytesIO()
                opened.copy(number, stream)
                found.append(stream.getvalue())
            for name in opened.tensors:
                opened.array(name)
    except ContainerError:
        return "refused"
    return "right" if found == files else "wrong"


def _flipped(content: bytes, rng: Generator) -> bytes:
    mutable = bytearray(content)
    for place in rng.integers(len(content) * 8, size=rng.integers(1, 9)):
        mutable[place // 8] ^= 1 << int(place % 8)
    return bytes(mutable)


def _cut(content: bytes, rng: Generator) -> bytes:
    return content[: rng.integers(len(content))]


def _moved(content: bytes, rng: Generator) -> bytes:
    a, b, c = sorted(rng.integers(len(content) + 1, size=3))
    return (
        content[:a] + content[b:],
        content[:b] + content[a:],
        content[:a] + content[b:c] + content[a:b] + content[c:],
    )[rng.integers(3)]


def _overwritten(content: bytes, rng: Generator) -> bytes:
    at, size = int(rng.integers(len(content))), int(rng.integers(1, 64))
    filling = (bytes(size), b"\xff" * size, rng.bytes(size))[rng.integers(3)]
    return (content[:at] + filling + content[at + size :])[: len(content)]


def parts(content: bytes) -> tuple[Any, bytes]:
    """Index and blocks of a container."""
    _, _, _, packed, size, *_ = HEADER.unpack(content[: HEADER.size])
    index = json.loads(_from_xz(content[HEADER.size : HEADER.size + packed], size).tobytes())
    return index, content[HEADER.size + packed :]


def whole(index: Any, blocks: bytes) -> bytes:
    """A container of these, with the checksums that fit."""
    text = json.dumps(index).encode()
    packed = xz(text)
    head = HEADER.pack(
        b"\x89GOPT\r\n\x1a",
        1,
        0,
        len(packed),
        len(text),
        zlib.crc32(packed),
        HEADER.size + len(packed) + len(blocks),
        0,
    )
    return head[:-4] + struct.pack("<I", zlib.crc32(head[:-4])) + packed + blocks


def _other_index(content: bytes, rng: Generator) -> bytes:
    """Another value somewhere in the index."""
    index, blocks = parts(content)
    where: Any = index
    while True:
        keys = list(where) if isinstance(where, dict) else list(range(len(where)))
        if not keys:
            break
        key = keys[rng.integers(len(keys))]
        if isinstance(where[key], (list, dict)) and rng.random() < 0.9:
            where = where[key]
            continue
        where[key] = _other_value(where[key], rng)
        break
    return whole(index, blocks)


def _other_value(value: Any, rng: Generator) -> Any:
    odd = (
        -1,
        0,
        1,
        255,
        1 << 20,
        1 << 31,
        1 << 40,
        1 << 61,
        1 << 64,
        1.5,
        None,
        True,
        "",
        "../x",
        [],
        [[]],
        {},
        "waves",
        "gaps ans raw",
    )
    if isinstance(value, int) and rng.random() < 0.4:
        return value + int(rng.integers(-3, 4))
    return odd[rng.integers(len(odd))]


def _other_block(content: bytes, rng: Generator) -> bytes:
    """Other bytes in one block, or another coding of it."""
    index, blocks = parts(content)
    fields = [block for file in index["files"] for block in file[3]] + [b for t in index["tensors"] for b in t[7]]
    chosen = int(rng.integers(len(fields)))
    at = sum(field[2] for field in fields[:chosen])
    field = fields[chosen]
    frame = blocks[at : at + field[2]]
    if rng.random() < 0.2:
        field[1] = fields[rng.integers(len(fields))][1]
    else:
        head = frame[: min(len(frame), 40)] if rng.random() < 0.6 else frame
        frame = (_flipped, _overwritten, _moved, _cut)[rng.integers(4)](head, rng) + frame[len(head) :]
    rest = blocks[at + field[2] :]
    field[2], field[3] = len(frame), zlib.crc32(frame)
    return whole(index, blocks[:at] + frame + rest)
