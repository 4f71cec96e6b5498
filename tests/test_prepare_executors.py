"""The tasks of the recipe on this machine, on Ray and on Slurm: the same bytes, errors, killed processes.

Ray runs for real, on this machine. Slurm's programs are those of slurm_stub.py, which check the job files and run them.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest
import slurm_stub
from conftest import ROOT, make_chats, make_texts, write_jsonl

pytest.importorskip("datatrove")
from test_prepare_data import contents, run, start  # noqa: E402

import prepare_data  # noqa: E402
from Config import UserError  # noqa: E402
from prepare import executors  # noqa: E402
from prepare.work import Phases, WorkStep  # noqa: E402

pytestmark = [pytest.mark.extra, pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")]
TESTS = str(ROOT / "tests")


class Steps(WorkStep):
    """A step that notes in FOLDER/ran/RANK that it ran, and of which its process has run how many."""

    def __init__(self, folder: Path):
        super().__init__(folder, "test")
        self.seen = Counter()

    def run(self, data, rank: int = 0, world_size: int = 1) -> None:
        """Appends a line to ran/RANK, then does what a test wants."""
        self.seen["tasks"] += 1
        self.tick(rank, 0.5)
        (self.folder / "ran").mkdir(exist_ok=True)
        with open(self.folder / "ran" / str(rank), "a") as file:
            file.write(f"{self.seen['tasks']} {os.getcwd()} {os.environ['OMP_NUM_THREADS']}\n")
        self.act(rank)

    def act(self, rank: int) -> None:
        """Nothing."""


class Refuses(Steps):
    """Task 1 fails by the user's mistake."""

    def act(self, rank: int) -> None:
        if rank == 1:
            raise UserError("cannot save x: the disk is full")


class Dies(Steps):
    """Task 1 is killed: `times` of the times that it runs."""

    def __init__(self, folder: Path, times: int):
        super().__init__(folder)
        self.times = times

    def act(self, rank: int) -> None:
        if rank == 1 and len((self.folder / "ran" / "1").read_text().splitlines()) <= self.times:
            os.kill(os.getpid(), signal.SIGKILL)


class Sleeps(Steps):
    """Every task takes a minute."""

    def act(self, rank: int) -> None:
        (self.folder / f"process {rank}").write_text(str(os.getpid()))
        time.sleep(60)


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """The folder of a Slurm that is none; what waits for a cluster waits less."""
    folder = tmp_path / "slurm bin"
    slurm_stub.install(folder)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name, value in {"POLL_SECONDS": 0.1, "QUEUE_SECONDS": 0.3, "GONE_SECONDS": 1.0, "JOBS_A_WORKER": 1}.items():
        monkeypatch.setattr(executors, name, value)
    return folder


@pytest.fixture(scope="module")
def ray_module():
    ray = pytest.importorskip("ray")
    yield ray
    ray.shutdown()


@pytest.fixture(params=["local", "ray", "slurm"])
def kind(request, monkeypatch) -> str:
    """Each executor, whose workers find this file."""
    monkeypatch.setenv("PYTHONPATH", TESTS)
    request.getfixturevalue({"local": "tmp_path", "ray": "ray_module", "slurm": "slurm"}[request.param])
    return request.param


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """The work folder, as a relative path, of a main process in a folder with a space and a % in its name."""
    folder = tmp_path / "ma in 100%"
    (folder / "work").mkdir(parents=True)
    monkeypatch.chdir(folder)
    return Path("work")


def ran(work: Path) -> dict[int, int]:
    """How many times each task ran."""
    return {int(file.name): len(file.read_text().splitlines()) for file in (work / "ran").glob("*")}


def run_phase(kind: str, work: Path, tasks: int, step: WorkStep, workers: int = 2, **options) -> None:
    """A phase called "test"."""
    Phases(work, workers, {"test": 1}, executor=kind, **options).run("test", tasks, [step])


# ---------------------------------------------------------------------------------------------
# tasks


def test_tasks_run_once_and_resume(kind, work):
    """Each with a step of its own, in the main process's folder, with one thread."""
    run_phase(kind, work, 5, Steps(work))
    expected = f"1 {os.getcwd()} 1\n"
    assert {file.name: file.read_text() for file in (work / "ran").glob("*")} == dict.fromkeys("01234", expected)
    (work / "phases" / "test" / "completions" / "00003").unlink()
    run_phase(kind, work, 5, Steps(work))
    assert ran(work) == {0: 1, 1: 1, 2: 1, 3: 2, 4: 1}
    run_phase(kind, work, 5, Refuses(work))
    assert sum(ran(work).values()) == 6


def test_what_a_task_raises_is_raised(kind, work):
    with pytest.raises(UserError) as raised:
        run_phase(kind, work, 3, Refuses(work))
    assert str(raised.value) == "cannot save x: the disk is full"
    assert not (work / "phases" / "test" / "completions" / "00001").exists()
    run_phase(kind, work, 3, Steps(work))
    assert ran(work)[1] == 2


