"""Calls decode.c through ctypes: the forward pass of one token in each of several rows on a CPU."""

import ctypes
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_void_p

import torch

from fastpath.int8 import to_int8
from fastpath.native import library
from model import WeakWater

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
MOST_ROWS, BLOCK, WIDEST_HEAD = 16, 512, 256  # LANES, BLOCK and WIDEST_HEAD of decode.c


class Matrix(ctypes.Structure):
    """The struct of decode.c."""

    _fields_ = [("weights", c_void_p), ("scale", c_void_p), ("block_sums", c_void_p)]


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


class Cache(ctypes.Structure):
    """The struct of decode.c."""

    _fields_ = [("keys", c_void_p), ("values", c_void_p), ("rows", c_int32), ("slots", c_int32), ("type", c_int32)]


class Next(ctypes.Structure):
    """The struct of decode.c."""

    _fields_ = [("token", c_int32), ("row", c_int32), ("position", c_int32)]


def native_cache_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a KVCache for decode.c in a run of `dtype`: several rows read more of it than of the weights."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def why_unsupported(model: WeakWater, dtype: torch.dtype) -> str | None:
    """The reason why decode.c cannot decode with this model and matmuls in `dtype`; None if it can."""
    weight, c = model.lm_head.weight, model.config
    if weight.dtype != torch.float32 or dtype not in TYPES:
        return "decode.c supports fp32, bf16 and int8 only"
    if c.dim % 64 or c.hidden_dim % 64 or c.n_heads * c.head_dim % 64:
        return "decode.c needs widths that are multiples of 64"
    if c.head_dim % 16 or c.head_dim > WIDEST_HEAD:
        return f"decode.c needs a head width that is a multiple of 16 and at most {WIDEST_HEAD}"
    if library()[0] is None:
        return f"decode.c was not compiled: {library()[1]}"
    return None


class NativeDecoder:
    """A decoder with matrices in `dtype` (int8: each row with a scale); only for a model that `why_unsupported` returns
    None for. Holds copies of the weights: create a new one after they change."""

    def __init__(self, model: WeakWater, dtype: torch.dtype):
        c, decoder = model.config, model.model
        self.compiled, self.config = library()[0], c
        size, decode = self.compiled.scratch_size, self.compiled.decode
        size.argtypes, size.restype = [POINTER(Model), c_int, c_int, c_int], c_int64
        decode.argtypes, decode.restype = [*map(POINTER, (Model, Layer, Cache, Next)), c_int, c_void_p, c_void_p,
                                           c_int], None
        self.tensors = []  # decode.c gets their addresses, so they must live as long as this object

        def address(tensor: torch.Tensor, shape: tuple, dtype: torch.dtype = torch.float32) -> int:
            if tensor.shape != shape:  # C would read out of bounds
                raise ValueError(f"decode.c expects a tensor of shape {shape}, not {tuple(tensor.shape)}")
            self.tensors.append(tensor.detach().to(dtype).contiguous())
            return self.tensors[-1].data_ptr()

        def matrix(linear: torch.nn.Linear, shape: tuple) -> Matrix:
            if dtype != torch.int8:
                return Matrix(address(linear.weight, shape, dtype))
            numbers, scale = to_int8(linear.weight)
            blocks = torch.stack([block.sum(1, dtype=torch.int32) for block in numbers.split(BLOCK, dim=1)], dim=1)
            return Matrix(address(numbers, shape, torch.int8), address(scale, shape[:1]),
                          address(blocks, blocks.shape, torch.int32))

        C, F, D, V, S = c.dim, c.hidden_dim, c.head_dim, c.vocab_size, c.max_seq_len
        self.model = Model(
            C, F, c.n_layers, c.n_heads, c.n_kv_heads, D, V, TYPES[dtype], c.norm_eps,
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

    def __call__(self, tokens: list[int], rows: list[int], positions: list[int], keys: torch.Tensor,
                 values: torch.Tensor) -> torch.Tensor:
        """Store tokens[i] at positions[i] of row rows[i] of the cache (layers, B, K, S, D), float32 or bfloat16. The
        rows are all different. Returns logits (N, V)."""
        c, (_, B, _, slots, _) = self.config, keys.shape
        assert len(tokens) == len(rows) == len(positions) == len(set(rows)) and 0 <= min(rows) <= max(rows) < B
        assert 0 <= min(tokens) <= max(tokens) < c.vocab_size
        assert 0 <= min(positions) <= max(positions) < min(slots, c.max_seq_len)
        for cached in (keys, values):  # C would read and write out of bounds
            assert cached.shape == (c.n_layers, B, c.n_kv_heads, slots, c.head_dim)
            assert cached.is_contiguous() and cached.dtype == keys.dtype and TYPES[keys.dtype] < 2
        cache, threads = Cache(keys.data_ptr(), values.data_ptr(), B, slots, TYPES[keys.dtype]), torch.get_num_threads()
        logits = torch.empty(len(tokens), c.vocab_size, dtype=torch.float32)
        following = [Next(*each) for each in zip(tokens, rows, positions, strict=True)]
        for begin in range(0, len(following), MOST_ROWS):
            part = following[begin:begin + MOST_ROWS]
            size = self.compiled.scratch_size(self.model, slots, len(part), threads)
            scratch = torch.empty(size, dtype=torch.float32)
            self.compiled.decode(self.model, self.layers, cache, (Next * len(part))(*part), len(part),
                                 logits[begin:].data_ptr(), scratch.data_ptr(), threads)
        return logits
