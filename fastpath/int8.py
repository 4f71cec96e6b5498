"""Weights in 8 bits: each row of a matrix as whole numbers from -127 to 127 and one scale. Norms stay as they are.

A row's largest weight becomes 127 or -127, so rounding what was rounded before gives the same numbers again.
"""

import torch
from torch import nn

LARGEST = 127


def to_int8(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix (R, C) → int8 (R, C) and the scale of each row (R,), float32."""
    matrix = matrix.detach().float()
    scale = (matrix.abs().amax(dim=1) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return (matrix / scale[:, None]).round().to(torch.int8), scale


def from_int8(numbers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The float32 matrix (R, C) of `to_int8`."""
    return numbers.float() * scale[:, None]


def state_to_int8(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(a state dict with every matrix in int8, the scales by the name of their matrix). Tied matrices stay one."""
    made, small, scales = {}, {}, {}
    for name, tensor in state.items():
        if tensor.ndim != 2:
            small[name] = tensor
            continue
        if tensor.data_ptr() not in made:
            made[tensor.data_ptr()] = to_int8(tensor)
        small[name], scales[name] = made[tensor.data_ptr()]
    return small, scales


def state_from_int8(small: dict[str, torch.Tensor], scales: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The float32 state dict of `state_to_int8`. Raises ValueError, naming a matrix, if its scales do not fit."""
    for name, tensor in small.items():
        if tensor.dtype == torch.int8 and (name not in scales or scales[name].shape != tensor.shape[:1]):
            raise ValueError(f"{name} has no scale for each row")
    return {name: from_int8(tensor, scales[name]) if name in scales else tensor for name, tensor in small.items()}


@torch.no_grad()
def round_weights(model: nn.Module) -> None:
    """Replace every matrix of a model by what int8 keeps of it."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.copy_(from_int8(*to_int8(parameter)))
