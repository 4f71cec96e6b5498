"""fastpath/native.py and native_decoder.py: C is compiled where possible; elsewhere torch decodes."""

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
def uncompiled(monkeypatch, tmp_path):
    """A copy of the C sources in a new folder, not compiled yet. Yields the path of decode.c."""
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
@pytest.mark.parametrize("token, position", [(-1, 0), (300, 0), (1, -1), (1, 64)])
def test_arguments_out_of_bounds_are_rejected(model, token, position):
    decoder = Decoder(model)
    cache = decoder.new_cache(1, 64)
    with pytest.raises(AssertionError):
        decoder.native(token, position, cache.keys, cache.values)
