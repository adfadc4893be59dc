"""hcompress: second-order pruning and quantization of trained networks, proved in the runtime that serves them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .model import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> object:
    # `hcompress --help` imports this package first: torch is imported only when something needs it.
    if name == "load":
        from .model import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
