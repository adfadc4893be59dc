"""HESSO-CRIC as a command: channels are tried at zero and put back, then go while the network trains."""

from __future__ import annotations

from functools import partial

from . import structured_obs
from .cric import Cric
from .trained_plan import trained_plan

plan = partial(trained_plan, "cric", Cric)
refit = structured_obs.refit
