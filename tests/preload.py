"""Imported once by the server that ``tests/forked.py`` forks from."""

import av  # noqa: F401
import matplotlib.figure  # noqa: F401
import torch.utils.tensorboard  # noqa: F401

import tmass_dist.evaluation.stored
import tmass_dist.training.validation  # noqa: F401
from tmass_dist.models.library import open_clip
from tmass_dist.training.engine import _deepspeed

_deepspeed()
open_clip()
