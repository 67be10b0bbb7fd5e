"""Named key streams.

The only file that creates keys and generators (the order of windows is a keyed permutation and needs neither). A stream is
named, so that equal integers in two streams never alias, and addressed by what it is for (a path, a layer, a prompt), never by
the order of calls. Must not know what is drawn.
"""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["below", "fold", "fold_words", "generator", "packed", "stream", "unpacked", "words"]


def words(name: str | int) -> tuple[int, ...]:
    """The 32-bit words that stand for a name: two of a hash for text, so that names do not collide in practice.

    An integer below 2^64 gives its own two words, high first.

    Raises:
      ValueError: the integer is negative or has more than 64 bits.
    """
    if isinstance(name, str):
        digest = hashlib.sha256(name.encode()).digest()
        return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")
    if not 0 <= name < 2**64:
        raise ValueError(f"got {name}, expected an integer from 0 to 2^64 - 1")
    return name >> 32, name & 0xFFFFFFFF


def fold(key: jax.Array, *names: str | int) -> jax.Array:
    """The key at address `names` below `key`."""
    for name in names:
        for word in words(name):
            key = jax.random.fold_in(key, jnp.uint32(word))
    return key


def fold_words(key: jax.Array, words_2: jax.Array) -> jax.Array:
    """`fold` of one name by its two words, uint32 [2]: under jit, where names are data."""
    return jax.random.fold_in(jax.random.fold_in(key, words_2[0]), words_2[1])


def below(key: jax.Array, number: jax.Array) -> jax.Array:
    """`fold` of one integer below 2^32: under jit, where integers are data."""
    return fold_words(key, jnp.stack([jnp.uint32(0), number.astype(jnp.uint32)]))


def stream(seed: int | jax.Array, *names: str | int) -> jax.Array:
    """The typed threefry key of the stream `names` of `seed` (an integer below 2^32)."""
    # The implementation is named: draws of rbg depend on the sharding, threefry's do not.
    return fold(jax.random.key(jnp.uint32(seed), impl="threefry2x32"), *names)


def packed(key: jax.Array) -> jax.Array:
    """A key, or several, as plain numbers: uint32 [..., 2]."""
    return jax.random.key_data(key)


def unpacked(numbers: jax.Array) -> jax.Array:
    """The inverse of `packed`."""
    return jax.random.wrap_key_data(numbers, impl="threefry2x32")


def generator(seed: int, name: str, *names: str | int) -> np.random.Generator:
    """The NumPy generator of a named stream of `seed`, for what runs on the host."""
    # At least one name, a text: a SeedSequence fills up with zeros, so that the number 0 alone would be no name at all.
    entropy = [seed, *(word for part in (name, *names) for word in words(part))]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))
