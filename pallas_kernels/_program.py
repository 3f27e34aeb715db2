"""What the languages of kernels do each in its own way."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Int


@runtime_checkable
class Program(Protocol):
    """What a program of a kernel works on, and what it needs beyond `jax.numpy`.

    It takes whole blocks, whose items are elements, or pairs of them: all at once, or so many in
    every turn of a loop. The indices are those of its items in the first turn, and of their blocks,
    in shapes that broadcast. Refs have one axis.
    """

    number: Int[Array, ""]  # of this program among all
    row: Int[Array, "..."]
    item: Int[Array, "..."]
    column: Int[Array, "..."]
    block_row: Int[Array, "..."]
    block_column: Int[Array, "..."]
    items: int  # of a block, in a turn
    turns: int
    padded: bool  # whether the last turn has more of them than are left of a block

    def load(self, ref: Any, at: Int[Array, "..."], mask: Bool[Array, "..."]) -> Array:
        """The elements at these indices; where the mask is False, 0, and any integer."""
        ...

    def store(self, ref: Any, at: Any, value: Array, mask: Bool[Array, "..."]) -> None:
        """Writes where the mask is True, in the dtype that the memory has."""
        ...

    def load_of_blocks(self, ref: Any, at: Any, mask: Bool[Array, "..."]) -> Array:
        """Likewise what all items of a block share, so that it broadcasts against them."""
        ...

    def store_of_blocks(self, ref: Any, at: Any, value: Array, mask: Bool[Array, "..."]) -> None:
        """Likewise what all items of a block agree on."""
        ...

    def largest(self, x: Int[Array, "..."]) -> Int[Array, "..."]:
        """Of every block the largest item."""
        ...

    def total(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Of every block the sum of its items, in an order that is always the same."""
        ...

    def gather(self, ref: Any, at: Int[Array, "..."]) -> Array:
        """Entries of a table in memory, at any indices that it has."""
        ...

    def table(self, ref: Any, number: int) -> Any:
        """One of the tables of 16 numbers that lie in memory one behind the other."""
        ...

    def lookup(self, table: Any, index: Int[Array, "..."]) -> Float[Array, "..."]:
        """Entries of a table of 16."""
        ...
