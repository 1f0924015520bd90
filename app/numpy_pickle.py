"""Reads pickles of plain values and numpy arrays, as Python 2 wrote CIFAR-10; runs no code in them and needs no numpy.

Only the four names that pickled numpy arrays refer to can be looked up, and each gives a stand-in.
"""

import io
import pickle
from typing import Any


class Array:
    """Stands in for numpy.ndarray: keeps what the pickle says about it."""

    shape: tuple[int, ...] = ()
    content: bytes = b""

    def __setstate__(self, state: tuple[int, tuple[int, ...], object, bool, bytes]) -> None:
        _version, self.shape, _dtype, columns_first, self.content = state
        if columns_first:
            raise ValueError("the array is stored column by column")


class _Dtype:
    """Stands in for numpy.dtype. Its value is not needed: the number of bytes tells uint8 from all wider types."""

    def __init__(self, *_arguments: object) -> None: ...

    def __setstate__(self, _state: object) -> None: ...


class _Unpickler(pickle.Unpickler):
    """Makes a new function for each look-up: a pickle can set attributes on whatever it looks up."""

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case "numpy", "ndarray":
                return Array
            case "numpy", "dtype":
                return _Dtype
            case "numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct":
                return lambda *_arguments: Array()
            case "_codecs", "encode":  # how Python 3 writes bytes in Python 2's protocol
                return lambda text, _encoding: text.encode("latin1")
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")


def load(raw: bytes | bytearray) -> Any:
    """The pickled value, with Python 2 strings as bytes and numpy arrays as `Array`.

    Raises:
        pickle.UnpicklingError: It refers to anything but plain values and numpy arrays; none of it was run.
        EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError: It is malformed.
    """
    return _Unpickler(io.BytesIO(raw), encoding="bytes").load()
