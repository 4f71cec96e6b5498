"""Weights split into pieces and joined again are the same, rounded to bfloat16; a bad piece is refused by name."""

import shutil

import pytest
import torch

from common.weights import load_model, load_weights, save_weights, weights_sha256
from Config import LLMConfig, UserError
from experiments import split_weights
from model import WeakWater

TIED = ("lm_head.weight", "model.embed_tokens.weight")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def packed(request, tmp_path_factory):
    """(weights file, prefix of its pieces, whether the weights are tied); at least three pieces of 1 MiB."""
    folder = tmp_path_factory.mktemp("split")
    torch.manual_seed(1)
    model = WeakWater(LLMConfig.preset("nano", vocab_size=20_000, tie_embeddings=request.param))
    save_weights(folder / "SFT.pth", model, {"stage": "SFT", "step": 7})
    split_weights.main(["pack", str(folder / "SFT.pth"), str(folder / "pieces" / "SFT"), "--mib", "1"])
    return folder / "SFT.pth", folder / "pieces" / "SFT", request.param


@pytest.fixture
def pieces(packed, tmp_path):
    """The prefix of a copy of the pieces, to be damaged."""
    shutil.copytree(packed[1].parent, tmp_path / "pieces")
    return tmp_path / "pieces" / "SFT"


def test_the_joined_file_holds_the_rounded_weights(packed, tmp_path):
    source, prefix, tied = packed
    files = sorted(prefix.parent.iterdir())
    assert len(files) >= 3 and all(file.stat().st_size <= 1 << 20 for file in files)
    split_weights.main(["unpack", str(prefix), str(tmp_path / "joined.pth")])
    before, config, _ = load_weights(source)
    after, config_after, meta = load_weights(tmp_path / "joined.pth")
    assert config_after == config and list(after) == list(before)
    for name, tensor in after.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, before[name].bfloat16().float())
    assert (after[TIED[0]].data_ptr() == after[TIED[1]].data_ptr()) == tied
    assert meta["rounded"] == "bfloat16" and meta["weights_sha256"] == weights_sha256(after) and meta["step"] == 7
    load_model(tmp_path / "joined.pth")


def test_packing_again_removes_pieces_left_over(packed, pieces):
    split_weights.main(["pack", str(packed[0]), str(pieces), "--mib", "15"])
    assert [file.name for file in pieces.parent.iterdir()] == ["SFT.0"]


def remove(prefix):
    prefix.with_name("SFT.1").unlink()


def flip(prefix):
    path = prefix.with_name("SFT.1")
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def cut(prefix):
    path = prefix.with_name("SFT.1")
    path.write_bytes(path.read_bytes()[:-1])


def garbage(prefix):
    prefix.with_name("SFT.1").write_bytes(b"[1]\nnothing")


def swap(prefix):
    shutil.copy(prefix.with_name("SFT.2"), prefix.with_name("SFT.1"))


def mix(prefix):
    """Piece 1 of other weights."""
    model = WeakWater(LLMConfig.preset("nano", vocab_size=20_000))
    save_weights(prefix.with_name("other.pth"), model, {})
    split_weights.main(["pack", str(prefix.with_name("other.pth")), str(prefix.with_name("other")), "--mib", "1"])
    shutil.copy(prefix.with_name("other.1"), prefix.with_name("SFT.1"))


@pytest.mark.parametrize("damage, reason", [(remove, "missing"), (flip, "damaged"), (cut, "damaged"),
                                            (garbage, "damaged"), (swap, "piece 2, not 1"), (mix, "other weights")])
def test_a_bad_piece_is_refused_by_name(pieces, tmp_path, damage, reason):
    damage(pieces)
    with pytest.raises(UserError, match=rf"SFT\.1: .*{reason}"):
        split_weights.main(["unpack", str(pieces), str(tmp_path / "joined.pth")])
    assert not (tmp_path / "joined.pth").exists()
