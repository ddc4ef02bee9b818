"""Attention of a model, in a few words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from graphopt.analyses.attention.block import AttentionBlock

__all__ = ["as_record", "summaries"]

_CAUSAL = {"no": "", "yes": ", causal", "unknown": ", perhaps causal"}


def as_record(block: AttentionBlock) -> dict[str, Any]:
    """What there is to say of one block, for JSON."""
    return {
        "name": block.name,
        "form": block.form,
        "heads": block.heads,
        "kv_heads": block.kv_heads,
        "width": block.width,
        "value_width": block.value_width,
        "queries": block.queries,
        "keys": block.keys,
        "scale": block.scale if isinstance(block.scale, float) else None,
        "causal": block.causal,
        "masks": [mask.kind for mask in block.masks],
        "cache": block.past,
        "left_alone": block.dropped,
    }


def summaries(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """One line for all blocks that are alike: `6 blocks of 12 heads of 32, 128 queries and keys, causal`."""
    for words, count in Counter(_words(record) for record in records).items():
        yield f"{count} block{'s' if count > 1 else ''} of {words}"


def _words(record: Mapping[str, Any]) -> str:
    heads, shared, queries, keys = (record[name] for name in ("heads", "kv_heads", "queries", "keys"))
    words = f"{heads} head{'s' if heads > 1 else ''} of {record['width']}"
    if record["value_width"] != record["width"]:
        words += f" (values {record['value_width']})"
    if shared != heads:
        words += f" on {shared} of keys"
    words += f", {_length(queries)} queries and keys" if queries == keys else ""
    words += f", {_length(queries)} queries, {_length(keys)} keys" if queries != keys else ""
    words += _CAUSAL[record["causal"]] + (", with a cache" if record["cache"] else "")
    return words + (f": {record['left_alone']}" if record["left_alone"] else "")


def _length(size: int | None) -> str:
    return "any number of" if size is None else str(size)
