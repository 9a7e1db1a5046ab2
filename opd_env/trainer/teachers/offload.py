"""Weights that lie in CPU memory and are on the accelerator only while they are needed.

Worked example::

    pin(model, device)                         # once: faster copies to a GPU
    with on_device(model, device):
        model(batch)                           # on the GPU
                                               # here the GPU's copy is gone; nothing was copied back

Frozen weights do not change, so the copy in CPU memory stays good and is simply taken up again.

Test it alone: ``pytest tests/trainer/teachers/test_offload.py``
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn


@contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Within, all parameters and buffers are on ``device``; then they are again what they were, also after an error.

    Weights that are there already stay, so that contexts may be nested.
    """
    resting = [(tensor, tensor.data) for tensor in _tensors(module)]
    try:
        for tensor, data in resting:
            tensor.data = _copied(data, device)
        yield
    finally:
        for tensor, data in resting:
            tensor.data = data


def pin(module: nn.Module, device: torch.device) -> None:
    """Moves weights in CPU memory to pages from which a GPU copies without a detour; other devices need none."""
    if device.type == "cuda":
        for tensor in _tensors(module):
            if tensor.device.type == "cpu":
                tensor.data = tensor.data.pin_memory()


def _copied(data: Tensor, device: torch.device) -> Tensor:
    return data.to(device, non_blocking=True)


def _tensors(module: nn.Module) -> list[Tensor]:
    """Each once, also where weights are tied."""
    return list({id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}.values())
