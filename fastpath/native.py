"""Compiles decode.c, sampling.c and kernels.c on first use, for native_decoder.py, sampling.py and kernels.py to call
through ctypes.

No build step is needed. With a C compiler (`$CC`, cc, gcc or clang) compilation takes about a second, once per
machine. Without one, torch's operations are used.
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
from pathlib import Path

from common.files import rename

FOLDER = Path(__file__).parent
SOURCES = ("decode.c", "sampling.c", "kernels.c")
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-Wno-psabi", "-shared", "-fPIC"]


def cpu_flags() -> set[str]:
    """Instruction-set flags of the CPU; empty where the system does not list them (only Linux does)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("flags", "Features")):  # x86, ARM
                return set(line.split(":", 1)[1].split())
    return set()


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """(the compiled library, which compiler made it), or (None, why there is none)."""
    if os.name == "nt":
        return None, "C is not compiled on Windows"
    commands = [shlex.split(os.environ.get("CC", "")), ["cc"], ["gcc"], ["clang"]]
    commands = [command for command in commands if command and shutil.which(command[0])]
    reasons = [] if commands else ["no C compiler was found (cc, gcc, clang or $CC)"]
    # the file is for one kind of CPU, but another machine may share the folder: the name depends on the CPU
    key = [*((FOLDER / name).read_bytes().hex() for name in ("simd.h", *SOURCES)), *FLAGS, platform.system(),
           platform.machine(), *sorted(cpu_flags())]
    for command in commands:
        name = f"native-{hashlib.sha256(' '.join([*key, *command]).encode()).hexdigest()[:16]}.so"
        for folder in (FOLDER / "__pycache__", Path(tempfile.gettempdir()) / f"weakwater-{os.getuid()}"):
            try:
                require_private(folder)
                if not (folder / name).exists():
                    compile_to(folder / name, command)
                loaded = ctypes.CDLL(str(folder / name))
            except (OSError, subprocess.SubprocessError) as error:
                message = (getattr(error, "stderr", None) or str(error)).strip().splitlines() or [type(error).__name__]
                reasons.append(f"{' '.join(command)}: {message[0]}")
                continue
            threads = "" if loaded.has_openmp() else ", on one thread, since it lacks OpenMP"
            return loaded, f"compiled by {' '.join(command)}{threads}"
    return None, reasons[0]


def require_private(folder: Path) -> None:
    """Make the folder if it does not exist. Raises PermissionError if another user could write there, since
    its files are loaded and run."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o755)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} is not a folder that only this user can write to")


def compile_to(path: Path, command: list[str]) -> None:
    """Compile to `path` atomically, without OpenMP if the compiler does not support it (Apple's does not)."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        for openmp in (["-fopenmp"], []):
            sources = [str(FOLDER / name) for name in SOURCES]
            done = subprocess.run([*command, *FLAGS, *openmp, *sources, "-o", str(made), "-lm"], timeout=60,
                                  capture_output=True, encoding="utf-8", errors="replace")
            if done.returncode == 0:
                break
        done.check_returncode()
        rename(made, path)
