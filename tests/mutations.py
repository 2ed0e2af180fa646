"""Mutations of files, for tests with hypothesis: of bytes, and of values in documents."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

NUMBERS = st.integers() | st.integers(2**62, 2**70) | st.floats() | st.just(10**400)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@st.composite
def mutated_bytes(draw: Callable[..., Any], content: bytes) -> bytes:
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        stop = min(len(data), start + draw(st.integers(0, 8) | st.integers(0, 400)))
        kind = draw(st.sampled_from(["set", "insert", "delete", "cut", "copy", "move"]))
        if kind == "set":
            data[start:stop] = draw(st.binary(min_size=stop - start, max_size=stop - start))
        elif kind == "insert":
            data[start:start] = draw(st.binary(max_size=8))
        elif kind == "delete":
            del data[start:stop]
        elif kind == "cut":
            del data[start:]
        else:
            to = draw(st.integers(0, len(data)))
            data[to : to if kind == "copy" else to + stop - start] = data[start:stop]
    return bytes(data)


@st.composite
def mutated_document(draw: Callable[..., Any], document: dict[str, Any]) -> dict[str, Any]:
    """With one or two values replaced, dropped or renamed anywhere."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 2))):
        place: Any = document
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and place[key] and draw(st.integers(0, 3)):
                place = place[key]
                continue
            kind = draw(st.sampled_from(["replace", "replace", "drop", "add"]))
            if kind == "drop":
                del place[key]
            elif kind == "replace":
                place[key] = draw(VALUES)
            elif isinstance(place, dict):
                place[draw(st.text(max_size=5))] = draw(VALUES)
            else:
                place.append(draw(VALUES))
            break
    return document
