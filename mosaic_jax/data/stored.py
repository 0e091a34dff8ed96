"""Images that lie in files and are read when they are asked for."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

# Numbers in the images that are read at once where one after the other will do.
_BLOCK = 1 << 23


class StoredImages:
    """Images uint8 [N, H, W, D] in files, in place of an array of them.

    Like an array it has a shape and a type, and `images[i]`, `images[a:b]` and
    `images[rows]` are arrays, which are read then.
    """

    dtype = np.dtype(np.uint8)

    def __init__(
        self,
        read: Callable[[np.ndarray], np.ndarray],
        number: np.ndarray,
        image_shape: tuple[int, ...],
    ) -> None:
        """No image is read.

        Args:
          read: from numbers of images [n], ascending and unlike each other, to these
            images, uint8 [n, H, W, D]. It may be called in several threads.
          number: [N] int, of each image in the files.
          image_shape: (H, W, D).
        """
        self._read, self._number = read, np.asarray(number)
        self.shape = (len(self._number), *image_shape)

    def __len__(self) -> int:
        """N."""
        return len(self._number)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Read the images that `index` names, an integer, a slice or an array [n]."""
        number = self._number[index]
        if not number.size:
            return np.empty((0, *self.shape[1:]), np.uint8)
        # Rows of clients with few images repeat them.
        wanted, place = np.unique(number, return_inverse=True)
        return self._read(wanted)[place.reshape(number.shape)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All images: they must fit in memory."""
        del copy  # they are read anew
        return self[:].astype(dtype or self.dtype, copy=False)

    def select(self, rows: np.ndarray) -> "StoredImages":
        """The images `rows` [n] int, none of which is read."""
        return StoredImages(self._read, self._number[rows], self.shape[1:])

    def blocks(self) -> Iterator[np.ndarray]:
        """All images in their order, a few megabytes at a time."""
        at_once = max(1, _BLOCK // int(np.prod(self.shape[1:])))
        for start in range(0, len(self), at_once):
            yield self[start : start + at_once]


def selected(image: "np.ndarray | StoredImages", rows: np.ndarray) -> Any:
    """The images `rows` [n] int; those in files stay there."""
    return image.select(rows) if isinstance(image, StoredImages) else image[rows]
