"""fastpath/native.py and decoder.py: C compiled where it can be, and decoding that goes on where it cannot."""

import copy
import os
import shutil
import subprocess

import pytest
import torch

from common.generation import Decoder, Sampling, generate
from Config import LLMConfig
from fastpath import kernels, native
from model import WeakWater

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return WeakWater(LLMConfig.preset("nano", vocab_size=300, max_seq_len=64)).eval()


@pytest.fixture
def afresh(monkeypatch, tmp_path):
    """A copy of decode.c, and the others beside it, that has never been compiled."""
    folder = tmp_path / "code"
    folder.mkdir()
    for name in ("simd.h", *native.SOURCES):
        shutil.copy(native.FOLDER / name, folder)
    monkeypatch.setattr(native, "FOLDER", folder)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    for each in (native.library, kernels.compiled):
        each.cache_clear()
    yield folder / "decode.c"
    for each in (native.library, kernels.compiled):
        each.cache_clear()


@needs_compiler
def test_it_is_compiled_once_and_beside_its_source(afresh, model, monkeypatch):
    loaded, reason = native.library()
    assert loaded is not None and "compiled by" in reason
    (made,) = (afresh.parent / "__pycache__").iterdir()
    native.library.cache_clear()
    monkeypatch.setattr(subprocess, "run", None)  # a second compilation would call it
    assert native.library()[0] is not None and made.exists()
    assert Decoder(model).native is not None


@needs_compiler
def test_a_changed_source_is_compiled_again(afresh):
    native.library()
    native.library.cache_clear()
    (before,) = (afresh.parent / "__pycache__").iterdir()
    afresh.write_text(afresh.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    native.library()
    after = set((afresh.parent / "__pycache__").iterdir())  # the old one may be another machine's
    assert before in after and len(after) == 2


@needs_compiler
@pytest.mark.parametrize("hindrance", ["a file in the way", "others may write", "a link"])
def test_where_the_folder_is_not_ours_alone_another_is_taken(afresh, tmp_path, hindrance):
    folder = afresh.parent / "__pycache__"
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
def test_any_number_of_threads_and_none_of_openmp_give_the_same_tokens(afresh, model, monkeypatch, dtype, vocab_size):
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

    afresh.write_text(afresh.read_text(encoding="utf-8") + "\n", encoding="utf-8")  # else what is loaded would serve
    monkeypatch.setattr(subprocess, "run", without_openmp)
    assert tokens(2) == expected
    loaded, reason = native.library()
    assert not loaded.has_openmp() and "on one thread" in reason


@pytest.mark.parametrize("path, reason", [("", "no C compiler was found"), ("broken", "this compiler knows no C")])
def test_without_a_working_compiler_torch_decodes(afresh, model, monkeypatch, tmp_path, path, reason):
    (tmp_path / "broken").mkdir()
    for name in ("cc", "gcc", "clang"):
        (tmp_path / "broken" / name).write_text("#!/bin/sh\necho 'decode.c:1: this compiler knows no C' >&2\nexit 1\n")
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
    assert not list((afresh.parent / "__pycache__").glob("*"))  # nothing half made


@needs_compiler
def test_only_what_it_can_compute_is_given_to_it(model):
    for dtype in ("fp32", "bf16"):
        assert Decoder(copy.deepcopy(model), dtype).native is not None
    narrow = WeakWater(LLMConfig.preset("nano", vocab_size=300, hidden_dim=100))
    for other, dtype, reason in ((narrow, "fp32", "multiples of 64"), (copy.deepcopy(model), "fp16", "fp32 and bf16"),
                                 (copy.deepcopy(model).double(), "fp32", "fp32 and bf16 only")):
        decoder = Decoder(other, dtype)
        assert decoder.native is None and reason in decoder.computed_by
    assert Decoder(model, plain=True).native is None


@needs_compiler
@pytest.mark.parametrize("token, position", [(-1, 0), (300, 0), (1, -1), (1, 64)])
def test_no_memory_beyond_is_touched(model, token, position):
    decoder = Decoder(model)
    cache = decoder.new_cache(1, 64)
    with pytest.raises(AssertionError):
        decoder.native(token, position, cache.keys, cache.values)
