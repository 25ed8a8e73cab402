"""Strategies for hostile input that several tests use."""

from __future__ import annotations

from hypothesis import strategies as st

SPLICES = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 3000), st.binary(max_size=40) | st.just(bytes(2000))), max_size=4
)
"""Where to change bytes (a share of the file), how many are removed, and what is put in their place."""

FLIPS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1, max_size=4)
"""Where to change bits (a share of the file), and which bit."""

TEXTS = st.text(max_size=20) | st.sampled_from(
    ["a, b", 'a "b" c', '"', "\u2028", "\ufeff", "\x00", "\n", "v.mp4", "a\tb", "${oc.env:HOME}", "../x", "\ud800"]
)
VALUES = st.recursive(
    TEXTS | st.none() | st.booleans() | st.integers() | st.floats(), lambda inner: st.lists(inner, max_size=3)
)
"""Any JSON value but an object."""
OBJECTS = VALUES | st.dictionaries(TEXTS, VALUES, max_size=3)


def splice(content: bytes, splices: list[tuple[float, int, bytes]]) -> bytes:
    for share, removed, added in splices:
        position = int(share * len(content))
        content = content[:position] + added + content[position + removed :]
    return content


def flip(content: bytes, flips: list[tuple[float, int]]) -> bytes:
    changed = bytearray(content)
    for share, bit in flips:
        if changed:
            changed[int(share * len(changed))] ^= 1 << bit
    return bytes(changed)


CHANGES = SPLICES.map(lambda splices: lambda content: splice(content, splices)) | FLIPS.map(
    lambda flips: lambda content: flip(content, flips)
)
"""Functions from the bytes of a file to damaged ones."""
