"""What the languages of kernels do each in its own way."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Int


@runtime_checkable
class Program(Protocol):
    """What a program of a kernel works on, and what it needs beyond `jax.numpy`.

    It takes whole blocks, with all their pairs. The indices are those of its pairs, and of their
    blocks, in shapes that broadcast. Refs have one axis.
    """

    row: Int[Array, "..."]
    pair: Int[Array, "..."]
    column: Int[Array, "..."]
    block_row: Int[Array, "..."]
    block_column: Int[Array, "..."]
    padded: bool  # whether there are more pairs than a block has

    def load(self, ref: Any, at: Int[Array, "..."], mask: Bool[Array, "..."]) -> Array:
        """The elements at these indices; where the mask is False, 0, and any integer."""
        ...

    def store(self, ref: Any, at: Any, value: Array, mask: Bool[Array, "..."]) -> None:
        """Writes where the mask is True, in the dtype that the memory has."""
        ...

    def load_of_blocks(self, ref: Any, at: Any, mask: Bool[Array, "..."]) -> Array:
        """Likewise what all pairs of a block share, so that it broadcasts against them."""
        ...

    def store_of_blocks(self, ref: Any, at: Any, value: Array, mask: Bool[Array, "..."]) -> None:
        """Likewise what all pairs of a block agree on."""
        ...

    def largest(self, x: Int[Array, "..."]) -> Int[Array, "..."]:
        """Of every block the largest element."""
        ...

    def table(self, ref: Any, number: int) -> Any:
        """One of the tables of 16 numbers that lie in memory one behind the other."""
        ...

    def lookup(self, table: Any, index: Int[Array, "..."]) -> Float[Array, "..."]:
        """Entries of a table."""
        ...
