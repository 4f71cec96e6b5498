"""The work folder of a run of the recipe: files that are whole or not there, counts, progress, and the phases.

A phase is a datatrove pipeline over numbered tasks. Each task writes files of its own, under names that end in its
number, and datatrove notes that it is done; a run that goes on skips it.
"""

import contextlib
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import multiprocess
import numpy as np
import zstandard
from datatrove.pipeline.base import PipelineStep
from loguru import logger

from common.files import cannot_save, process_lives, sync_folder, temporary_name, write_whole
from Config import UserError
from prepare import executors

ZSTD_LEVEL = 6
TICK_SECONDS = 1.0

# ---------------------------------------------------------------------------------------------
# files


def numbered(folder: Path, task: int, suffix: str) -> Path:
    """The file of a task in a folder."""
    return folder / f"{task:06d}{suffix}"


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file atomically. Raises UserError as write_whole."""
    def write(stream) -> None:
        np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(array))
        stream.write(array.tobytes())  # np.save does not say why it could not write

    write_whole(path, write)


def save_json(path: Path, value) -> None:
    """Write a JSON file atomically. Raises UserError as write_whole."""
    write_whole(path, lambda stream: stream.write(json.dumps(value, ensure_ascii=False, indent=1).encode(
        "utf-8", "backslashreplace")))


def load_json(path: Path):
    """The value in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


class LineWriter:
    """JSON lines of one file, compressed by zstd where its name ends in .zst, written under a temporary name until
    `close`. No file is created if nothing was written. Raises UserError when a line cannot be written.

    records, raw_bytes: what was written.
    """

    def __init__(self, path: Path):
        self.path, self.records, self.raw_bytes = path, 0, 0
        self._temporary, self._file, self._stream = temporary_name(path), None, None

    def write(self, record: dict) -> int:
        """Write a record; the number of bytes of its line."""
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        try:
            if self._stream is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self._temporary, "wb")  # noqa: SIM115
                packed = self.path.suffix == ".zst"
                self._stream = zstandard.ZstdCompressor(ZSTD_LEVEL).stream_writer(self._file, closefd=False) if (
                    packed) else self._file
            self._stream.write(line)
        except OSError as error:
            raise cannot_save(self.path, error) from None
        self.records += 1
        self.raw_bytes += len(line)
        return len(line)

    def close(self) -> None:
        """Give the file its name, if anything was written."""
        if self._stream is None:
            return
        try:
            if self._stream is not self._file:
                self._stream.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            raise cannot_save(self.path, error) from None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is None:
            self.close()
        elif self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
                self._temporary.unlink()


class Writers:
    """The writers of one task: what it writes to FOLDER/NAME/TASK.jsonl.zst, by folder and name. `end`: of the names,
    for the second phase of two that write to the same folders."""

    def __init__(self, work: Path, task: int, end: str = ""):
        self.work, self.task, self.end, self.opened = work, task, end, {}

    def of(self, folder: str, name: str, part: str = "") -> LineWriter:
        """The writer of FOLDER/NAME/{part}TASK.jsonl.zst, the same each time."""
        if (folder, name, part) not in self.opened:
            path = numbered(self.work / folder / name, self.task, f"{self.end}.jsonl.zst")
            self.opened[folder, name, part] = LineWriter(path.with_name(part + path.name))
        return self.opened[folder, name, part]

    def close(self) -> None:
        """Give all files their names."""
        for writer in self.opened.values():
            writer.close()


# ---------------------------------------------------------------------------------------------
# counts


class Tally:
    """What the steps did to the records of one task.

    Of each step: `in`, `changed` and `dropped` by kind ("text", "chat"), dropped ones by `reasons` and by `by_source`,
    and `counts` of what it changed.
    """

    FIELDS = ("in", "changed", "dropped", "reasons", "by_source", "counts")

    def __init__(self):
        self.steps: dict[str, dict[str, Counter]] = {}

    def of(self, step: str) -> dict[str, Counter]:
        """The counters of a step."""
        return self.steps.setdefault(step, {field: Counter() for field in self.FIELDS})

    def add(self, steps: dict[str, dict[str, dict[str, int]]]) -> None:
        """Add the counts that another tally saved."""
        for step, fields in steps.items():
            for field, counts in fields.items():
                self.of(step)[field].update(counts)


# ---------------------------------------------------------------------------------------------
# phases


