"""Invariant 3: batch × accumulation of 8×1, 4×2 and 1×8 give the same step: the same documents, loss and gradients."""

import json

import numpy as np
import pytest
import torch
from conftest import replace_forwards, train, write_jsonl

from Config import LLMConfig
from dataset import StepLoader, load_documents
from model import WeakWater

pytestmark = pytest.mark.usefixtures("without_check")

CUTS = [(8, 1), (4, 2), (2, 4), (1, 8)]
ROW = 256
WEIGHTS = dict(tag_weight=4.0, think_weight=0.25)


@pytest.fixture(scope="module")
def weighted_data(data_dir, tmp_path_factory):
    """Text and R1 records; every second one has a `weight` from 0.1 to 3."""
    folder = tmp_path_factory.mktemp("weighted")
    for name in ("pretrain", "r1"):
        lines = (data_dir / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        for number, record in enumerate(records[::2]):
            record["weight"] = 0.1 + 2.9 * (number % 7) / 6
        write_jsonl(folder / f"{name}.jsonl", records)
    return folder


def load(weighted_data, tokenizer, cache_dir, kind):
    """The weighted documents of a kind."""
    file = weighted_data / ("pretrain.jsonl" if kind == "text" else "r1.jsonl")
    return load_documents(str(file), tokenizer, kind, str(cache_dir), ROW)


def make_loader(documents, cut, **options):
    """A loader with `cut` = (batch size, accumulation), and weights on tags and thoughts."""
    return StepLoader(documents, ROW, *cut, seed=7, **WEIGHTS, **options)


@pytest.mark.parametrize("replaced", [False, True], ids=["plain", "replaced"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["no checkpointing", "checkpointing"])
@pytest.mark.parametrize("kind", ["text", "chat"])
def test_gradients(weighted_data, tokenizer, cache_dir, kind, checkpointing, replaced):
    """In float64 the gradients are equal to rounding, for a full step and for the short last step of an epoch."""
    documents = load(weighted_data, tokenizer, cache_dir, kind)
    torch.manual_seed(1)
    model = WeakWater(LLMConfig.preset("nano", vocab_size=800, max_seq_len=ROW, n_kv_heads=1)).double().train()
    if replaced:
        replace_forwards(model, torch.float64)
    model.model.gradient_checkpointing = checkpointing
    last = make_loader(documents, (8, 1)).steps_in_epoch(0) - 1
    for number in (0, last):
        results = []
        for cut in CUTS:
            step = make_loader(documents, cut).step(0, number)
            assert len(step.micro_batches) <= cut[1] and (number == last or len(step.micro_batches) == cut[1])
            model.zero_grad()
            total = 0.0
            for micro_batch in step.micro_batches:
                batch = micro_batch.to("cpu")
                loss = model(**batch | {"weights": batch["weights"].double()}) / step.total_weight
                loss.backward()
                total += loss.item()
            gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
            results.append((total, gradients))
        for total, gradients in results[1:]:
            assert total == pytest.approx(results[0][0], rel=1e-7)
            assert (gradients - results[0][1]).abs().max() <= 1e-7 * results[0][1].abs().max()


def contents(step) -> tuple[list, float]:
    """(the sorted (token, target, weight) of every target of a step, its total weight)."""
    targets = []
    for batch in step.micro_batches:
        rows = zip(batch.tokens[batch.target_index].tolist(), batch.targets.tolist(), batch.weights.tolist(),
                   strict=True)
        targets += rows
    return sorted(targets), step.total_weight


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_the_same_targets(weighted_data, tokenizer, cache_dir, kind):
    """Every step of an epoch has the same targets, however it is split into micro-batches or over processes.
    total_weight is the sum of their weights."""
    documents = load(weighted_data, tokenizer, cache_dir, kind)
    whole = make_loader(documents, (8, 1))
    seen = set()
    for number in range(whole.steps_in_epoch(1)):
        expected, total = contents(whole.step(1, number))
        seen |= {weight for _, _, weight in expected}
        assert total == pytest.approx(sum(weight for _, _, weight in expected), rel=1e-5)
        for cut in CUTS[1:]:
            assert contents(make_loader(documents, cut).step(1, number)) == (expected, pytest.approx(total))
        ranks = [make_loader(documents, (2, 2), rank=rank, world_size=2).step(1, number) for rank in (0, 1)]
        assert all(rank.total_weight == pytest.approx(total) for rank in ranks)
        assert sorted(target for rank in ranks for target in contents(rank)[0]) == expected
    assert len(seen) > 5  # the data has different weights


def test_more_ranks_than_documents(weighted_data, tokenizer, cache_dir):
    """A rank without a document in a short last step still computes a micro-batch, at weight 0."""
    for kind in ("text", "chat"):
        documents = load(weighted_data, tokenizer, cache_dir, kind).take(np.arange(2))
        steps = [make_loader(documents, (4, 1), rank=rank, world_size=4).step(0, 0) for rank in range(4)]
        assert all(step.micro_batches for step in steps)
        idle = [step for step in steps if not any(len(batch.targets) for batch in step.micro_batches)]
        assert idle and all(step.total_weight > 0 for step in steps)
        weight = sum(float(batch.weights.sum()) for step in steps for batch in step.micro_batches)
        assert weight == pytest.approx(steps[0].total_weight)


@pytest.mark.parametrize("stage, plain", [("pretrain", False), ("pretrain", True), ("SFT", False), ("distill", False)])
def test_the_loops_of_the_stages(weighted_data, tokenizer_dir, cache_dir, tmp_path, stage, plain):
    """Four steps of each stage script log the same losses and gradient norms."""
    flags = dict(preset="nano", init_from="none", max_seq_len=ROW, max_steps=4, cache_dir=cache_dir, grad_clip=0.5,
                 learning_rate=3e-3, eval_interval=0, eval_tokens=1000, plain=plain)
    if stage == "SFT":
        flags |= dict(max_tokens=1024)
    if stage == "distill":
        flags |= WEIGHTS
    data = weighted_data / ("pretrain.jsonl" if stage == "pretrain" else "r1.jsonl")
    runs = []
    for batch_size, accumulation in ((8, 1), (4, 2), (1, 8)):
        runs.append(train(stage, data, tokenizer_dir, tmp_path / str(batch_size), batch_size=batch_size,
                          accumulation_steps=accumulation, **flags))
    first = runs[0]
    assert [row["step"] for row in first] == [1, 2, 3, 4] and first[3]["loss"] < first[0]["loss"]
    for run in runs[1:]:
        for a, b in zip(run, first, strict=True):
            assert a["tokens"] == b["tokens"] and a["lr"] == b["lr"]
            assert a["loss"] == pytest.approx(b["loss"], rel=2e-5)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2e-4)
        assert run[-1]["val_loss"] == pytest.approx(first[-1]["val_loss"], rel=2e-5)
