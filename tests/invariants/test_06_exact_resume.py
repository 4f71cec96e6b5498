"""Invariant 6: kill -9 at any moment, then resume: the losses that follow and the final weights are bit-identical to a
run never killed, for every stage, across an epoch's end, with accumulation, dropout, bf16 and fp16's scaler, AdamW
and Muon. Every point before and after each write, sync and rename is hit."""

import random
import signal
from pathlib import Path

import pytest
from faults import COMMON, SETTINGS, STAGES, course, end_of, metrics

SAVES = ("checkpoint", "weights", "best")
PHASES = ("nothing written {}", "half written {}", "before sync {}", "after sync {}", "before rename {}",
          "after rename {}", "before sync folder of {}", "after sync folder of {}")
CACHE_FILES = ("tokens.bin", "documents.bin", "replies.bin", "meta.json")
CACHE = [phase.format(f"cache {name}") for name in CACHE_FILES for phase in PHASES[:4]] + [
    "before rename cache", "after rename cache"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer_dir):
    """Undisturbed runs of all stages."""
    return course(tmp_path_factory, tokenizer_dir)


def assert_named_files_are_whole(out: Path, stage: str) -> None:
    """Whatever stands under its final name can be loaded, at any moment."""
    from common.checkpoint import load
    from common.run_state import STATE_KEYS
    from common.weights import load_weights

    for file in out.glob("*.pth"):
        load_weights(file)
    for file in out.glob(f"checkpoints/{stage}/*.pth"):
        load(file, STATE_KEYS)


def kill_and_resume(runs, stage: str, moments: list[str], folder: Path, **flags) -> None:
    """Kill at the first of the moments, resume and kill at the second, and so on; then let it end, and compare.

    A run that ends before it comes to the moment asked for is compared, and the next begins anew.
    """
    out, number = folder / "0", 0
    expected = runs.reference(stage)
    for moment in moments:
        ended = runs.run(stage, out, fault={"at": moment}, flags=flags)
        if ended.code == 0:
            expected.assert_same(out)
            number += 1
            out = folder / str(number)
            ended = runs.run(stage, out, fault={"at": moment}, flags=flags)
        assert ended.code == -signal.SIGKILL, f"{moment}: {ended}"
        assert_named_files_are_whole(out, stage)
    ended = runs.run(stage, out, flags=flags)
    assert ended.code == 0, ended
    expected.assert_same(out)


# ---------------------------------------------------------------------------------------------
# the tests


def test_the_stages_cover_what_the_law_names(runs):
    """Two epochs, accumulation 2, dropout 0.1; each precision with each optimizer; the scaler at work."""
    assert COMMON["epochs"] == 2 and COMMON["accumulation_steps"] == 2 and COMMON["dropout"] == 0.1
    assert {(s["dtype"], s["optimizer"]) for s in SETTINGS.values()} == {
        (dtype, optimizer) for dtype in ("bf16", "fp16") for optimizer in ("adamw", "muon")}
    assert any(len(runs.reference(stage).rows_of(1)) % COMMON["save_interval"] for stage in STAGES), \
        "some stretch between two checkpoints crosses an epoch's end"
    for stage in STAGES:
        end = runs.reference(stage).end
        first, second = runs.reference(stage).rows_of(1), runs.reference(stage).rows_of(2)
        assert len(first) >= 3 and len(second) >= 3, "there are checkpoints in both epochs"
        assert [row["step"] for row in first + second] == list(range(1, len(end["metrics"]) + 1))
        fp16 = SETTINGS[stage]["dtype"] == "fp16"
        assert bool(end["state: scaler"]) == fp16
        assert not fp16 or end["state: scaler"]["_growth_tracker"] > 1


def test_every_save_is_written_synced_and_renamed(runs):
    """The moments that the other tests kill at are really passed: none of the files is written without them."""
    for stage in STAGES:
        passed = runs.reference(stage).moments
        for what in SAVES:
            for phase in PHASES:
                assert passed.get(phase.format(what), 0) >= 2, f"{stage}: never {phase.format(what)}"
        assert passed["line"] > 10_000
    for moment in CACHE:
        assert runs.reference("pretrain").moments.get(moment) == 1, f"never {moment}"
    assert runs.reference("SFT").moments.get("half written cache types.bin") == 1
    assert runs.reference("pretrain").moments.get("before remove checkpoint") >= 1


