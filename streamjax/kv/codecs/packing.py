"""Codes of less than eight bits in bytes: planes of codes lie on each other, the first in the lowest bits."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Shaped


def packed(codes: Shaped[Array, "... G c"], bits: int) -> Shaped[Array, "... g c"]:
    """Along the last axis but one: with two planes, place i and place i + G / 2 share a byte."""
    if bits == 8:
        return codes
    planes = jnp.split(codes, 8 // bits, axis=-2)
    whole = planes[0]
    for index, plane in enumerate(planes[1:], 1):
        whole = whole | (plane << jnp.uint8(index * bits))
    return whole


def plane_of(codes: Shaped[Array, "..."], bits: int, plane: int) -> Shaped[Array, "..."]:
    """The codes of one plane."""
    if bits == 8:
        return codes
    shifted = codes >> jnp.uint8(plane * bits) if plane else codes
    return shifted if plane == 8 // bits - 1 else shifted & jnp.uint8(2**bits - 1)


def with_plane(codes: Shaped[Array, "..."], new: Shaped[Array, "..."], bits: int, plane: int) -> Shaped[Array, "..."]:
    """The same bytes with other codes in one plane."""
    if bits == 8:
        return new
    mask = (2**bits - 1) << (plane * bits)
    return (codes & jnp.uint8(255 - mask)) | (new << jnp.uint8(plane * bits))