class Odd(Exception):
    """An error that pickle writes, and cannot read."""

    def __init__(self, one: int, two: int):
        super().__init__(one + two)


@pytest.mark.parametrize("error", [UserError("no"), json.JSONDecodeError("no", "{", 1), Odd(1, 2)])
def test_an_error_comes_from_a_job_with_its_traceback(error):
    def fails():
        raise error

    try:
        fails()
    except Exception as caught:
        told = executors.unpickled(executors.pickled(caught))
    assert type(told) is (RuntimeError if isinstance(error, Odd) else type(error))
    assert "in fails" in "".join(traceback.format_exception(told))


def test_ray_begins_a_killed_task_again(ray_module, work, monkeypatch):
    """Some times; then it is told, and a resume goes on."""
    monkeypatch.setenv("PYTHONPATH", TESTS)
    with pytest.raises(UserError, match="killed 4 times in the phase test: .* --resume"):
        run_phase("ray", work, 3, Dies(work, 5))
    assert ran(work) == {0: 1, 1: 4, 2: 1}
    run_phase("ray", work, 3, Dies(work, 5))
    assert ran(work) == {0: 1, 1: 6, 2: 1}


def test_slurm_jobs_that_end_without_their_tasks_done_are_told(slurm, work, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", TESTS)
    with pytest.raises(UserError, match=r"ended with 1 of 2 tasks not done .*slurm_logs, and go on with --resume"):
        run_phase("slurm", work, 2, Dies(work, 1))
    run_phase("slurm", work, 2, Dies(work, 1))
    assert ran(work) == {0: 1, 1: 2}


# ---------------------------------------------------------------------------------------------
# Slurm's job files


def directives(work: Path) -> list[str]:
    """The options in the job file of the phase."""
    script = (work / "phases" / "test" / "launch_script.slurm").read_text()
    return [line for line in script.splitlines() if line.startswith("#SBATCH")]


def test_the_options_of_a_job_file(slurm, work, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", TESTS)
    run_phase("slurm", work, 3, Steps(work), workers=1, slurm={"partition": "cpu", "time": "10:00", "mem": "500M"})
    lines = directives(work)
    log = f'"{os.getcwd().replace("%", "%%")}/work/phases/test/slurm_logs/%A_%a.out"'
    name = lines.pop(next(i for i, line in enumerate(lines) if "job-name" in line))
    assert name.startswith("#SBATCH --job-name=prepare-test-")
    assert sorted(lines) == sorted(f"#SBATCH --{option}" for option in (
        "cpus-per-task=1", "nodes=1", "array=0-0%1", "requeue", "partition=cpu", "time=10:00", "mem=500M",
        f"output={log}", f"error={log}"))
    assert len(list((work / "phases" / "test" / "slurm_logs").glob("*.out"))) == 1


def test_an_option_that_sbatch_refuses_is_told(slurm, work, capfd):
    with pytest.raises(UserError, match="sbatch refused the jobs of the phase test: sbatch: error: unrecogni"):
        run_phase("slurm", work, 3, Steps(work), slurm={"partitions": "cpu"})
    assert capfd.readouterr().err == "" and not (work / "phases" / "test" / executors.NAME_FILE).exists()


def test_more_jobs_than_an_array_holds(slurm, work, monkeypatch):
    """Several arrays, one after the other."""
    monkeypatch.setenv("PYTHONPATH", TESTS)
    before = executors.SlurmExecutor.__init__

    def smaller(self, *args):
        before(self, *args)
        self.max_array_size, self.tasks_per_job = 2, 1

    monkeypatch.setattr(executors.SlurmExecutor, "__init__", smaller)
    run_phase("slurm", work, 3, Steps(work))
    assert ran(work) == dict.fromkeys(range(3), 1)
    submitted = [line for line in (slurm / "calls").read_text().splitlines() if line.startswith("sbatch")]
    assert ["--dependency" in line for line in submitted] == [False, True]


@pytest.mark.parametrize("pairs, message", [
    (["partition"], None), (["--time=5"], None), (["=x"], "each is KEY=VALUE"), (["a b=x"], "each is KEY=VALUE"),
    (["array=0-3"], "is set by prepare_data.py"), (["time=1", "time=2"], "given twice")])
def test_options_for_sbatch(slurm, pairs, message):
    if message:
        with pytest.raises(UserError, match=message):
            executors.check("slurm", pairs)
    else:
        assert executors.check("slurm", pairs) == {pairs[0].partition("=")[0].strip("-"): pairs[0].partition("=")[2]}


def test_what_is_missing_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no sbatch here"):
        executors.check("slurm", [])
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match='pip install "ray'):
        executors.check("ray", [])
    assert executors.check("local", []) == {}
    with pytest.raises(SystemExit):
        prepare_data.parse_args(["--data_path", "x", "--slurm", "time=5"])
    assert "--slurm needs --executor slurm" in capsys.readouterr().err


def test_ray_without_a_cluster_at_its_address():
    pytest.importorskip("ray")
    code = "from prepare.executors import connect_ray; connect_ray(2)"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"RAY_ADDRESS": "127.0.0.1:1"},
                           capture_output=True, text=True)
    assert "UserError: RAY_ADDRESS=127.0.0.1:1: [Errno 111] Connection refused" in ended.stderr


