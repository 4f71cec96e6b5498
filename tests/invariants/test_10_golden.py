"""Invariant 10: twenty losses per stage at a fixed seed equal tests/golden/losses.json, with AdamW and the defaults.

A change that is meant to change them writes the file anew: python tests/invariants/test_10_golden.py
"""

import json
import platform
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conftest import make_chats, make_r1, make_texts, train, write_jsonl

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
COMMON = dict(accumulation_steps=2, max_steps=20, epochs=9, eval_interval=0)
RECIPES = {  # "default": Muon on a trapezoid
    "adamw": dict(optimizer="adamw", learning_rate=2e-3, lr_schedule="cosine", warmup_ratio=0.0, min_lr_ratio=0.1),
    "default": dict()}
STAGES = {  # data, flags; everything else is the stage's default
    "pretrain": (lambda: make_texts(21, 60, longest=800), dict(preset="nano", max_seq_len=256)),
    "SFT": (lambda: make_chats(22, 150, longest=250), dict(max_seq_len=512)),
    "SFT_long": (lambda: make_chats(23, 60, shortest=700, longest=800, reply=60), dict(max_seq_len=1024)),
    "distill": (lambda: make_r1(24, 150), dict(max_seq_len=1024, tag_weight=5.0, think_weight=0.5)),
}


def losses(folder: Path, recipe: str) -> dict[str, list[float]]:
    """Twenty losses of each stage, each from the weights of the one before, in float32 on one thread; Muon's matmuls
    too, which elsewhere are in bfloat16, whose rounding differs from one processor to the next."""
    threads, found = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    try:
        for stage, (records, flags) in STAGES.items():
            data = write_jsonl(folder / f"{stage}.jsonl", records())
            with mock.patch("common.optim.matmul_dtype", lambda device: torch.float32):
                rows = train(stage, data, GOLDEN / "tokenizer", folder / "out", batch_size=1024 // flags["max_seq_len"],
                             **COMMON, **RECIPES[recipe], **flags)
            found[stage] = [row["loss"] for row in rows]
    finally:
        torch.set_num_threads(threads)
    return found


def version() -> dict[str, str]:
    """What the last digits depend on."""
    return {"torch": torch.__version__.split("+")[0], "machine": platform.machine()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_golden_losses(tmp_path, recipe):
    """To 1e-4 with the torch and the processor family of the file, to 1e-2 with others."""
    golden = json.loads((GOLDEN / "losses.json").read_text(encoding="utf-8"))
    same = {key: golden[key] for key in version()} == version()
    got = losses(tmp_path, recipe)
    assert list(got) == list(golden["losses"][recipe]) == list(STAGES)
    for stage, expected in golden["losses"][recipe].items():
        assert len(expected) == 20
        assert got[stage] == pytest.approx(expected, rel=1e-4 if same else 1e-2), f"{stage}, {version()}"


def main() -> None:
    """Write the golden file."""
    rounded = {}
    for recipe in RECIPES:
        with tempfile.TemporaryDirectory() as folder:
            rounded[recipe] = {stage: [float(f"{loss:.7g}") for loss in values]
                               for stage, values in losses(Path(folder), recipe).items()}
    text = json.dumps(version() | {"dtype": "fp32", "threads": 1, "losses": rounded}, indent=1)
    (GOLDEN / "losses.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
