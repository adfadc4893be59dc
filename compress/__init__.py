"""hcompress: second-order pruning and quantization of trained networks, proved in the runtime that serves them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .model import load as load
    from .prune.cric import Cric as Cric
    from .prune.hesso import Hesso as Hesso
    from .train.adahessian import AdaHessian as AdaHessian
    from .train.mfac_optimizer import MFAC as MFAC

__version__ = "0.1.0"
__all__ = ["MFAC", "AdaHessian", "Cric", "Hesso", "__version__", "load"]
LAZY = {
    "load": "model",
    "Hesso": "prune.hesso",
    "Cric": "prune.cric",
    "AdaHessian": "train.adahessian",
    "MFAC": "train.mfac_optimizer",
}


def __getattr__(name: str) -> object:
    # `hcompress --help` imports this package first: torch is imported only when something needs it.
    if name in LAZY:
        from importlib import import_module

        return getattr(import_module(f".{LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
