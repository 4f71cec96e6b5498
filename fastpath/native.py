"""decode.c and kernels.c compiled on their first use, to be called through ctypes by decoder.py and kernels.py.

No step of the build is the user's: where a C compiler is found (`$CC`, cc, gcc or clang) it takes a second, once for
each machine; where there is none, all goes on in torch's own operations.
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

FOLDER = Path(__file__).parent
SOURCES = ("decode.c", "kernels.c")
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-Wno-psabi", "-shared", "-fPIC"]


def cpu_flags() -> set[str]:
    """Instruction-set flags of the CPU, as far as the system tells (Linux)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("flags", "Features")):  # x86, ARM
                return set(line.split(":", 1)[1].split())
    return set()


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """What was compiled, or None; and in words by what, or why not."""
    if os.name == "nt":
        return None, "no C is compiled on Windows"
    commands = [shlex.split(os.environ.get("CC", "")), ["cc"], ["gcc"], ["clang"]]
    commands = [command for command in commands if command and shutil.which(command[0])]
    trouble = [] if commands else ["no C compiler was found (cc, gcc, clang or $CC)"]
    # compiled for one kind of CPU, the file may lie where another one reads it
    key = [*((FOLDER / name).read_bytes().hex() for name in ("simd.h", *SOURCES)), *FLAGS, platform.system(),
           platform.machine(), *sorted(cpu_flags())]
    for command in commands:
        name = f"native-{hashlib.sha256(' '.join([*key, *command]).encode()).hexdigest()[:16]}.so"
        for folder in (FOLDER / "__pycache__", Path(tempfile.gettempdir()) / f"weakwater-{os.getuid()}"):
            try:
                own_folder(folder)
                if not (folder / name).exists():
                    compile_to(folder / name, command)
                loaded = ctypes.CDLL(str(folder / name))
            except (OSError, subprocess.SubprocessError) as error:
                said = (getattr(error, "stderr", None) or str(error)).strip().splitlines() or [type(error).__name__]
                trouble.append(f"{' '.join(command)}: {said[0]}")
                continue
            threads = "" if loaded.has_openmp() else ", on one thread, since it lacks OpenMP"
            return loaded, f"compiled by {' '.join(command)}{threads}"
    return None, trouble[0]


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
            sources = [str(FOLDER / name) for name in SOURCES]
            done = subprocess.run([*command, *FLAGS, *openmp, *sources, "-o", str(made), "-lm"], timeout=60,
                                  capture_output=True, encoding="utf-8", errors="replace")
            if done.returncode == 0:
                break
        done.check_returncode()
        os.replace(made, path)
