"""Slurm's programs for tests without a cluster: sbatch, squeue, scancel, scontrol and srun, in a folder for PATH.

sbatch reads a job file as strictly as the real one (known options, each once, one value, bash's syntax), and runs the
tasks of its array in processes, %N at a time, with the variables that Slurm sets.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = ("sbatch", "squeue", "scancel", "scontrol", "srun")
OPTIONS = {"array", "cpus-per-task", "error", "job-name", "mem", "mem-per-cpu", "nodes", "output", "partition", "qos",
           "requeue", "time"}
MAX_ARRAY_SIZE = 1001


def install(folder: Path) -> None:
    """Write the programs into the folder; their jobs are in folder/jobs, their calls in folder/calls."""
    (folder / "jobs").mkdir(parents=True)
    for name in PROGRAMS:
        program = folder / name
        program.write_text(f"#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(__file__)} {name} "
                           f"{shlex.quote(str(folder))} \"$@\"\n")
        program.chmod(0o755)


def fail(message: str) -> None:
    """End as sbatch does when it refuses a job."""
    print(f"sbatch: error: {message}", file=sys.stderr)
    sys.exit(1)


def sbatch(folder: Path, args: list[str]) -> None:
    """Check a job file, and start its array."""
    *options, script = args
    given = dict(option.removeprefix("--").split("=", 1) for option in options)
    if set(given) - {"export", "dependency"}:
        fail(f"unrecognized option {options}")
    export = given["export"].split(",")
    if export[0] != "ALL":
        fail("the environment is not handed on")
    lines = Path(script).read_text(encoding="utf-8").splitlines()
    if lines[0] != "#!/bin/bash":
        fail("This does not look like a batch script")
    directives = {}
    for line in lines:
        if line.startswith("#SBATCH"):
            words = shlex.split(line.removeprefix("#SBATCH"))
            name, _, value = words[0].removeprefix("--").partition("=")
            if len(words) != 1 or not words[0].startswith("--") or name not in OPTIONS or name in directives:
                fail(f"unrecognized option '{line}'")
            directives[name] = value
    if {"mem", "mem-per-cpu"} <= set(directives):
        fail("--mem and --mem-per-cpu are mutually exclusive")
    if subprocess.run(["bash", "-n", script]).returncode:
        fail("the script is no bash")
    array = re.fullmatch(r"0-(\d+)%(\d+)", directives["array"])
    if not array or int(array[1]) >= MAX_ARRAY_SIZE:
        fail(f"Invalid job array specification {directives['array']}")
    job = 1 + len(list((folder / "jobs").glob("*.sh")))
    copy = folder / "jobs" / f"{job}.sh"
    copy.write_text(Path(script).read_text(encoding="utf-8"), encoding="utf-8")
    state = folder / "jobs" / f"{job}.json"
    command = [sys.executable, __file__, "run", str(folder), str(job), array[1], array[2], directives["output"],
               given.get("dependency", "")]
    nowhere = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    runner = subprocess.Popen(command, env=os.environ | dict(item.split("=", 1) for item in export[1:]),
                              start_new_session=True, **nowhere)
    state.write_text(json.dumps({"name": directives["job-name"], "process": runner.pid}))
    print(f"Submitted batch job {job}")


def run(folder: Path, args: list[str]) -> None:
    """Run the tasks of an array, in a process of its own."""
    job, last, at_once, output, dependency = args
    state = folder / "jobs" / f"{job}.json"
    if dependency:
        before = dependency.removeprefix("afterany:")
        while (folder / "jobs" / f"{before}.json").exists():
            time.sleep(0.05)
    waiting, running = list(range(int(last) + 1)), []
    while waiting or running:
        running = [process for process in running if process.poll() is None]
        while waiting and len(running) < int(at_once):
            task = waiting.pop(0)
            log = re.sub("%.", lambda found: {"%A": job, "%a": str(task), "%%": "%"}[found[0]], output)  # noqa: B023
            env = os.environ | {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_JOB_ID": job,
                                "SLURM_JOB_ID": f"{job}{task}", "SLURM_NODELIST": "node1", "SLURM_NODEID": "0"}
            with open(log, "w") as stream:
                running.append(subprocess.Popen(["bash", folder / "jobs" / f"{job}.sh"], env=env, stdout=stream,
                                                stderr=stream))
        time.sleep(0.05)
    while not state.exists():
        time.sleep(0.05)
    state.unlink()


def jobs(folder: Path, name: str) -> list[dict]:
    """The jobs of a name that have not ended."""
    found = [json.loads(file.read_text()) | {"file": file} for file in (folder / "jobs").glob("*.json")]
    return [job for job in found if job["name"] == name]


def squeue(folder: Path, args: list[str]) -> None:
    """List the jobs of a name."""
    assert args[0] == "--noheader" and args[1].startswith("--name=") and args[2:] == ["--format=%T|%r"], args
    for _ in jobs(folder, args[1].removeprefix("--name=")):
        print("RUNNING|None")


def scancel(folder: Path, args: list[str]) -> None:
    """Kill the jobs of a name."""
    assert len(args) == 1 and args[0].startswith("--name="), args
    for job in jobs(folder, args[0].removeprefix("--name=")):
        os.killpg(job["process"], signal.SIGTERM)
        job["file"].unlink()


def scontrol(folder: Path, args: list[str]) -> None:
    """Expand a list of nodes."""
    assert args[:2] == ["show", "hostnames"] and len(args) == 3, args
    print(args[2])


def srun(folder: Path, args: list[str]) -> None:
    """Run a command."""
    assert args[:3] == ["-l", "-n", "1"], args
    os.execvp(args[3], args[3:])


if __name__ == "__main__":
    with open(Path(sys.argv[2]) / "calls", "a") as calls:
        calls.write(shlex.join([sys.argv[1], *sys.argv[3:]]) + "\n")
    globals()[sys.argv[1]](Path(sys.argv[2]), sys.argv[3:])
