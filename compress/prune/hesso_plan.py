"""HESSO as a command: the network trains by the settings of recovery while its channels go."""

from __future__ import annotations

from functools import partial

from . import structured_obs
from .hesso import Hesso
from .trained_plan import trained_plan

plan = partial(trained_plan, "hesso", Hesso)
refit = structured_obs.refit
