"""fastpath/native.py and native_decoder.py: C is compiled where possible; elsewhere torch decodes."""

import copy
import os
import platform
import shutil
import subprocess

import pytest
import torch

from common.generation import Decoder, Sampling, generate
from Config import LLMConfig
from fastpath import kernels, native, sampling
from fastpath.int8 import round_weights
from fastpath.native_decoder import NativeDecoder
from fastpath.twin import relative
from model import KVCache, WeakWater

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return WeakWater(LLMConfig.preset("nano", vocab_size=300, max_seq_len=64)).eval()


@pytest.fixture
def uncompiled(monkeypatch, tmp_path):
    """A copy of the C sources in a new folder, not compiled yet. Yields the path of decode.c."""
    folder = tmp_path / "code"
    folder.mkdir()
    for name in ("simd.h", *native.SOURCES):
        shutil.copy(native.FOLDER / name, folder)
    monkeypatch.setattr(native, "FOLDER", folder)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    for each in (native.library, kernels.compiled, sampling.compiled):
        each.cache_clear()
    yield folder / "decode.c"
    for each in (native.library, kernels.compiled, sampling.compiled):
        each.cache_clear()


@needs_compiler
def test_sources_are_compiled_once_into_pycache(uncompiled, model, monkeypatch):
    loaded, reason = native.library()
    assert loaded is not None and "compiled by" in reason
    (made,) = (uncompiled.parent / "__pycache__").iterdir()
    native.library.cache_clear()
    monkeypatch.setattr(subprocess, "run", None)  # a second compilation would call it
    assert native.library()[0] is not None and made.exists()
    assert Decoder(model).native is not None


@needs_compiler
def test_a_changed_source_is_compiled_again(uncompiled):
    native.library()
    native.library.cache_clear()
    (before,) = (uncompiled.parent / "__pycache__").iterdir()
    uncompiled.write_text(uncompiled.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    native.library()
    after = set((uncompiled.parent / "__pycache__").iterdir())  # the old file may belong to another machine
    assert before in after and len(after) == 2


@needs_compiler
@pytest.mark.parametrize("hindrance", ["a file in the way", "others may write", "a link"])
def test_a_folder_that_others_can_write_is_not_used(uncompiled, tmp_path, hindrance):
    folder = uncompiled.parent / "__pycache__"
    if hindrance == "a file in the way":
        folder.write_text("")
    elif hindrance == "a link":
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    assert native.library()[0] is not None
    assert list((tmp_path / "temporary").glob("weakwater-*/native-*.so"))


@needs_compiler
@pytest.mark.parametrize("vocab_size", [300, 301])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_tokens_do_not_depend_on_threads_or_openmp(uncompiled, model, monkeypatch, dtype, vocab_size):
    prompt = list(range(5, 25))
    monkeypatch.setattr(native, "FLAGS", [*native.FLAGS, "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
                                           "-Wno-unused-parameter"])
    monkeypatch.delenv("CC", raising=False)

    def tokens(threads: int) -> list[int]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            decoder = Decoder(copy.deepcopy(model), dtype)
            assert decoder.native is not None
            return generate(decoder, [prompt], 30, Sampling(), ())[0].ids
        finally:
            torch.set_num_threads(before)

    expected = tokens(1)
    assert tokens(2) == tokens(5) == expected
    native.library.cache_clear()
    run = subprocess.run

    def without_openmp(command, **options):
        if "-fopenmp" in command:
            return subprocess.CompletedProcess(command, 1, "", "unsupported option '-fopenmp'")
        return run(command, **options)

    # with another source, since the library that is already loaded would be used again
    uncompiled.write_text(uncompiled.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    monkeypatch.setattr(subprocess, "run", without_openmp)
    assert tokens(2) == expected
    loaded, reason = native.library()
    assert not loaded.has_openmp() and "on one thread" in reason


@pytest.mark.parametrize("path, reason", [("", "no C compiler was found"), ("broken", "cannot compile C")])
def test_without_a_working_compiler_torch_decodes(uncompiled, model, monkeypatch, tmp_path, path, reason):
    (tmp_path / "broken").mkdir()
    for name in ("cc", "gcc", "clang"):
        (tmp_path / "broken" / name).write_text("#!/bin/sh\necho 'decode.c:1: cannot compile C' >&2\nexit 1\n")
        os.chmod(tmp_path / "broken" / name, 0o755)
    prompt = list(range(5, 25))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / path) if path else "")
    loaded, said = native.library()
    assert loaded is None and reason in said
    decoder = Decoder(model)
    assert decoder.native is None and reason in decoder.computed_by
    generation = generate(decoder, [prompt], 30, Sampling(), ())[0]
    logits_TV = model(torch.tensor([prompt + generation.ids]))[0]
    assert generation.ids == logits_TV[len(prompt) - 1:-1].argmax(-1).tolist()
    assert not list((uncompiled.parent / "__pycache__").glob("*"))  # no partial file


