"""How a stage begins and ends: exit codes, --resume, what is refused and in which words."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from faults import COMMON, ROOT, STAGES, bits, course, metrics

from common import checkpoint
from Config import FLAGS


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer_dir):
    """Undisturbed runs of all stages."""
    return course(tmp_path_factory, tokenizer_dir)


@pytest.fixture(scope="module")
def half_way(runs, tmp_path_factory):
    """stage -> out_dir of a run that was killed after its second checkpoint; not to be changed."""
    made = {}

    def make(stage: str) -> Path:
        if stage not in made:
            runs.reference(stage)
            made[stage] = tmp_path_factory.mktemp("half way") / "out"
            ended = runs.run(stage, made[stage], fault={"at": "after rename checkpoint", "nth": 2})
            assert ended.code == -signal.SIGKILL
        return made[stage]

    return make


def steps_kept(out: Path, stage: str = "pretrain") -> list[int]:
    """The steps whose full state is in out_dir."""
    return sorted(step for step, _ in checkpoint.numbered(checkpoint.checkpoint_folder(out, stage)))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the lock, which says who was there last."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()
            and file.name != "run.lock"}


# ---------------------------------------------------------------------------------------------
# signals


def stopped_in_the_middle(argv: list[str], number: int) -> tuple[int, str, str]:
    """Run pretrain.py for real, send it a signal after its first steps; its exit code, stdout and stderr."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen([sys.executable, "pretrain.py", *argv], cwd=ROOT, env=env, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        for line in process.stdout:
            if line.startswith("Epoch:"):
                process.send_signal(number)
                break
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out, err