class WorkStep(PipelineStep):
    """A step of a phase: datatrove's, with the work folder, a name in its log, and progress.

    main_process: the number of the main process, None where the step runs on another machine than it.
    """

    type = "recipe"

    def __init__(self, folder: Path, name: str):
        super().__init__()
        self.folder, self.name = folder, name
        self.main_process: int | None = os.getpid()
        self._ticked = 0.0

    def tick(self, task: int, share: float) -> None:
        """Note which share of a task is done; ends the process if that which started the run has ended."""
        now = time.monotonic()
        if now - self._ticked < TICK_SECONDS:
            return
        self._ticked = now
        if self.main_process is not None and not process_lives(self.main_process):
            os._exit(1)  # all that is whole has its name already
        with contextlib.suppress(OSError):
            numbered(self.folder / "progress", task, ".txt").write_text(f"{share:.4f}")


class Phases:
    """Runs the phases of one work folder, each once, with progress lines.

    `weights` of a phase: how long it takes beside the others, to estimate what is left. `executor`: "local", "ray" or
    "slurm"; `slurm`: options of sbatch. Raises UserError where jobs of a killed run cannot be canceled.
    """

    def __init__(self, folder: Path, workers: int, weights: dict[str, float], say: Callable[[str], None] = print,
                 executor: str = "local", slurm: dict[str, str] | None = None):
        executors.cancel_left_jobs(folder)
        self.folder, self.workers, self.weights, self.say = folder, workers, weights, say
        self.executor, self.slurm = executor, slurm or {}
        self.begin, self.skipped, self.done = time.monotonic(), 0.0, 0.0
        # what the process imports that workers are forked from; else each worker of each phase would
        multiprocess.set_forkserver_preload(["prepare.worker"])

    def run(self, name: str, tasks: int, pipeline: list[PipelineStep]) -> None:
        """Run what is not done of a phase. Raises what a task raises, and UserError when a worker was killed."""
        log = self.folder / "phases" / name
        before = len(list((log / "completions").glob("*"))) if log.exists() else 0
        if tasks and before < tasks:
            progress = self.folder / "progress"
            progress.mkdir(parents=True, exist_ok=True)
            for file in progress.glob("*.txt"):
                file.unlink()
            if self.executor != "local":
                for step in pipeline:
                    step.main_process = None
            logger.remove()
            with _Watch(self, name, tasks, log):
                executors.run_tasks(self.executor, pipeline, tasks, self.workers, log, self.slurm)
        self.skipped += self.weights[name] * before / max(1, tasks)
        self.done += self.weights[name]

    def show(self, name: str, share: float) -> None:
        """Print how far the run is."""
        seconds = time.monotonic() - self.begin
        done = self.done + self.weights[name] * share
        computed, total = done - self.skipped, sum(self.weights.values())
        left = f", about {_minutes(seconds / computed * (total - done))} left" if computed > 0.02 * total else ""
        self.say(f"{name}: {share:4.0%}, {done / total:.0%} of all, {_minutes(seconds)}{left}")


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


class _Watch:
    """Beside a phase: prints its progress every few seconds, and stops it when a local worker was killed, for which
    datatrove would wait without end. The process must end on SIGTERM by SystemExit."""

    EVERY = 5.0

    def __init__(self, phases: Phases, name: str, tasks: int, log: Path):
        self.phases, self.name, self.tasks, self.log = phases, name, tasks, log
        self.workers = min(phases.workers, tasks)
        self.ended, self.killed = threading.Event(), False
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.ended.set()
        with contextlib.suppress(SystemExit):  # the watcher's signal may come only now
            self.thread.join()
        if self.killed:
            raise UserError(f"a worker was killed in the phase {self.name}: too little memory? Go on with --resume and "
                            "fewer --workers") from None

    def _watch(self) -> None:
        shown = time.monotonic()
        while not self.ended.wait(0.5):
            # children are numbered as they begin: datatrove's manager, the workers, one in the place of each that died
            numbers = {"ForkServerPoolWorker": 0, "SyncManager": 0}
            for child in multiprocess.active_children():
                kind, _, number = child.name.rpartition("-")
                numbers[kind] = max(numbers.get(kind, 0), int(number))
            began = numbers["ForkServerPoolWorker"] - numbers["SyncManager"]
            if numbers["SyncManager"] and began > self.workers and not self.ended.is_set():
                self.killed = True
                os.kill(os.getpid(), signal.SIGTERM)  # the main thread waits in datatrove; SIGINT may be ignored
                return
            if time.monotonic() - shown >= self.EVERY:
                shown = time.monotonic()
                self.phases.show(self.name, self._share())

    def _share(self) -> float:
        done = len(list((self.log / "completions").glob("*")))
        running = 0.0
        for file in (self.phases.folder / "progress").glob("*.txt"):
            if not (self.log / "completions" / f"{int(file.stem):05d}").exists():
                with contextlib.suppress(OSError, ValueError):
                    running += float(file.read_text())
        return min(1.0, (done + running) / self.tasks)