@needs_compiler
def test_unsupported_models_use_torch(model):
    for dtype in ("fp32", "bf16"):
        assert Decoder(copy.deepcopy(model), dtype).native is not None
    narrow = WeakWater(LLMConfig.preset("nano", vocab_size=300, hidden_dim=100))
    for other, dtype, reason in ((narrow, "fp32", "multiples of 64"), (copy.deepcopy(model), "fp16", "bf16 and int8"),
                                 (copy.deepcopy(model).double(), "fp32", "bf16 and int8 only")):
        decoder = Decoder(other, dtype)
        assert decoder.native is None and reason in decoder.computed_by
    assert Decoder(model, plain=True).native is None


@needs_compiler
@pytest.mark.parametrize("without", [[], ["-mno-avx512bf16", "-mno-avx512vnni"], ["-mno-avx512f", "-mno-avx2"]])
def test_rows_do_not_depend_on_one_another(uncompiled, monkeypatch, without):
    """Each row's logits are the same in any company of at least two, in any order; alone they are close. The cache of
    no other row changes."""
    if without and platform.machine() != "x86_64":
        pytest.skip("flags of x86_64")
    monkeypatch.setattr(native, "FLAGS", [*native.FLAGS, *without])
    uncompiled.write_text(uncompiled.read_text(encoding="utf-8") + "\n" * (1 + len(without)), encoding="utf-8")
    for dtype in ("fp32", "bf16", "int8"):
        for kv_heads, vocab_size in ((4, 300), (2, 301)):
            check_rows(dtype, kv_heads, vocab_size)


def check_rows(dtype: str, kv_heads: int, vocab_size: int) -> None:
    torch.manual_seed(0)
    config = LLMConfig(vocab_size, 128, 2, 4, kv_heads, 640, 64, qk_norm=kv_heads == 2)  # 640: more than a block
    model = WeakWater(config).eval()
    if dtype == "int8":
        round_weights(model)
    int8 = dtype == "int8"
    decoder = Decoder(model, "fp32" if int8 else dtype, int8=int8)
    assert decoder.native_reason is None and decoder.native is not None
    cache = decoder.new_cache(20, 64)
    for each in (cache.keys, cache.values):
        each.copy_(torch.randn(each.shape))
    before = cache.keys.clone()
    tokens, positions = [7 * row for row in range(20)], [3 * row for row in range(20)]

    def logits(rows: list[int]) -> torch.Tensor:
        cache.keys.copy_(before)
        return decoder.native([tokens[row] for row in rows], rows, [positions[row] for row in rows], cache.keys,
                              cache.values)

    every = logits([*range(20)])
    for rows in ([3, 4], [8, 1, 19, 0, 2, 4, 6, 5], [19 - row for row in range(13)], [*range(20)]):
        assert torch.equal(logits(rows), every[rows])
        changed = (cache.keys != before).flatten(2).any(-1).any(0)  # which rows
        assert changed.nonzero().flatten().tolist() == sorted(rows)
    for row in (0, 11):
        assert relative(logits([row]), every[[row]]) < (0.02 if dtype == "bf16" else 1e-3 if int8 else 1e-5)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_row_that_is_not_finite_stays_so_and_harms_no_other(model, dtype):
    decoder, cache = NativeDecoder(model, dtype), KVCache(model.config, 3, 8, None, torch.float32)
    fine = decoder([5, 6, 7], [0, 1, 2], [0, 0, 0], cache.keys, cache.values)
    decoder.tensors[0][6, 3] = float("nan")  # the embedding, in fp32 also the head
    broken = decoder([5, 6, 7], [0, 1, 2], [0, 0, 0], cache.keys, cache.values)
    assert fine.isfinite().all() and broken[1].isnan().all()
    assert torch.equal(broken[[0, 2], 7:], fine[[0, 2], 7:])


@needs_compiler
@pytest.mark.parametrize("tokens, rows, positions", [
    ([-1], [0], [0]), ([300], [0], [0]), ([1], [0], [-1]), ([1], [0], [64]), ([1], [2], [0]), ([1], [-1], [0]),
    ([1, 1], [0, 0], [0, 1]), ([1, 1], [0, 1], [0]), ([], [], [])])
def test_arguments_out_of_bounds_are_rejected(model, tokens, rows, positions):
    decoder = Decoder(model)
    cache = decoder.new_cache(2, 64)
    with pytest.raises((AssertionError, ValueError)):
        decoder.native(tokens, rows, positions, cache.keys, cache.values)
