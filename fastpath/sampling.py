"""Calls sampling.c through ctypes: top-p without a sort of all scores."""

import functools
from ctypes import c_float, c_int, c_int64, c_void_p

import torch

from fastpath.native import library


@functools.cache
def compiled():
    """The C function, or None."""
    if library()[0] is None:
        return None
    function = library()[0].keep_top_p
    function.argtypes = [c_void_p, c_void_p, c_int64, c_int, c_float, c_void_p, c_int]
    function.restype = None
    return function


def keep_top_p(scores_BV: torch.Tensor, top_p: float) -> torch.Tensor | None:
    """The scores (B, V) of the fewest tokens whose probabilities sum to at least top_p, -inf elsewhere; None where C
    cannot be used."""
    if not scores_BV.is_cpu or scores_BV.dtype != torch.float32 or compiled() is None:
        return None
    scores_BV = scores_BV.contiguous()
    kept_BV, candidates_BV = torch.empty_like(scores_BV), torch.empty(scores_BV.shape, dtype=torch.int64)
    compiled()(scores_BV.data_ptr(), kept_BV.data_ptr(), *scores_BV.shape, top_p, candidates_BV.data_ptr(),
               torch.get_num_threads())
    return kept_BV
