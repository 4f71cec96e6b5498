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
project's own code but for the network's, which computes and writes nothing.
"""

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PID = os.getpid
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
    """Run `python <stage>.py *argv` in a fork of the helper. `start(…)` with the same arguments does not wait. Another
    script is named by its path; of the options it takes only stdout and encoding.

    fault       {"at": moment, "nth": 1, "do": "kill" | "term" | "int" | "enospc" | "none"}
    limit       bytes that a file may grow to (RLIMIT_FSIZE)
    env         environment variables
    stdout      a file for the standard output, or "closed", a pipe that nobody reads; a stage then ends as a real
                Python does
    encoding    that of stdout and stderr when the script starts
    pid         the process number that the run believes to have
    due         steps at which this process's clock says that the state is to be saved
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
# in the tests: a course of all four stages, small enough to be run a hundred times


# Between them the stages cover text and chat, bf16 and fp16, AdamW and Muon, and each of these pairs; all of them
# two epochs, accumulation and dropout. A step has about 100 tokens.
COMMON = dict(device="cpu", epochs=2, accumulation_steps=2, dropout=0.1, learning_rate=3e-3, warmup_ratio=0.2,
              log_interval=1, eval_interval=3, save_interval=2, keep_checkpoints=2)
CHAT = dict(min_tokens=0, max_seq_len=96, batch_size=1)
SETTINGS = {
    "pretrain": dict(preset="nano", max_seq_len=16, batch_size=2, dtype="bf16", optimizer="adamw"),
    "SFT": dict(CHAT, dtype="fp16", optimizer="muon"),
    "SFT_long": dict(CHAT, dtype="fp16", optimizer="adamw", lr_schedule="trapezoid"),
    "distill": dict(CHAT, dtype="bf16", optimizer="muon", tag_weight=5, think_weight=0.5),
}
WORDS_OF_TIME = ("tokens_per_second", "minutes_left")


class Course:
    """A folder with a tiny corpus, and for each stage a run that nothing disturbed."""

    def __init__(self, folder: Path, tokenizer_dir: Path):
        from conftest import make_chats, make_r1, make_texts, write_jsonl

        self.folder, self.tokenizer_dir, self.references = folder, tokenizer_dir, {}
        self.data = {"pretrain": write_jsonl(folder / "text.jsonl", make_texts(1, 9, longest=40)),
                     "SFT": write_jsonl(folder / "chat.jsonl", make_chats(2, 12, longest=40, reply=20)),
                     "distill": write_jsonl(folder / "r1.jsonl", make_r1(4, 12, thought=1))}
        self.data["SFT_long"] = self.data["SFT"]
        self.undisturbed = folder / "undisturbed"  # out_dir of the undisturbed runs of all stages

    def argv(self, stage: str, out: Path, resume: bool = False, **changes) -> list[str]:
        """The stage's command line; a flag changed to None is left out, one changed to True is bare, a list is several
        values."""
        flags = dict(data_path=self.data[stage], tokenizer_path=self.tokenizer_dir, out_dir=out,
                     cache_dir=self.folder / "cache") | COMMON | SETTINGS[stage]
        if stage != "pretrain":
            flags["init_from"] = self.undisturbed / f"{STAGES[STAGES.index(stage) - 1]}.pth"
        flags |= changes | ({"resume": True} if resume else {})
        words = [[f"--{name}"] + ([] if value is True else value if isinstance(value, list) else [value])
                 for name, value in flags.items() if value is not None]
        return [str(word) for flag in words for word in flag]

    def run(self, stage: str, out: Path, resume: bool = True, fault: dict | None = None, flags: dict | None = None,
            **options) -> Ended:
        """Run a stage in `out`."""
        return run(stage, self.argv(stage, out, resume, **(flags or {})), fault, **options)

    def reference(self, stage: str) -> "Reference":
        """The undisturbed run of a stage, made once (after those before it)."""
        if stage not in self.references:
            for earlier in STAGES[:STAGES.index(stage)]:
                self.reference(earlier)
            cache = dict(cache_dir=self.folder / f"cache of the undisturbed {stage}")  # made anew, whatever ran before
            ended = self.run(stage, self.undisturbed, resume=False, count_lines=True, flags=cache)
            assert ended.code == 0, ended
            self.references[stage] = Reference(stage, ended, self.undisturbed)
        return self.references[stage]


class Reference:
    """What an undisturbed run passed and left."""

    def __init__(self, stage: str, ended: Ended, out: Path):
        self.stage, self.moments, self.out = stage, ended.moments, ended.out
        self.end = end_of(stage, out)

    def rows_of(self, epoch: int) -> list[dict]:
        """The metrics of one epoch."""
        return [row for row in self.end["metrics"] if row["epoch"] == epoch]

    def assert_same(self, out: Path) -> None:
        """Every number that the run in `out` left is bit for bit that of the undisturbed run."""
        end = end_of(self.stage, out)
        for row, expected in zip(end["metrics"], self.end["metrics"], strict=False):
            assert row == expected
        for name, expected in self.end.items():
            assert end[name] == expected, f"{self.stage}: {name} differs from the run that was never disturbed"


