"""Where one tensor's bytes lie in a weight file, and how to read only those."""

import dataclasses
import math
import pathlib
from collections.abc import Collection

import ml_dtypes
import numpy as np

# Both kinds of weight file name their dtypes in their own way; these are the ones that both know.
SUPPORTED_DTYPES: dict[str, np.dtype] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint64": np.dtype(np.uint64),
    "uint32": np.dtype(np.uint32),
    "uint16": np.dtype(np.uint16),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}


_BOTH_HALVES = {SUPPORTED_DTYPES["float16"], SUPPORTED_DTYPES["bfloat16"]}


def common_dtype(dtypes: Collection[np.dtype]) -> np.dtype:
    """The narrowest dtype that holds every value of these; float32 for float16 beside bfloat16.

    Those two have no common dtype in NumPy: one has the longer mantissa, the other the range.
    """
    if _BOTH_HALVES <= set(dtypes):
        dtypes = [*(set(dtypes) - _BOTH_HALVES), np.dtype(np.float32)]
    return np.result_type(*dtypes)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor that still lies on disk.

    `strides` counts elements, as torch does, one for each dimension of `shape`; `byte_offset` is
    where the first element lies in the file at `path`.
    """

    path: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    byte_offset: int

    def read(self) -> np.ndarray:
        """Read the tensor into a new, writable, C-contiguous array in host memory.

        Only the span from the tensor's first to its last element is read. A tensor stored in
        another order (a saved transpose, say) needs that span beside the result for a moment.
        Any number of threads may read at once: each call opens the file for itself.

        Raises:
            ValueError: The file has become shorter since it was opened.
        """
        if self.strides == contiguous_strides(self.shape) or math.prod(self.shape) <= 1:
            array = np.empty(self.shape, self.dtype)
            self._fill(array)
            return array
        span = np.empty(spanned_elements(self.shape, self.strides), self.dtype)
        self._fill(span)
        byte_strides = [stride * self.dtype.itemsize for stride in self.strides]
        view = np.lib.stride_tricks.as_strided(span, self.shape, byte_strides, writeable=False)
        return np.array(view, order="C", copy=True)

    def _fill(self, array: np.ndarray) -> None:
        # Plain reads into the destination: pages of a memory map would count as resident memory
        # of this process, and a whole checkpoint would pass through it.
        remaining = array.reshape(-1).view(np.uint8).data
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.byte_offset)
            while len(remaining) > 0:
                num_read = file.readinto(remaining)
                if not num_read:
                    raise ValueError(
                        f"{self.path}: {len(remaining)} bytes of a tensor are missing; the file "
                        "became shorter while it was read, copy or download it again"
                    )
                remaining = remaining[num_read:]


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Count the elements between neighbours along each dimension of a C-contiguous array."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def spanned_elements(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Count the elements from the first to the last of a strided array, both included."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
