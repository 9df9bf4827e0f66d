"""Where one rank's equal slice of a divided tensor lies in the whole tensor. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Division:
    """A tensor cut into ``count`` equal, contiguous slices along ``dimension``, and the number of one of them."""

    dimension: int = 0
    index: int = 0
    count: int = 1

    def whole(self, part: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the tensor of which one slice has the shape ``part``."""
        return tuple(size * self.count if axis == self.dimension else size for axis, size in enumerate(part))

    def region(self, part: tuple[int, ...]) -> tuple[slice, ...]:
        """Where in the whole tensor this slice, of the shape ``part``, lies: an index for tensors."""
        start = self.index * part[self.dimension]
        along = slice(start, start + part[self.dimension])
        return tuple(along if axis == self.dimension else slice(0, size) for axis, size in enumerate(part))