@pytest.mark.parametrize("what", SAVES)
def test_pretrain_killed_at_each_point_of_a_save_ends_the_same(runs, tmp_path, what):
    kill_and_resume(runs, "pretrain", [phase.format(what) for phase in PHASES], tmp_path)


def test_killed_after_its_best_validation_a_run_keeps_the_best_weights(runs, tmp_path):
    """With a learning rate so high that the validation loss rises again."""
    flags = dict(learning_rate=0.03, lr_schedule="constant", epochs=3, eval_interval=1)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert runs.run("pretrain", whole, flags=flags).code == 0
    losses = [row["val_loss"] for row in metrics("pretrain", whole)]
    best = losses.index(min(losses)) + 1
    assert best <= len(losses) - 3, "the validation loss rises again"
    save = -(-best // COMMON["save_interval"])  # the first at or after it
    assert runs.run("pretrain", killed, fault={"at": "after rename checkpoint", "nth": save}, flags=flags).code < 0
    assert runs.run("pretrain", killed, flags=flags).code == 0
    assert end_of("pretrain", killed) == end_of("pretrain", whole)


def test_killed_while_old_checkpoints_are_removed_ends_the_same(runs, tmp_path):
    kill_and_resume(runs, "pretrain", ["before remove checkpoint", "after remove checkpoint"], tmp_path,
                    keep_checkpoints=1)


@pytest.mark.parametrize("stage", STAGES[1:])
def test_other_stages_killed_at_each_point_of_a_save_end_the_same(runs, tmp_path, stage):
    phases = ("half written {}", "before rename {}", "after rename {}")
    kill_and_resume(runs, stage, [phase.format(what) for what in SAVES for phase in phases], tmp_path)


def test_killed_at_each_point_of_making_the_text_cache_ends_the_same(runs, tmp_path):
    kill_and_resume(runs, "pretrain", CACHE, tmp_path, cache_dir=tmp_path / "cache")


def test_killed_at_each_point_of_making_the_chat_cache_ends_the_same(runs, tmp_path):
    moments = [f"half written cache {name}" for name in (*CACHE_FILES, "types.bin")] + CACHE[-2:]
    kill_and_resume(runs, "SFT", moments, tmp_path, cache_dir=tmp_path / "cache")


def test_killed_while_the_metrics_are_cut_back_ends_the_same(runs, tmp_path):
    ended = runs.run("distill", tmp_path / "0", fault={"at": "before rename checkpoint", "nth": 2})
    assert ended.code == -signal.SIGKILL
    assert len(metrics("distill", tmp_path / "0")) > COMMON["save_interval"], "there is something to cut back"
    kill_and_resume(runs, "distill", [phase.format("metrics") for phase in PHASES[:6]], tmp_path)


def test_killed_in_the_middle_of_a_line_of_metrics_ends_the_same(runs, tmp_path):
    ended = runs.run("SFT", tmp_path, fault={"at": "before rename checkpoint", "nth": 2})
    assert ended.code == -signal.SIGKILL
    file = tmp_path / "log" / "SFT.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-len(whole.splitlines()[-1]) // 2])
    assert runs.run("SFT", tmp_path).code == 0
    runs.reference("SFT").assert_same(tmp_path)


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_any_line_of_the_code_ends_the_same(runs, tmp_path, stage):
    """Moments drawn from all lines that Python executes in this project's code, from the first to the last."""
    lines = runs.reference(stage).moments["line"]
    draw = random.Random(stage)
    for third in range(3):
        moment = int(lines * (third + draw.random()) / 3) + 1
        out = tmp_path / str(third)
        flags = dict(cache_dir=out / "cache")  # made anew, as in the undisturbed run
        ended = runs.run(stage, out, fault={"at": "line", "nth": moment}, flags=flags)
        assert ended.code == -signal.SIGKILL, f"line {moment} of {lines}: {ended}"
        if out.exists():
            assert_named_files_are_whole(out, stage)
        ended = runs.run(stage, out, flags=flags)
        assert ended.code == 0, f"after a kill at line {moment} of {lines}: {ended}"
        runs.reference(stage).assert_same(out)
