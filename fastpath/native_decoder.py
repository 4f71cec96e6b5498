"""Calls decode.c through ctypes: the forward pass of one token on a CPU."""

import ctypes
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_void_p

import torch

from fastpath.int8 import to_int8
from fastpath.native import library
from model import WeakWater

MATRIX_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


class Matrix(ctypes.Structure):
    """The struct of decode.c."""

    _fields_ = [("weights", c_void_p), ("scale", c_void_p)]


class Layer(ctypes.Structure):
    """The struct of decode.c."""

    _fields_ = [(name, c_void_p) for name in ("attention_norm", "q_norm", "k_norm", "mlp_norm")]
    _fields_ += [(name, Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")]


class Model(ctypes.Structure):
    """The struct of decode.c."""

    _fields_ = [(name, c_int32) for name in ("dim", "hidden", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab",
                                             "matrix_type")]
    _fields_ += [("norm_eps", c_float)]
    _fields_ += [(name, c_void_p) for name in ("embedding", "norm", "cos", "sin")]
    _fields_ += [("head", Matrix)]


def why_unsupported(model: WeakWater, dtype: torch.dtype) -> str | None:
    """The reason why decode.c cannot decode with this model and matmuls in `dtype`; None if it can."""
    weight, c = model.lm_head.weight, model.config
    if weight.dtype != torch.float32 or dtype not in MATRIX_TYPES:
        return "decode.c supports fp32, bf16 and int8 only"
    if c.dim % 64 or c.hidden_dim % 64 or c.n_heads * c.head_dim % 64:
        return "decode.c needs widths that are multiples of 64"
    if library()[0] is None:
        return f"decode.c was not compiled: {library()[1]}"
    return None


class NativeDecoder:
    """A decoder for single rows, with matrices in `dtype` (int8: each row with a scale); only for a model that
    `why_unsupported` returns None for. Holds copies of the weights: create a new one after they change."""

    def __init__(self, model: WeakWater, dtype: torch.dtype):
        c, decoder = model.config, model.model
        self.compiled, self.config = library()[0], c
        size, decode = self.compiled.scratch_size, self.compiled.decode_token
        size.argtypes, size.restype = [POINTER(Model), c_int, c_int], c_int64
        decode.argtypes, decode.restype = [POINTER(Model), POINTER(Layer), c_int, c_int, c_void_p, c_void_p, c_int,
                                           c_void_p, c_void_p, c_int], None
        self.tensors = []  # decode.c gets their addresses, so they must live as long as this object

        def address(tensor: torch.Tensor, shape: tuple, dtype: torch.dtype = torch.float32) -> int:
            if tensor.shape != shape:  # C would read out of bounds
                raise ValueError(f"decode.c expects a tensor of shape {shape}, not {tuple(tensor.shape)}")
            self.tensors.append(tensor.detach().to(dtype).contiguous())
            return self.tensors[-1].data_ptr()

        def matrix(linear: torch.nn.Linear, shape: tuple) -> Matrix:
            if dtype != torch.int8:
                return Matrix(address(linear.weight, shape, dtype), None)
            numbers, scale = to_int8(linear.weight)
            return Matrix(address(numbers, shape, torch.int8), address(scale, shape[:1]))

        C, F, D, V, S = c.dim, c.hidden_dim, c.head_dim, c.vocab_size, c.max_seq_len
        self.model = Model(
            C, F, c.n_layers, c.n_heads, c.n_kv_heads, D, V, MATRIX_TYPES[dtype], c.norm_eps,
            address(decoder.embed_tokens.weight, (V, C)), address(decoder.norm.weight, (C,)),
            address(decoder.rotary.cos_SD, (S, D)), address(decoder.rotary.sin_SD, (S, D)),
            matrix(model.lm_head, (V, C)))
        self.layers = (Layer * c.n_layers)()
        for layer, block in zip(self.layers, decoder.layers, strict=True):
            attention, mlp = block.self_attn, block.mlp
            head_norms = (attention.q_norm, attention.k_norm) if c.qk_norm else (None, None)
            queries, keys = c.n_heads * D, c.n_kv_heads * D
            layer.__init__(
                address(block.input_layernorm.weight, (C,)),
                *(norm and address(norm.weight, (D,)) for norm in head_norms),
                address(block.post_attention_layernorm.weight, (C,)),
                *(matrix(linear, shape) for linear, shape in (
                    (attention.q_proj, (queries, C)), (attention.k_proj, (keys, C)), (attention.v_proj, (keys, C)),
                    (attention.o_proj, (C, queries)), (mlp.gate_proj, (F, C)), (mlp.up_proj, (F, C)),
                    (mlp.down_proj, (C, F)))))

    def __call__(self, token: int, position: int, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Store a token at `position` in the cache (layers, 1, K, S, D), float32. Returns logits (1, V)."""
        c, slots, threads = self.config, keys.shape[3], torch.get_num_threads()
        assert 0 <= token < c.vocab_size and 0 <= position < min(slots, c.max_seq_len)
        for cached in (keys, values):  # C would read and write out of bounds
            assert cached.shape == (c.n_layers, 1, c.n_kv_heads, slots, c.head_dim)
            assert cached.is_contiguous() and cached.dtype == torch.float32
        scratch = torch.empty(self.compiled.scratch_size(self.model, slots, threads), dtype=torch.float32)
        logits = torch.empty(1, c.vocab_size, dtype=torch.float32)
        self.compiled.decode_token(self.model, self.layers, token, position, keys.data_ptr(), values.data_ptr(), slots,
                                   logits.data_ptr(), scratch.data_ptr(), threads)
        return logits
