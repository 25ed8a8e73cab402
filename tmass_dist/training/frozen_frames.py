"""Frame embeddings of a frozen image tower, computed once for each video."""

# Shapes: B videos, F frames, H W pixels, C colours, D embedding width.

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from tmass_dist.models.backbone import Towers

MAX_BYTES = 2**30
"""Embeddings kept by each rank; further videos are encoded at every step."""


class FrozenFrames:
    """Remembers what the image tower gave for the same pixels; augmented videos differ, and are encoded each time.

    Each video is encoded alone, so its embeddings are the same bits whatever else is in the batch, and a resumed run
    is bit for bit the one that never stopped.
    """

    def __init__(self) -> None:
        self._frames_FD: dict[bytes, Tensor] = {}
        self._num_bytes = 0

    def encode(self, towers: Towers, pixels_BFHWC: Tensor) -> Tensor:
        """``frames_BFD`` of uint8 frames on the CPU, without gradients; as :meth:`Towers.encode_frames`."""
        rows = []
        for pixels_FHWC in pixels_BFHWC:
            key = hashlib.blake2b(pixels_FHWC.contiguous().numpy().data, digest_size=16).digest()
            frames_FD = self._frames_FD.get(key)
            if frames_FD is None:
                with torch.no_grad():
                    frames_FD = towers.encode_frames(pixels_FHWC[None])[0]
                if self._num_bytes < MAX_BYTES:
                    self._frames_FD[key] = frames_FD
                    self._num_bytes += frames_FD.nbytes
            rows.append(frames_FD)
        return torch.stack(rows)