_courses = {}


def course(tmp_path_factory, tokenizer_dir: Path) -> Course:
    """The course with a tokenizer, shared by all test files of a session."""
    if not sys.platform.startswith("linux"):
        import pytest

        pytest.skip("faults need Linux: fork, /proc")
    if tokenizer_dir not in _courses:
        _courses[tokenizer_dir] = Course(tmp_path_factory.mktemp("course"), tokenizer_dir)
    return _courses[tokenizer_dir]


def metrics(stage: str, out: Path) -> list[dict]:
    """The rows of log/<stage>.jsonl without what depends on the clock; fails on a line that is not JSON."""
    lines = (Path(out) / "log" / f"{stage}.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in WORDS_OF_TIME} for line in lines]


def end_of(stage: str, out: Path) -> dict:
    """All that a finished run leaves, in a form in which == compares bits."""
    import torch

    out = Path(out)
    newest = max((out / "checkpoints" / stage).glob("step_*.pth"))
    end = {"metrics": metrics(stage, out), "newest checkpoint": newest.name}
    for name, file in (("weights", out / f"{stage}.pth"), ("best", out / f"{stage}_best.pth"), ("state", newest)):
        content = torch.load(file, weights_only=True)
        content.get("meta", {}).pop("command", None)
        end |= {f"{name}: {key}": bits(value) for key, value in content.items()}
    return end


def bits(value):
    """The same structure with each tensor as (type, shape, bytes)."""
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(item) for item in value]
    if hasattr(value, "numpy"):
        return str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes()
    return value


# ---------------------------------------------------------------------------------------------
# in the helper: fork, put the fault in the way, run


def serve() -> None:
    """Answer jobs on stdin, one JSON object a line, until it ends."""
    sys.path.insert(0, str(ROOT))
    import importlib

    import torch

    torch.set_num_threads(1)
    # whatever a run would import on the way
    for name in ("tokenizers", "matplotlib.pyplot", "torch._dynamo", "common.run_state", *STAGES):
        importlib.import_module(name)
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
        if job.get("stdout") == "closed":
            reading, writing = os.pipe()
            os.close(reading)
            os.dup2(writing, 1)
        elif "stdout" in job:
            os.dup2(os.open(job["stdout"], os.O_WRONLY), 1)
        for stream in (sys.stdout, sys.stderr) if "encoding" in job else ():
            stream.reconfigure(encoding=job["encoding"], errors="strict")
        if "pid" in job:
            os.getpid = lambda: job["pid"]
        os.environ.update(job.get("env", {}))
        signal.alarm(600)  # a run that hangs ends, and its test fails
        if "limit" in job:
            import resource

            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], resource.RLIM_INFINITY))
        if job["stage"].endswith(".py"):
            os._exit(_script_code(job))
        import fastpath
        from common import continuation, exits, run_state, runlog

        continuation.NEW_TOKENS = 4  # a sample of 40 takes longer than the small run's steps

        # the check of the replacements takes as long as the run; tests/test_fastpath.py is about it
        fastpath.make_twin = lambda model, device, dtype: (Agreed(), None)
        module = sys.modules[job["stage"]]
        sys.argv = [f"{job['stage']}.py", *job["argv"]]
        if not job.get("charts"):
            runlog.RunLog.charts = lambda self: None
        if "due" in job:
            run_state.SaveSchedule.is_due = lambda self, step: step in job["due"]
        moments = Moments(job["fault"], job.get("count_lines", False))
        try:
            code = exits.run(module.main)
        finally:
            moments.end()
            if "limit" in job:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            Path(job["folder"], "moments").write_text(json.dumps(moments.passed), encoding="utf-8")
        if "stdout" in job:
            sys.stdin = None  # what the helper has not read yet is not this process's
            sys.exit(code)
    except SystemExit as exit_:
        code = exit_.code
        if "stdout" in job:
            raise
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _script_code(job: dict) -> int:
    """Run a script as Python does, and end as Python does, without the second that freeing all of torch takes."""
    sys.argv, sys.stdin, code = [job["stage"], *job["argv"]], None, 0  # stdin is the helper's
    try:
        runpy.run_path(str(ROOT / job["stage"]), run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = 120
    return code


class Agreed:
    """In the place of fastpath.twin.Twin: all agrees."""

    def __init__(self):
        self.mismatch = self.mismatch_with_cache = self.mismatch_of_decoder = lambda change, *more: None


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
                os.kill(PID(), self.SIGNALS[self.do])

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
        if "contents.json" in name:
            return "hashes of the data"
        if name.endswith((".bin", ".json")):
            return f"cache {name}"
        return "cache"

    def _trace(self, frame, event, argument):
        file = frame.f_code.co_filename
        ours = file.startswith(str(ROOT)) and "/tests/" not in file and ".venv" not in file
        return self._line if ours and "/fastpath/" not in file and not file.endswith("/model.py") else None

    def _line(self, frame, event, argument):
        if event == "line":
            self.passes("line")
        return self._line


if __name__ == "__main__":
    serve()
