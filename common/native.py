"""decode.c compiled on its first use, and called through ctypes: one token through the network, for generation.py.

No step of the build is the user's: where a C compiler is found (`$CC`, cc, gcc or clang) it takes a second, once for
each machine; where there is none, decoding goes on in torch's own operations.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path

import torch

from model import WeakWater

SOURCE = Path(__file__).with_name("decode.c")
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC"]
MATRIX_TYPES = {torch.float32: 0, torch.bfloat16: 1}


class Layer(ctypes.Structure):
    """As in decode.c."""

    _fields_ = [(name, c_void_p) for name in ("attention_norm", "q_norm", "k_norm", "mlp_norm",
                                              "q", "k", "v", "o", "gate", "up", "down")]


class Model(ctypes.Structure):
    """As in decode.c."""

    _fields_ = [(name, c_int32) for name in ("dim", "hidden", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab",
                                             "matrix_type")]
    _fields_ += [("norm_eps", c_float)]
    _fields_ += [(name, c_void_p) for name in ("embedding", "norm", "cos", "sin", "head")]


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """The compiled decode.c, or None; and in words which of the two, and why."""
    compiler = next(filter(None, map(shutil.which, [os.environ.get("CC", "cc"), "cc", "gcc", "clang"])), None)
    if compiler is None or os.name == "nt":
        return None, "no C compiler was found (cc, gcc, clang or $CC): tokens are computed by torch's operations"
    cpu = Path("/proc/cpuinfo")  # compiled for one kind of CPU, the file may lie where another reads it
    kind = next((line for line in cpu.read_text().splitlines() if line.startswith(("flags", "Features"))), "") \
        if cpu.exists() else platform.processor()
    key = hashlib.sha256("\n".join([SOURCE.read_text(), *FLAGS, compiler, platform.machine(), kind]).encode())
    name = f"decode-{key.hexdigest()[:16]}.so"
    for folder in (SOURCE.parent / "__pycache__", Path(tempfile.gettempdir()) / f"weakwater-{os.getuid()}"):
        try:
            folder.mkdir(exist_ok=True, mode=0o700)
            if folder.stat().st_uid != os.getuid():  # a file of somebody else's is not to be run
                continue
            if not (folder / name).exists():
                compile_to(folder / name, compiler)
            return declare(ctypes.CDLL(str(folder / name))), f"tokens are computed by decode.c, compiled by {compiler}"
        except OSError:  # a folder that cannot be written to, or loaded from
            continue
        except subprocess.CalledProcessError as error:
            first = (error.stderr.strip().splitlines() or ["no message"])[0]
            return None, f"{compiler} could not compile decode.c ({first}): tokens are computed by torch's operations"
    return None, "no folder for the compiled decode.c: tokens are computed by torch's operations"


def compile_to(path: Path, compiler: str) -> None:
    """Whole or not at all. Without OpenMP, which Apple's compiler lacks, if need be: then one thread computes."""
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".so", delete=False) as partial:
        pass
    try:
        for openmp in (["-fopenmp"], []):
            done = subprocess.run([compiler, *FLAGS, *openmp, str(SOURCE), "-o", partial.name, "-lm"],
                                  capture_output=True, text=True)
            if done.returncode == 0:
                break
        done.check_returncode()
        os.replace(partial.name, path)
    finally:
        Path(partial.name).unlink(missing_ok=True)


def declare(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes the functions' types."""
    loaded.scratch_size.argtypes, loaded.scratch_size.restype = [POINTER(Model), c_int, c_int], c_int64
    loaded.decode_token.argtypes = [POINTER(Model), POINTER(Layer), c_int, c_int, c_void_p, c_void_p, c_int, c_void_p,
                                    c_void_p, c_int]
    loaded.decode_token.restype = None
    return loaded


def applies(model: WeakWater, dtype: torch.dtype) -> bool:
    """Whether a NativeDecoder can be made: on a CPU, of float32 weights, for products in float32 or bfloat16, and of
    widths that are multiples of 64."""
    weight, c = model.lm_head.weight, model.config
    return (weight.device.type == "cpu" and weight.dtype == torch.float32 and dtype in MATRIX_TYPES
            and c.dim % 64 == c.hidden_dim % 64 == 0 and library()[0] is not None)


class NativeDecoder:
    """decode.c over a model's weights, matrices in `dtype`, where `applies`. Make it anew after the weights change."""

    def __init__(self, model: WeakWater, dtype: torch.dtype):
        c, decoder = model.config, model.model
        self.compiled, self.vocab_size, self.scratch = library()[0], c.vocab_size, torch.empty(0)
        self.tensors = []  # what decode.c is given the addresses of must live as long as this

        def address(tensor: torch.Tensor, dtype: torch.dtype = torch.float32) -> int:
            self.tensors.append(tensor.detach().to(dtype).contiguous())
            return self.tensors[-1].data_ptr()

        self.model = Model(
            c.dim, c.hidden_dim, c.n_layers, c.n_heads, c.n_kv_heads, c.head_dim, c.vocab_size, MATRIX_TYPES[dtype],
            c.norm_eps, address(decoder.embed_tokens.weight), address(decoder.norm.weight),
            address(decoder.rotary.cos_SD), address(decoder.rotary.sin_SD), address(model.lm_head.weight, dtype))
        self.layers = (Layer * c.n_layers)()
        for layer, block in zip(self.layers, decoder.layers, strict=True):
            attention, mlp = block.self_attn, block.mlp
            norms = [block.input_layernorm, *((attention.q_norm, attention.k_norm) if c.qk_norm else (None, None)),
                     block.post_attention_layernorm]
            matrices = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
                        mlp.gate_proj, mlp.up_proj, mlp.down_proj]
            layer.__init__(*(norm and address(norm.weight) for norm in norms),
                           *(address(matrix.weight, dtype) for matrix in matrices))

    def __call__(self, token: int, position: int, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Put a token into the cache (layers, 1, K, S, D), float32, at `position`; logits (1, V) after it."""
        threads, slots = torch.get_num_threads(), keys.shape[3]
        size = self.compiled.scratch_size(self.model, slots, threads)
        if len(self.scratch) < size:
            self.scratch = torch.empty(size)
        logits = torch.empty(1, self.vocab_size)
        self.compiled.decode_token(self.model, self.layers, token, position, keys.data_ptr(), values.data_ptr(), slots,
                                   logits.data_ptr(), self.scratch.data_ptr(), threads)
        return logits