# ---------------------------------------------------------------------------------------------
# stopped


def processes(work: Path) -> list[int]:
    """Those in which tasks of Sleeps run."""
    return [int(file.read_text()) for file in work.glob("process *") if file.read_text()]


def lives(process: int) -> bool:
    """Whether a process runs, and has not only left its number."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(condition, seconds: float = 30.0):
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    assert condition()


@pytest.mark.parametrize("kind", ["ray", "slurm"], indirect=True)
def test_ctrl_c_ends_the_tasks_elsewhere(kind, work):
    def interrupt():
        wait_for(lambda: len(processes(work)) == 2)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_phase(kind, work, 3, Sleeps(work))
    thread.join()
    wait_for(lambda: not any(map(lives, processes(work))))
    assert not (work / "phases" / "test" / executors.NAME_FILE).exists()


def test_jobs_that_a_killed_run_left_are_canceled(slurm, work, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", TESTS)
    code = ("from test_prepare_executors import *; "
            "Phases(Path('work'), 2, {'test': 1}, executor='slurm').run('test', 2, [Sleeps(Path('work'))])")
    main = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": f"{ROOT}:{TESTS}"})
    wait_for(lambda: len(processes(work)) == 2)
    main.kill()
    main.wait()
    assert all(map(lives, processes(work)))
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="scancel --name=prepare-test-"):
        Phases(work, 2, {"test": 1})
    monkeypatch.setenv("PATH", path)
    Phases(work, 2, {"test": 1})
    wait_for(lambda: not any(map(lives, processes(work))))
    assert not (work / "phases" / "test" / executors.NAME_FILE).exists()


# ---------------------------------------------------------------------------------------------
# the whole recipe


@pytest.fixture(scope="module")
def argv(tmp_path_factory, tokenizer_dir) -> list:
    """The input: documents and chats in six tasks, with duplicates and leaks."""
    folder = tmp_path_factory.mktemp("raw")
    texts, chats = make_texts(seed=1, n=40, longest=300), make_chats(seed=2, n=60)
    write_jsonl(folder / "text 1.jsonl", texts)
    write_jsonl(folder / "text 2.jsonl", [*texts[:5], *make_texts(seed=3, n=20, longest=300)])
    write_jsonl(folder / "chats.jsonl", [*chats, *chats[:3]])
    val = write_jsonl(folder.parent / "val.jsonl", texts[30:33])
    return ["--data_path", folder, "--val_path", val, "--tokenizer_path", tokenizer_dir, "--task_mb", 1, "--workers", 2]


@pytest.fixture(scope="module")
def local(argv, tmp_path_factory) -> dict[str, bytes]:
    """What a run on this machine writes."""
    folder = tmp_path_factory.mktemp("local") / "data"
    run(*argv, "--out_dir", folder)
    files = contents(folder)
    assert {"pretrain-00000.jsonl.zst", "sft_512-00000.jsonl.zst", "dropped/exact.jsonl.zst"} <= set(files)
    return files


def test_ray_with_a_killed_worker_gives_the_same_bytes(argv, local, tmp_path):
    """Started from another folder, whose tasks are known by it."""
    pytest.importorskip("ray")

    def tasks() -> list[int]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(folder / "cwd") == str(tmp_path) and "_run_rank" in (folder / "cmdline").read_text():
                    found.append(int(folder.name))
            except OSError:
                continue
        return found

    process = start(*argv, "--out_dir", "data", "--executor", "ray", cwd=tmp_path)
    wait_for(tasks)
    os.kill(tasks()[0], signal.SIGKILL)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert contents(tmp_path / "data") == local


def test_slurm_gives_the_same_bytes(argv, local, slurm, tmp_path, monkeypatch):
    """Begun on this machine, stopped, and gone on with through job files, several tasks a job."""
    (tmp_path / "ma in").mkdir()
    monkeypatch.chdir(tmp_path / "ma in")
    command = [*map(str, argv), "--out_dir", "data"]
    command[-3] = "1"
    assert prepare_data.main([*command, "--executor", "slurm", "--slurm", "time=10:00"]) == 0
    assert contents(Path("data")) == local
    submitted = [line for line in (slurm / "calls").read_text().splitlines() if line.startswith("sbatch")]
    assert len(submitted) >= 9
