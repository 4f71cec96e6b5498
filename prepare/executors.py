"""Who runs the tasks of a phase: this machine (local), Ray, or Slurm. Each returns once all tasks are done.

On several machines all paths, that of the repository included, must lead to the same files everywhere.
"""

import contextlib
import os
import pickle
import platform
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, deque
from copy import deepcopy
from pathlib import Path

import multiprocess
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep

from common.files import write_whole
from Config import UserError

NOWHERE = open(os.devnull, "w")  # noqa: SIM115  for the life of the process: loguru keeps it
REPOSITORY = Path(__file__).resolve().parent.parent
WORKER_ENV = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
# options of sbatch that are not the user's to give
SET_HERE = {"array", "chdir", "dependency", "error", "export", "job-name", "nodes", "ntasks", "output", "parsable",
            "wait", "wrap"}


def check(kind: str, slurm: list[str]) -> dict[str, str]:
    """KEY=VALUE… of --slurm as options of sbatch: {"partition": "cpu"}; KEY alone is an option without a value.

    Raises UserError where one is none, and where the executor ("local", "ray" or "slurm") lacks what it needs here."""
    if kind == "ray":
        try:
            import ray  # noqa: F401
        except ImportError:
            raise UserError('--executor ray needs the package ray: pip install "ray>=2.50"') from None
    elif kind == "slurm":
        for program in ("sbatch", "squeue", "scancel"):
            if not shutil.which(program):
                raise UserError(f"--executor slurm: there is no {program} here: start it where jobs are submitted")
    options = {}
    for pair in slurm:
        name, _, value = pair.partition("=")
        name = name.removeprefix("--").replace("_", "-")
        if not re.fullmatch(r"[a-z][a-z0-9-]+", name) or "\n" in value:
            raise UserError(f"--slurm {pair}: each is KEY=VALUE, a long option of sbatch, as in time=4:00:00")
        if name in SET_HERE:
            raise UserError(f"--slurm {pair}: {name} is set by prepare_data.py")
        if name in options:
            raise UserError(f"--slurm {pair}: {name} is given twice")
        options[name] = value
    return options


def run_tasks(kind: str, pipeline: list[PipelineStep], tasks: int, workers: int, log: Path,
              slurm: dict[str, str] | None = None) -> None:
    """Run what is not done of the tasks, `workers` at a time, with datatrove's notes in the folder `log`. Raises what a
    task raises, and UserError where tasks were killed; but "local" waits without end for a worker that was killed."""
    log = log.absolute()  # fsspec keeps what a relative path once was
    if kind == "local":
        LocalExecutor(pipeline, tasks=tasks, workers=min(workers, tasks), logging_dir=str(log)).run()
    elif kind == "ray":
        RayExecutor(pipeline, tasks=tasks, workers=workers, logging_dir=str(log)).run()
    else:
        SlurmExecutor(pipeline, tasks, workers, log, slurm or {}).submit_and_wait()


