"""decode.c compiled on its first use, and called through ctypes: one token through the network, for generation.py.

No step of the build is the user's: where a C compiler is found (`$CC`, cc, gcc or clang) it takes a second, once for
each machine; where there is none, decoding goes on in torch's own operations.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path

import torch

from common.runtime import cpu_flags
from model import WeakWater

SOURCE = Path(__file__).with_name("decode.c")
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-Wno-psabi", "-shared", "-fPIC"]
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
    if os.name == "nt":
        return None, "tokens are computed by torch's operations: decode.c is not compiled on Windows"
    commands = [shlex.split(os.environ.get("CC", "")), ["cc"], ["gcc"], ["clang"]]
    commands = [command for command in commands if command and shutil.which(command[0])]
    trouble = [] if commands else ["no C compiler was found (cc, gcc, clang or $CC)"]
    # compiled for one kind of CPU, the file may lie where another one reads it
    key = [SOURCE.read_bytes().hex(), *FLAGS, platform.system(), platform.machine(), *sorted(cpu_flags())]
    for command in commands:
        name = f"decode-{hashlib.sha256(' '.join([*key, *command]).encode()).hexdigest()[:16]}.so"
        for folder in (SOURCE.parent / "__pycache__", Path(tempfile.gettempdir()) / f"weakwater-{os.getuid()}"):
            try:
                own_folder(folder)
                if not (folder / name).exists():
                    compile_to(folder / name, command)
                loaded = declare(ctypes.CDLL(str(folder / name)))
            except (OSError, subprocess.SubprocessError) as error:
                said = (getattr(error, "stderr", None) or str(error)).strip().splitlines() or [type(error).__name__]
                trouble.append(f"{' '.join(command)}: {said[0]}")
                continue
            threads = "" if loaded.has_openmp() else ", on one thread, since it lacks OpenMP"
            return loaded, f"tokens are computed by decode.c, compiled by {' '.join(command)}{threads}"
    return None, f"tokens are computed by torch's operations, since decode.c was not compiled: {trouble[0]}"


def own_folder(folder: Path) -> None:
    """Make the folder if need be. Raises PermissionError where others could put their code into it, which would run."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o755)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} is not a folder that only this user may write to")


def compile_to(path: Path, command: list[str]) -> None:
    """Whole or not at all. Without OpenMP, which Apple's compiler lacks, if need be."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        for openmp in (["-fopenmp"], []):
            done = subprocess.run([*command, *FLAGS, *openmp, str(SOURCE), "-o", str(made), "-lm"], timeout=60,
                                  capture_output=True, encoding="utf-8", errors="replace")
            if done.returncode == 0:
                break
        done.check_returncode()
        for old in path.parent.glob("decode-*.so"):  # of another source; whoever uses it keeps it
            old.unlink(missing_ok=True)
        os.replace(made, path)


def declare(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes the functions' types."""
    loaded.scratch_size.argtypes, loaded.scratch_size.restype = [POINTER(Model), c_int, c_int], c_int64
    loaded.decode_token.argtypes = [POINTER(Model), POINTER(Layer), c_int, c_int, c_void_p, c_void_p, c_int, c_void_p,
                                    c_void_p, c_int]
    loaded.decode_token.restype = None
    loaded.has_openmp.argtypes, loaded.has_openmp.restype = [], c_int
    return loaded


def applies(model: WeakWater, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether a NativeDecoder can be made, with products in `dtype`; and the reason, for the user."""
    weight, c = model.lm_head.weight, model.config
    if weight.device.type != "cpu":
        return False, f"tokens are computed by torch's operations on {weight.device.type}"
    if weight.dtype != torch.float32 or dtype not in MATRIX_TYPES:
        return False, "tokens are computed by torch's operations: decode.c knows fp32 and bf16 only"
    if c.dim % 64 or c.hidden_dim % 64:
        return False, "tokens are computed by torch's operations: decode.c needs widths that are multiples of 64"
    loaded, reason = library()
    return loaded is not None, reason


class NativeDecoder:
    """decode.c over a model's weights, matrices in `dtype`, where `applies`. Make it anew after the weights change."""

    def __init__(self, model: WeakWater, dtype: torch.dtype):
        c, decoder = model.config, model.model
        self.compiled, self.config = library()[0], c
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
        c, slots, threads = self.config, keys.shape[3], torch.get_num_threads()
        assert 0 <= token < c.vocab_size and 0 <= position < min(slots, c.max_seq_len)
        for cached in (keys, values):  # C would read and write whatever lies there
            assert cached.shape == (c.n_layers, 1, c.n_kv_heads, slots, c.head_dim)
            assert cached.is_contiguous() and cached.dtype == torch.float32
        scratch = torch.empty(self.compiled.scratch_size(self.model, slots, threads), dtype=torch.float32)
        logits = torch.empty(1, c.vocab_size, dtype=torch.float32)
        self.compiled.decode_token(self.model, self.layers, token, position, keys.data_ptr(), values.data_ptr(), slots,
                                   logits.data_ptr(), scratch.data_ptr(), threads)
        return logits
