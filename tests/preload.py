"""Imported once by the server that ``tests/forked.py`` forks from."""

import av  # noqa: F401
import matplotlib.figure  # noqa: F401
import torch.utils.tensorboard  # noqa: F401

import tmass_dist.evaluation.rescore
import tmass_dist.validation  # noqa: F401
from tmass_dist.engine.zero import _deepspeed
from tmass_dist.models.backbone import _open_clip

_deepspeed()
_open_clip()