@contextlib.contextmanager
def stderr_to(stream):
    """Send to a file what C++ and child processes, too, write to stderr."""
    sys.stderr.flush()
    saved = os.dup(2)
    os.dup2(stream.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(saved)


class LocalExecutor(LocalPipelineExecutor):
    """datatrove's local executor, whose workers write to their log files alone and leave Ctrl-C to the main process."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1):
        if multiprocess.parent_process() is not None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        with contextlib.redirect_stderr(NOWHERE):
            return super()._run_for_rank(rank, local_rank, node_rank)


# ---------------------------------------------------------------------------------------------
# Ray

KILLED_MOST = 3  # times that a task is begun again after its process was killed
OBJECT_STORE_BYTES = 100_000_000  # tasks exchange files, not objects
RAY_END_SECONDS, CONNECT_SECONDS = 10, 5


def connect_ray(workers: int) -> None:
    """Connect to the Ray cluster of RAY_ADDRESS, else start Ray on this machine, with `workers` processes. Raises
    UserError where there is no cluster."""
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's new default; the old one prints a warning
    address = os.environ.get("RAY_ADDRESS")
    where = {"address": address} if address else {
        "address": "local", "num_cpus": workers, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    python_path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if address and "//" not in address and ":" in address:  # Ray itself would try for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        with stderr_to(NOWHERE):
            ray.init(**where, runtime_env={"env_vars": WORKER_ENV | {"PYTHONPATH": python_path}}, log_to_driver=False,
                     logging_level="error")
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        said = str(error).strip().splitlines()[0]
        raise UserError(f"RAY_ADDRESS={address}: {said}; ray start must have RAY_AUTH_MODE as it is set here" if address
                        else f"--executor ray: Ray does not start: {said}") from None
    except SystemExit:  # by Ray's handler of SIGTERM, with a code of its own
        raise SystemExit(128 + signal.SIGTERM) from None
    finally:
        signal.signal(signal.SIGTERM, handler)


class RayExecutor(RayPipelineExecutor):
    """datatrove's Ray executor with a loop of its own. datatrove's waits without end for a task whose process was
    killed, and does not raise what tasks raise; this one begins a killed task again, and raises the first error."""

    def __init__(self, pipeline: list[PipelineStep], tasks: int, workers: int, logging_dir: str):
        with contextlib.redirect_stderr(NOWHERE):
            super().__init__(pipeline, tasks=tasks, workers=workers, logging_dir=logging_dir, mem_per_cpu_gb=0)
        self.phase, self.cwd = Path(logging_dir).name, os.getcwd()

    def run(self) -> None:
        """Run what is not done. Raises what a task raises, and UserError where one is killed again and again."""
        import ray
        from ray.exceptions import NodeDiedError, OutOfMemoryError, RayTaskError, WorkerCrashedError

        waiting, running, killed = deque(self.get_incomplete_ranks()), {}, Counter()
        connect_ray(self.workers)
        self.save_executor_as_json()
        # Ray replaces the exit code of a handler that is called while it waits: the handler is called in the loop
        signals, handler = [], signal.getsignal(signal.SIGTERM)
        if callable(handler):
            signal.signal(signal.SIGTERM, lambda *signaled: signals.append(signaled))
        try:
            executor, run_rank = ray.put(self), ray.remote(num_cpus=1, max_retries=0)(_run_rank)
            while waiting or running:
                if signals:
                    handler(*signals[0])
                while waiting and len(running) < self.workers:
                    rank = waiting.popleft()
                    running[run_rank.remote(executor, rank)] = rank
                ended, _ = ray.wait([*running], timeout=0.5)
                for task in ended:
                    rank = running.pop(task)
                    try:
                        ray.get(task)
                    except RayTaskError as error:
                        raise error.cause from error
                    except (WorkerCrashedError, OutOfMemoryError, NodeDiedError):
                        killed[rank] += 1
                        if killed[rank] > KILLED_MOST:
                            raise UserError(
                                f"a task was killed {killed[rank]} times in the phase {self.phase}: too little memory? "
                                "Go on with --resume and fewer --workers") from None
                        waiting.append(rank)
        finally:
            signal.signal(signal.SIGTERM, handler)
            for task in running:
                ray.cancel(task, force=True)
            if running:
                ray.wait([*running], num_returns=len(running), timeout=RAY_END_SECONDS)

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1):
        with contextlib.redirect_stderr(NOWHERE):
            # not datatrove's for Ray, which logs to a folder in /tmp that all runs and users share
            return PipelineExecutor._run_for_rank(self, rank, local_rank, node_rank)


def _run_rank(executor: RayExecutor, rank: int) -> None:
    """Run one task, in a process of Ray. Raises UserError on a machine that lacks the main process's folder."""
    try:
        os.chdir(executor.cwd)
    except OSError as error:
        raise UserError(f"{platform.node()}: {error}; all machines need the same folders under the same names") from (
            None)
    executor._run_for_rank(rank)


# ---------------------------------------------------------------------------------------------
# Slurm

POLL_SECONDS = 1.0  # between looks at the files of the tasks
QUEUE_SECONDS = 5.0  # between calls of squeue
GONE_SECONDS = 60.0  # without jobs in the queue, until tasks that are not done are given up: shared folders lag behind
END_SECONDS = 10.0  # for jobs to end by themselves that have done all their tasks
JOBS_A_WORKER = 4  # a phase of many tasks has this many jobs for each that runs at a time
NAME_FILE = "job_name"  # in a phase's folder while its jobs may be in the queue


class SlurmExecutor(SlurmPipelineExecutor):
    """datatrove's Slurm executor, which submits the jobs of one phase and waits for them.

    `options`: long options of sbatch. All jobs of a phase have one name, that no other job has: by it they are found in
    the queue and canceled.
    """

    def __init__(self, pipeline: list[PipelineStep], tasks: int, workers: int, log: Path, options: dict[str, str]):
        left = tasks - len(list((log / "completions").glob("*")))
        super().__init__(
            pipeline, tasks, time=None, partition=None, qos=None, workers=workers, logging_dir=str(log),
            job_name=f"prepare-{log.name}-{secrets.token_hex(4)}", mem_per_cpu_gb=2, sbatch_args=dict(options),
            tasks_per_job=max(1, -(-left // (JOBS_A_WORKER * workers))))
        self.without = {"mem-per-cpu"} if {"mem", "mem-per-gpu"} & set(options) else set()  # sbatch takes one of them
        self.phase, self.folder, self.cwd = log.name, log, os.getcwd()

    # -- in the main process
    def submit_and_wait(self) -> None:
        """Submit what is not done, and wait. Raises what a task raises, and UserError where sbatch refuses the jobs or
        they end without all tasks done. Cancels the jobs, however it ends."""
        failed = self.folder / "failed"
        shutil.rmtree(failed, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        name_file = self.folder / NAME_FILE
        write_whole(name_file, lambda stream: stream.write(self.job_name.encode()))
        with _jobs_end(name_file):
            self._submit()
            queued, reason, seen = True, "", time.monotonic()
            asked = seen
            while (left := len(self.get_incomplete_ranks())):
                time.sleep(POLL_SECONDS)
                for note in sorted(failed.glob("*.pickle")):
                    raise unpickled(note.read_bytes())
                now = time.monotonic()
                if now - asked >= QUEUE_SECONDS:
                    asked, states = now, _queue(self.job_name)
                    queued = states is None or bool(states)
                    before, reason = reason, _waits_for(states)
                    if reason and reason != before:
                        print(f"{self.phase}: jobs wait in Slurm's queue ({reason})", flush=True)
                if queued:
                    seen = now
                elif now - seen >= GONE_SECONDS:
                    raise UserError(
                        f"the jobs of the phase {self.phase} ended with {left:,} of {self.tasks:,} tasks not done "
                        f"(memory, time limit?): see {self.slurm_logs_folder}, and go on with --resume")

    def _submit(self) -> None:
        with tempfile.TemporaryFile() as errors:
            try:
                with stderr_to(errors):  # datatrove leaves sbatch's on the terminal
                    self.launch_job()
            except subprocess.CalledProcessError:
                errors.seek(0)
                said = " ".join(errors.read().decode("utf-8", "replace").split())
                raise UserError(f"sbatch refused the jobs of the phase {self.phase}: {said}; see --slurm") from None

    def launch_merge_stats(self) -> None:
        """Nothing: datatrove would submit one more job."""

    def get_sbatch_args(self, max_array: int = 1) -> dict:
        """The options of sbatch; what is None is left to the cluster's defaults."""
        args = {name: value for name, value in super().get_sbatch_args(max_array).items()
                if value is not None and name not in self.without}
        log = str(self.folder / "slurm_logs").replace("%", "%%") + "/%A_%a.out"
        return {name: _quoted(value) for name, value in (args | {"output": log, "error": log}).items()}

    def get_launch_file_contents(self, sbatch_args: dict, run_script: str) -> str:
        """The job file; in the place of datatrove's `run_script` one whose paths may contain spaces."""
        python_path = shlex.quote(str(REPOSITORY)) + "${PYTHONPATH:+:$PYTHONPATH}"
        self.env_command = "export " + " ".join(f"{name}={value}" for name, value in (
            WORKER_ENV | {"PYTHONPATH": python_path}).items())
        command = [sys.executable, "-m", "datatrove.tools.launch_pickled_pipeline",
                   self.logging_dir.resolve_paths("executor.pik")]
        return super().get_launch_file_contents(sbatch_args, f"srun -l -n 1 {shlex.join(command)}")

    # -- in a job
    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1):
        try:
            os.chdir(self.cwd)
            # each task with a pipeline of its own, whose steps have counted nothing: a job may run several
            return SlurmPipelineExecutor._run_for_rank(deepcopy(self), rank, local_rank, node_rank)
        except Exception as error:
            note = pickled(error)
            write_whole(self.folder / "failed" / f"{rank:06d}.pickle", lambda stream: stream.write(note))
            raise


def cancel_left_jobs(work: Path) -> None:
    """Cancel the jobs that a killed run left in the queue, and wait until they are gone. Raises UserError where that
    cannot be done."""
    for file in sorted((work / "phases").glob(f"*/{NAME_FILE}")):
        if shutil.which("scancel") and shutil.which("squeue"):
            _cancel(file)
        if file.exists():
            raise UserError("jobs of the run that stopped may still be in Slurm's queue: run scancel "
                            f"--name={file.read_text()}, and remove {file} once squeue does not list them")


@contextlib.contextmanager
def _jobs_end(file: Path):
    """Cancels the jobs whose name is in the file, if what is done here fails; else they have some time to end."""
    try:
        yield
        end = time.monotonic() + END_SECONDS
        while _queue(file.read_text()) and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
    finally:
        _cancel(file)


def _cancel(file: Path) -> None:
    """Cancel the jobs whose name is in the file, and remove it once they are gone from the queue."""
    name, end = file.read_text(), time.monotonic() + GONE_SECONDS
    if _queue(name) != []:
        subprocess.run(["scancel", f"--name={name}"], capture_output=True)
    while (states := _queue(name)) and time.monotonic() < end:
        time.sleep(POLL_SECONDS)
    if states == []:
        file.unlink()


def _queue(name: str) -> list[tuple[str, str]] | None:
    """(state, reason) of the jobs of this name in the queue; None if squeue does not answer."""
    asked = subprocess.run(["squeue", "--noheader", f"--name={name}", "--format=%T|%r"], capture_output=True, text=True)
    if asked.returncode:
        return None
    return [tuple(line.strip().split("|", 1)) for line in asked.stdout.splitlines() if line.strip()]


def _waits_for(states: list[tuple[str, str]] | None) -> str:
    """The reasons why all jobs wait, "" if one runs or will at once."""
    if not states or any(state != "PENDING" for state, _ in states):
        return ""
    return ", ".join(sorted({reason for _, reason in states} - {"None", "JobArrayTaskLimit"}))


def _quoted(value) -> str:
    """A value as sbatch reads it on a line of a job file."""
    return re.sub(r'(["\\])', r"\\\1", str(value)).join('""') if re.search(r"[\s\"'\\#]", str(value)) else str(value)


def pickled(error: Exception) -> bytes:
    """An error and its traceback as bytes; a RuntimeError where the error would not be read again."""
    trace = "".join(traceback.format_exception(error))
    try:
        pickle.loads(note := pickle.dumps((error, trace)))
        return note
    except Exception:  # one whose arguments are not those of its class
        return pickle.dumps((RuntimeError(str(error)), trace))


def unpickled(note: bytes) -> Exception:
    """The opposite of `pickled`: the error, with the traceback as a note."""
    error, trace = pickle.loads(note)
    error.add_note(trace)
    return error
