"""Faults on purpose: run a stage's `main`, and kill it, stop it or fill its disk at a chosen moment.

    faults.run("pretrain", argv, fault={"at": "after rename checkpoint", "nth": 2})

Importing torch takes seconds, so one helper process imports everything once, and every run is a fork of it: the
same code as `python pretrain.py …`, ended the same way, in a fraction of a second. Production code knows nothing of
this: a moment is noted by standing in the way of os.fsync, os.replace, os.rename and os.unlink, or by counting
the lines of our own code as Python executes them.

A moment is named "<before|after> <sync|rename|remove> <what>", and "<nothing|half> written <what>" for a file that
is about to be synced but is cut back to 0 or to half its bytes at that moment, as if the write had only come so
far. What: "checkpoint", "weights", "best", "metrics", "chart", the files of the token cache ("cache tokens.bin", …),
"cache" for their folder, and "folder of …" for the folder's own sync after a rename. "line" is the nth line of the
project's own code.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("pretrain", "SFT", "SFT_long", "distill")


# ---------------------------------------------------------------------------------------------
# in the tests: ask the helper


class Ended:
    """How a run ended: `code` (negative: killed by that signal), what it printed, and the moments it passed."""

    def __init__(self, answer: dict):
        self.code, self.out, self.err = answer["code"], answer["out"], answer["err"]
        self.moments: dict[str, int] = answer["moments"]  # name -> how often; empty where the run was killed

    @property
    def one_line(self) -> str:
        """The one line on stderr; fails where there is not exactly one."""
        lines = self.err.splitlines()
        assert len(lines) == 1, f"stderr should be one line:\n{self.err}"
        return lines[0]

    def __repr__(self):
        return f"exit {self.code}\n--- stdout\n{self.out[-3000:]}\n--- stderr\n{self.err[-3000:]}"


_helper = None


def run(stage: str, argv: list, fault: dict | None = None, **options) -> Ended:
    """Run `python <stage>.py *argv` in a fork of the helper. `start(…)` with the same arguments does not wait.

    fault       {"at": moment, "nth": 1, "do": "kill" | "term" | "int" | "enospc" | "none"}
    limit       bytes that a file may grow to (RLIMIT_FSIZE)
    env         environment variables
    charts      draw the charts (they take most of the time of a small run, so not by default)
    count_lines pass "line" moments too (by default only where the fault is one)
    """
    return start(stage, argv, fault, **options)()


def start(stage: str, argv: list, fault: dict | None = None, **options):
    """Begin a run; the function returned waits for its end."""
    global _helper
    if _helper is None or _helper.poll() is not None:
        env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg"}
        _helper = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   text=True, cwd=ROOT, env=env)
        atexit.register(_helper.kill)
    folder = tempfile.mkdtemp(prefix="weakwater-fault-")
    job = {"stage": stage, "argv": [str(a) for a in argv], "fault": fault or {}, "folder": folder} | options
    _helper.stdin.write(json.dumps(job) + "\n")
    _helper.stdin.flush()
    pid = json.loads(_helper.stdout.readline())["pid"]

    def wait() -> Ended:
        _helper.stdin.write(json.dumps({"wait": pid}) + "\n")
        _helper.stdin.flush()
        answer = {"code": json.loads(_helper.stdout.readline())["code"], "moments": {}}
        for name in ("out", "err", "moments"):
            file = Path(folder, name)
            if file.exists():
                text = file.read_text(encoding="utf-8", errors="replace")
                answer[name] = json.loads(text) if name == "moments" else text
                file.unlink()
        os.rmdir(folder)
        return Ended(answer)

    return wait


# ---------------------------------------------------------------------------------------------
# in the helper: fork, put the fault in the way, run


def serve() -> None:
    """Answer jobs on stdin, one JSON object a line, until it ends."""
    sys.path.insert(0, str(ROOT))
    import importlib

    import torch

    torch.set_num_threads(1)
    # whatever a run would import on the way
    for name in ("transformers", "tokenizers", "matplotlib.pyplot", "torch._dynamo", "common.checkpoint", *STAGES):
        importlib.import_module(name)
    from transformers import AutoTokenizer

    assert AutoTokenizer
    for request in sys.stdin:
        job = json.loads(request)
        if "wait" in job:
            _, status = os.waitpid(job["wait"], 0)
            print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            _child(job)
        print(json.dumps({"pid": pid}), flush=True)


def _child(job: dict) -> None:
    """Never returns."""
    code = 99
    try:
        for descriptor, name in ((1, "out"), (2, "err")):
            file = os.open(Path(job["folder"], name), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, descriptor)
        os.environ.update(job.get("env", {}))
        if "limit" in job:
            import resource

            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], resource.RLIM_INFINITY))
        from common import runlog, runtime

        module = sys.modules[job["stage"]]
        sys.argv = [f"{job['stage']}.py", *job["argv"]]
        if not job.get("charts"):
            runlog.RunLog.charts = lambda self: None
        moments = Moments(job["fault"], job.get("count_lines", False))
        try:
            code = runtime.run(module.main)
        finally:
            moments.end()
            if "limit" in job:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            Path(job["folder"], "moments").write_text(json.dumps(moments.passed), encoding="utf-8")
    except SystemExit as exit_:
        code = exit_.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Moments:
    """Counts the moments that a run passes, and does what the fault says at the one it names."""

    SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}

    def __init__(self, fault: dict, count_lines: bool):
        self.at, self.nth, self.do = fault.get("at"), fault.get("nth", 1), fault.get("do", "kill")
        self.passed: dict[str, int] = {}
        self.renamed: dict[str, str] = {}  # folder -> what was last renamed in it
        self.fsync, self.unlink = os.fsync, os.unlink
        os.fsync, os.unlink = self._fsync, self._remove
        os.replace, os.rename = self._around_rename(os.replace), self._around_rename(os.rename)
        self.count_lines = count_lines or self.at == "line"
        if self.count_lines:
            sys.settrace(self._trace)

    def end(self) -> None:
        sys.settrace(None)

    def passes(self, name: str, spoil=None) -> None:
        count = self.passed[name] = self.passed.get(name, 0) + 1
        if name == self.at and count == self.nth:
            if spoil is not None:
                spoil()
            if self.do == "enospc":
                raise OSError(28, "No space left on device")
            if self.do in self.SIGNALS:
                os.kill(os.getpid(), self.SIGNALS[self.do])

    def _fsync(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_dir():
            what = "folder of " + self.renamed.get(str(path), "nothing")
        else:
            what = self.what(path)
            size = os.fstat(descriptor).st_size
            self.passes(f"nothing written {what}", lambda: os.ftruncate(descriptor, 0))
            self.passes(f"half written {what}", lambda: os.ftruncate(descriptor, size // 2))
        self.passes(f"before sync {what}")
        self.fsync(descriptor)
        self.passes(f"after sync {what}")

    def _around_rename(self, rename):
        def renaming(source, target, **options):
            what = self.what(Path(target))
            self.passes(f"before rename {what}")
            rename(source, target, **options)
            self.renamed[str(Path(target).resolve().parent)] = what
            self.passes(f"after rename {what}")

        return renaming

    def _remove(self, path, **options) -> None:
        what = self.what(Path(path))
        self.passes(f"before remove {what}")
        self.unlink(path, **options)
        self.passes(f"after remove {what}")

    @staticmethod
    def what(path: Path) -> str:
        name = path.name
        if "charts_" in path.parent.name:
            return "chart"
        if path.parent.name == "log":
            return "metrics"
        if path.parent.parent.name == "checkpoints":
            return "checkpoint"
        if ".pth" in name:
            return "best" if "_best.pth" in name else "weights"
        if name.endswith((".bin", ".json")):
            return f"cache {name}"
        return "cache"

    def _trace(self, frame, event, argument):
        file = frame.f_code.co_filename
        return self._line if file.startswith(str(ROOT)) and "/tests/" not in file and ".venv" not in file else None

    def _line(self, frame, event, argument):
        if event == "line":
            self.passes("line")
        return self._line


if __name__ == "__main__":
    serve()