def test_a_signal_saves_the_state_and_the_printed_command_ends_the_run_as_if_never_stopped(runs, tmp_path):
    """SIGINT 130 and SIGTERM 143, in real processes; a folder's name may be one that a shell would take apart."""
    long = dict(epochs=40, save_interval=1000, eval_interval=1000)
    assert runs.run("pretrain", tmp_path / "expected", resume=False, flags=long).code == 0
    expected = bits(torch.load(tmp_path / "expected" / "pretrain.pth", weights_only=True)["model"])
    for number, code, name in ((signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "SIGINT")):
        out = tmp_path / f"the user's $HOME & {name}"
        returned, _, err = stopped_in_the_middle(runs.argv("pretrain", out, **long), number)
        assert returned == code, err
        told = re.search(r"stopped by (\w+) after step (\d+); the state is saved. To resume: (.*)", err)
        assert told and told[1] == name, err
        step = int(told[2])
        rows = metrics("pretrain", out)
        assert steps_kept(out) == [step] and rows[-1]["step"] == step < 100, "the last whole step is saved"
        if number == signal.SIGTERM:  # the printed command, in a shell
            env = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
            again = subprocess.run(told[3], shell=True, cwd=ROOT, env=env, capture_output=True, text=True)
            assert again.returncode == 0, again
        else:
            assert runs.run("pretrain", out, flags=long).code == 0
        assert bits(torch.load(out / "pretrain.pth", weights_only=True)["model"]) == expected
        assert metrics("pretrain", out) == metrics("pretrain", tmp_path / "expected")


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_stops_by_a_signal_at_a_line_or_during_a_save_and_resumes(runs, tmp_path, stage):
    lines = runs.reference(stage).moments["line"]
    for fault, code in (({"at": "line", "nth": lines // 2, "do": "term"}, 143),
                        ({"at": "before sync checkpoint", "do": "int"}, 130),
                        ({"at": "before rename weights", "nth": 1, "do": "term"}, 143)):
        out = tmp_path / str(code) / fault["at"]
        ended = runs.run(stage, out, resume=False, fault=fault, flags=dict(cache_dir=out / "cache"))
        assert ended.code == code, ended
        step = int(re.search(r"after step (\d+); the state is saved", ended.err)[1])
        assert max(steps_kept(out, stage)) == step == metrics(stage, out)[-1]["step"]
        assert ended.err.splitlines()[-1].endswith("--resume"), "the last line is the command"
        assert runs.run(stage, out).code == 0
        runs.reference(stage).assert_same(out)


@pytest.mark.parametrize("do, code", [("int", 130), ("term", 143)])
def test_a_signal_before_training_ends_at_once_and_the_same_command_starts_again(runs, tmp_path, do, code):
    flags = dict(cache_dir=tmp_path / "cache")
    ended = runs.run("pretrain", tmp_path / "out", resume=False, flags=flags,
                     fault={"at": "before sync cache tokens.bin", "do": do})
    assert ended.code in (code, 128 - code), ended  # negative: by the signal itself, which a shell calls 143
    assert "Traceback" not in ended.err
    ended = runs.run("pretrain", tmp_path / "out", resume=True, flags=flags)
    assert ended.code == 0
    runs.reference("pretrain").assert_same(tmp_path / "out")


# ---------------------------------------------------------------------------------------------
# output that is there, or not


@pytest.mark.parametrize("left", ["pretrain.pth", "pretrain_best.pth", "log/pretrain.jsonl", "checkpoints"])
def test_without_resume_a_stage_that_has_output_there_is_refused(runs, half_way, tmp_path, left):
    source, out = half_way("pretrain"), tmp_path / "out"
    (out / left).parent.mkdir(parents=True)
    (shutil.copytree if (source / left).is_dir() else shutil.copy)(runs.undisturbed / left, out / left)
    before = contents(out)
    ended = runs.run("pretrain", out, resume=False)
    assert ended.code == 2, ended
    assert str(out / left) in ended.one_line and "--resume" in ended.one_line
    assert contents(out) == before, "nothing was touched"


def test_output_of_other_stages_is_no_obstacle(runs, half_way, tmp_path):
    shutil.copytree(half_way("SFT"), tmp_path / "out")
    shutil.copytree(half_way("pretrain"), tmp_path / "out", dirs_exist_ok=True)
    ended = runs.run("SFT_long", tmp_path / "out", resume=False, flags=dict(max_steps=1))
    assert ended.code == 0, ended


@pytest.mark.parametrize("stage", STAGES)
def test_resume_with_nothing_there_starts_and_says_so(runs, tmp_path, stage):
    ended = runs.run(stage, tmp_path / "out", resume=True)
    assert ended.code == 0, ended
    assert f"no checkpoint of {stage} in {tmp_path / 'out'}: starting from the beginning" in ended.out
    runs.reference(stage).assert_same(tmp_path / "out")


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_stage_is_not_trained_again(runs, tmp_path, stage):
    """Its weights are made again from the state where a kill, or a hand, took them away."""
    runs.reference(stage)
    out = tmp_path / "out"
    for part in ("checkpoints", "log"):
        shutil.copytree(runs.undisturbed / part, out / part)
    shutil.copy(runs.undisturbed / f"{stage}_best.pth", out)
    ended = runs.run(stage, out)
    assert ended.code == 0, ended
    assert "nothing to train" in ended.out and "Epoch:" not in ended.out
    runs.reference(stage).assert_same(out)


def test_a_larger_max_steps_goes_on_as_if_it_had_been_meant_so(runs, tmp_path):
    constant = dict(lr_schedule="constant", warmup_ratio=0)
    assert runs.run("pretrain", tmp_path / "one", resume=False, flags=constant | dict(max_steps=5)).code == 0
    for max_steps, steps in ((2, 2), (3, 3), (5, 5)):
        ended = runs.run("pretrain", tmp_path / "three", flags=constant | dict(max_steps=max_steps))
        assert ended.code == 0, ended
        assert metrics("pretrain", tmp_path / "three")[-1]["step"] == steps
    one, three = (bits(torch.load(tmp_path / out / "pretrain.pth", weights_only=True)["model"])
                  for out in ("one", "three"))
    assert one == three
    losses = [[row["loss"] for row in metrics("pretrain", tmp_path / out)] for out in ("one", "three")]
    assert losses[0] == losses[1]
    ended = runs.run("pretrain", tmp_path / "three", flags=constant | dict(max_steps=0))
    assert ended.code == 0 and metrics("pretrain", tmp_path / "three")[-1]["step"] == 6, "0: no limit"
    ended = runs.run("pretrain", tmp_path / "three", flags=constant | dict(max_steps=4))
    assert ended.code == 2 and "--max_steps" in ended.one_line


def test_the_metrics_are_cut_back_to_the_checkpoint_s_step(runs, half_way, tmp_path):
    """Rows of steps that were trained after the checkpoint, and of none at all, are gone after a resume."""
    shutil.copytree(half_way("pretrain"), tmp_path / "out")
    file = tmp_path / "out" / "log" / "pretrain.jsonl"
    rows = file.read_text(encoding="utf-8").splitlines()
    late = [json.dumps(json.loads(rows[-1]) | {"step": step, "loss": 0.0}) for step in (5, 6, 7, 100)]
    file.write_text("".join(line + "\n" for line in rows + late), encoding="utf-8")
    ended = runs.run("pretrain", tmp_path / "out", fault={"at": "nothing written best"})
    assert ended.code == -signal.SIGKILL
    assert [row["step"] for row in metrics("pretrain", tmp_path / "out")] == [1, 2, 3, 4, 5]
    assert runs.run("pretrain", tmp_path / "out").code == 0
    runs.reference("pretrain").assert_same(tmp_path / "out")


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_few_checkpoints_are_kept(runs, tmp_path, keep):
    assert runs.run("pretrain", tmp_path, flags=dict(keep_checkpoints=keep)).code == 0
    assert steps_kept(tmp_path) == [2, 4, 6][-keep:]


# ---------------------------------------------------------------------------------------------
# flags changed on --resume

CHANGED = {
    "preset": "demo", "max_seq_len": 80, "min_tokens": 1, "max_tokens": 1000, "epochs": 3, "max_steps": 5,
    "batch_size": 2, "accumulation_steps": 1, "learning_rate": 0.002, "lr_schedule": "constant", "warmup_ratio": 0.3,
    "decay_ratio": 0.3, "min_lr_ratio": 0.2, "optimizer": "adamw", "beta2": 0.9, "weight_decay": 0.2,
    "weight_decay_on": "all", "grad_clip": 2.0,
    "dropout": 0.2, "tag_weight": 4.0, "think_weight": 0.25, "compile": True, "deterministic": True, "seed": 43,
    "order": "file", "dtype": "fp32", "split_documents": True, "keep_malformed_thoughts": True,
}


def test_every_trajectory_flag_is_among_those_changed_below():
    assert {name for name, flag in FLAGS.items() if flag.trajectory} <= {*CHANGED, "output_init"}


@pytest.mark.parametrize("flag", CHANGED)
def test_a_trajectory_flag_changed_on_resume_is_refused_by_name(runs, half_way, flag):
    out = half_way("distill")
    before = contents(out / "checkpoints")
    ended = runs.run("distill", out, flags={flag: CHANGED[flag]}, env={"TORCHDYNAMO_DISABLE": "1"})
    assert ended.code == 2, ended
    assert f"--{flag} " in ended.one_line
    assert contents(out / "checkpoints") == before


@pytest.mark.parametrize("flag, value", [("preset", "demo"), ("output_init", "normal")])
def test_another_model_on_resume_is_refused_by_name(runs, half_way, flag, value):
    ended = runs.run("pretrain", half_way("pretrain"), flags={flag: value})
    assert ended.code == 2 and f"--{flag} " in ended.one_line, ended


def test_output_init_does_not_steer_a_run_that_starts_from_weights(runs, half_way):
    assert runs.run("distill", half_way("distill"), flags=dict(output_init="normal")).code == 0


def test_other_data_or_other_starting_weights_on_resume_are_refused(runs, half_way, tmp_path):
    data = tmp_path / "less.jsonl"
    lines = runs.data["SFT"].read_text(encoding="utf-8").splitlines(keepends=True)
    data.write_text("".join(lines[1:]), encoding="utf-8")
    ended = runs.run("SFT", half_way("SFT"), flags=dict(data_path=data))
    assert ended.code == 2 and "the training data changed" in ended.one_line, ended
    ended = runs.run("SFT_long", half_way("SFT_long"), flags=dict(init_from=runs.undisturbed / "pretrain.pth"))
    assert ended.code == 2 and "--init_from changed" in ended.one_line, ended


def test_several_changed_flags_are_all_named(runs, half_way):
    ended = runs.run("distill", half_way("distill"), flags=dict(seed=1, dropout=0, grad_clip=5))
    assert ended.code == 2
    assert all(f"--{name} (was " in ended.one_line for name in ("seed", "dropout", "grad_clip"))


def test_flags_that_do_not_steer_may_change_and_change_nothing(runs, half_way, tmp_path):
    """Nor may it matter that data and starting weights have moved, or that the weights are gone."""
    shutil.copytree(half_way("SFT"), tmp_path / "out")
    shutil.copy(runs.data["SFT"], tmp_path / "moved.jsonl")
    ended = runs.run("SFT", tmp_path / "out", flags=dict(
        save_interval=3, keep_checkpoints=5, eval_interval=5, eval_tokens=1000, gradient_checkpointing=True,
        data_path=tmp_path / "moved.jsonl", init_from=tmp_path / "gone.pth", cache_dir=tmp_path / "cache",
        max_bad_ratio=0.5))
    assert ended.code == 0, ended
    assert bits(torch.load(tmp_path / "out" / "SFT.pth", weights_only=True)["model"]) == \
        runs.reference("SFT").end["weights: model"]


# ---------------------------------------------------------------------------------------------
# mistakes

BAD_FLAGS = {
    "an unknown flag": (dict(learning_rat=1), "learning_rat"),
    "an unknown choice": (dict(optimizer="sgd"), "--optimizer"),
    "an unknown preset": (dict(preset="huge"), "--preset"),
    "a word for a number": (dict(batch_size="many"), "--batch_size"),
    "a fraction for a whole number": (dict(epochs=1.5), "--epochs"),
    "too small": (dict(accumulation_steps=0), "--accumulation_steps"),
    "too large": (dict(dropout=1), "--dropout"),
    "negative": (dict(learning_rate=-1), "--learning_rate"),
    "not a number": (dict(grad_clip="nan"), "--grad_clip"),
    "infinite": (dict(weight_decay="inf"), "--weight_decay"),
    "a row of one token": (dict(max_seq_len=1), "--max_seq_len"),
    "more than the memory": (dict(max_seq_len=10**15), "memory"),
    "a seed beyond 64 bits": (dict(seed=10**30), "--seed"),
    "a device that is not here": (dict(device="mps" if torch.cuda.is_available() else "cuda"), "--device"),
    "no data": (dict(data_path=None), "--data_path"),
    "a flag of other stages": (dict(tag_weight=5), "tag_weight"),
}


@pytest.mark.parametrize("mistake", BAD_FLAGS)
def test_a_bad_flag_is_named_in_one_line(runs, tmp_path, mistake):
    flags, named = BAD_FLAGS[mistake]
    ended = runs.run("pretrain", tmp_path / "out", resume=False, flags=flags)
    assert ended.code == 2, ended
    assert named in ended.one_line
    assert not list(tmp_path.rglob("*.pth"))


def test_conflicting_lengths_are_named_in_one_line(runs, tmp_path):
    ended = runs.run("SFT", tmp_path / "out", resume=False, flags=dict(min_tokens=60, max_tokens=50))
    assert ended.code == 2 and "--min_tokens 60" in ended.one_line and "--max_tokens 50" in ended.one_line


def bad_files(folder: Path, weights: Path) -> dict:
    """mistake -> (flags, what the line must name); files are made in `folder`."""

    def file(name: str, content: bytes) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    (folder / "nothing").mkdir()
    record = json.dumps({"text": "水滴石穿。" * 20}, ensure_ascii=False).encode() + b"\n"
    return {
        "no such data": (dict(data_path=folder / "gone.jsonl"), "gone.jsonl"),
        "no match of a glob": (dict(data_path=folder / "gone-*.jsonl"), "gone-*.jsonl"),
        "a folder without data": (dict(data_path=folder / "nothing"), "nothing"),
        "empty data": (dict(data_path=file("empty.jsonl", b"")), "empty.jsonl"),
        "only empty documents": (dict(data_path=file("void.jsonl", b'{"text": ""}\n' * 3)), "void.jsonl"),
        "one document": (dict(data_path=file("one.jsonl", record)), "one.jsonl"),
        "no JSON": (dict(data_path=file("prose.jsonl", b"water\n" * 5)), "prose.jsonl:1"),
        "malformed lines": (dict(data_path=file("bad.jsonl", (record + b'{"text": 1}\n') * 3)), "bad.jsonl:2"),
        "conversations for text": (dict(data_path=file("chat.jsonl", b'{"conversations": []}\n' * 9)), "chat.jsonl:1"),
        "a truncated .gz": (dict(data_path=file("cut.jsonl.gz", gzip.compress(record * 99)[:-20])), "cut.jsonl.gz"),
        "a .xz that is none": (dict(data_path=file("no.jsonl.xz", record)), "no.jsonl.xz"),
        "no such validation data": (dict(val_path=folder / "gone.jsonl"), "gone.jsonl"),
        "no such tokenizer": (dict(tokenizer_path=folder / "gone"), "--tokenizer_path"),
        "no such weights": (dict(init_from=folder / "gone.pth"), "gone.pth"),
        "a folder for weights": (dict(init_from=folder), str(folder)),
        "a file for out_dir": (dict(out_dir=file("plain", b"")), "plain"),
        "a file above out_dir": (dict(out_dir=folder / "plain" / "out"), "plain"),
        "a file for cache_dir": (dict(cache_dir=folder / "plain"), "plain"),
        "a preset that is not that of the weights": (dict(init_from=weights, preset="demo"), "--preset"),
    }


def test_a_file_that_is_missing_or_wrong_is_named_in_one_line(runs, tmp_path):
    runs.reference("pretrain")
    for mistake, (flags, named) in bad_files(tmp_path, runs.undisturbed / "pretrain.pth").items():
        ended = runs.run("pretrain", tmp_path / "out", resume=False, flags=flags)
        assert ended.code == 2, f"{mistake}: {ended}"
        assert named in ended.one_line, mistake
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_stage_without_the_one_before_says_which_script_makes_it(runs, tmp_path, stage):
    ended = runs.run(stage, tmp_path / "out", resume=False, flags=dict(init_from=None))
    before = STAGES[STAGES.index(stage) - 1]
    assert ended.code == 2, ended
    assert str(tmp_path / "out" / f"{before}.pth") in ended.one_line and f"{before}.py" in ended.one_line


def test_each_stage_starts_from_the_one_before_in_the_same_out_dir_and_ends_with_0(runs, tmp_path):
    for stage in STAGES:
        ended = runs.run(stage, tmp_path, resume=False, charts=stage == "pretrain",
                         flags=dict(init_from=None, max_steps=1))
        assert ended.code == 0, ended
        assert ended.err == ""
    assert COMMON["log_interval"] == 1 and len(metrics("distill", tmp_path)) == 1
    charts = {file.name for file in (tmp_path / "charts_pretrain").iterdir()}
    assert charts == {f"{name}_pretrain.png" for name in ("loss", "lr", "epoch_time")}
