"""Chat: display, history, errors and Ctrl-C."""

import contextlib
import io
import os
import re
import select
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from test_evaluate import save_nano

import eval_model
from common import checkpoint, exits
from common.weights import load_weights, model_parser, open_weights, save_weights
from Config import LLMConfig, UserError
from eval_model import DIM, PLAIN, Display, make_prompt
from model import WeakWater
from text.chat import encode_chat
from text.tokenizer import TextEncoder

REPLY = "<think>嗯</think><answer>鳄🐊</answer>"  # save_nano requires that no token occurs twice


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory, tokenizer):
    """Weights of three stages: SFT always answers REPLY; distill and pretrain are untrained."""
    folder = tmp_path_factory.mktemp("out")
    ids = encode_chat(tokenizer, [{"role": "assistant", "content": REPLY}])[0]
    header = encode_chat(tokenizer, [], add_generation_prompt=True)[0]
    content = ids[len(header):ids.index(tokenizer.eos_token_id)]
    save_nano(folder / "SFT.pth", tokenizer, "SFT", content)
    save_nano(folder / "distill.pth", tokenizer, "distill")
    save_nano(folder / "pretrain.pth", tokenizer, "pretrain")
    return folder


@pytest.fixture
def flags(out_dir, tokenizer_dir):
    """The flags that every call needs."""
    return ["--out_dir", str(out_dir), "--tokenizer_path", str(tokenizer_dir), "--dtype", "fp32"]


@pytest.fixture
def load(flags):
    """A function that loads weights by mode, as the script does."""
    return lambda mode: open_weights(
        model_parser("test", "").parse_args(["--model_mode", str(mode), *flags]))


def chat(monkeypatch, lines: str, *argv) -> int:
    """Run the script with `lines` as the user's input."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return eval_model.main([str(a) for a in argv])


# ---- one answer -----------------------------------------------------------------------------


def test_one_prompt_into_a_pipe_that_is_not_utf8(flags):
    """stdout holds the unchanged answer in UTF-8; everything else goes to stderr."""
    command = [sys.executable, "eval_model.py", "--model_mode", "1", "--prompt", "你好", "--temperature", "0", *flags]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode("utf-8") == REPLY + "\n"
    notes = done.stderr.decode("utf-8")
    assert "tokens/s, first token after" in notes and "temperature 0.0, top_p 0.9" in notes


def test_the_reason_for_an_answers_end_is_printed(flags, capsys):
    assert eval_model.main(["--model_mode", "2", "--prompt", "你好", "--max_new_tokens", "3", *flags]) == 0
    assert "[3 tokens, " in (notes := capsys.readouterr().err) and "stopped at --max_new_tokens 3" in notes
    eval_model.main(["--model_mode", "2", "--prompt", "你好", "--max_new_tokens", "3000", "--temperature", "0",
                     *flags])
    assert "the context of 128 tokens is full" in capsys.readouterr().err


def test_a_seed_repeats_an_answer(flags, capsys):
    def reply(seed):
        eval_model.main(["--model_mode", "2", "--prompt", "你好", "--max_new_tokens", "20", "--seed", seed, *flags])
        return capsys.readouterr().out

    assert reply("1") == reply("1") != reply("2")


@pytest.mark.parametrize("argv, reason", [
    (["--model_mode", "1", "--prompt", "长" * 400], "too long: .* tokens, but the model's context of 128 has room"),
    (["--model_mode", "1", "--prompt", "\udce4\udcbd"], "--prompt is not UTF-8 at character 1"),
    (["--model_mode", "3", "--prompt", "a"], "SFT_long.pth: no such file .python SFT_long.py makes it"),
    (["--checkpoint", "nowhere.pth", "--prompt", "a"], "nowhere.pth: no such file"),
    (["--model_mode", "0", "--system", "a", "--prompt", "a"], "continue text and have no system message"),
    (["--model_mode", "1", "--temperature", "-1"], "--temperature -1.0: must be at least 0"),
])
def test_a_user_error_is_one_line_and_exit_2(flags, capsys, argv, reason):
    assert exits.run(lambda: eval_model.main([*flags, *argv])) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert re.search(reason, errors), errors


@pytest.mark.parametrize("argv", [[], ["--model_mode", "1", "--checkpoint", "x.pth"], ["--model_mode", "4"],
                                  ["--model_mode", "1", "--max_new_tokens", "0"]])
def test_invalid_flags(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        eval_model.main(argv)
    assert exit.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_tokenizer_that_does_not_match_the_weights(out_dir, flags, tmp_path, tokenizer):
    from conftest import byte_level, save_tokenizer

    old = load_weights(out_dir / "SFT.pth")  # without the digest of a tokenizer, as in older weights
    checkpoint.save({"model": old[0], "config": old[1].to_dict(), "meta": {}}, tmp_path / "old.pth")
    large = [chr(0x4E00 + n) * 3 for n in range(3000)]
    for texts, size, weights, reason in ((["a b"], 300, out_dir / "SFT.pth", "trained with another tokenizer"),
                                         (large, 900, tmp_path / "old.pth", "has 900 entries, .* only 800")):
        folder = save_tokenizer(byte_level(texts, size), tmp_path / str(size))
        with pytest.raises(UserError, match=reason):
            eval_model.main([*flags, "--checkpoint", str(weights), "--prompt", "a", "--tokenizer_path", str(folder)])


# ---- the conversation -----------------------------------------------------------------------


def test_a_conversation(monkeypatch, capsys, flags):
    code = chat(monkeypatch, "你好\n\n/help\n再来\n/clear\nbroken \udce4\n又来\n", "--model_mode", 1, *flags)
    shown = capsys.readouterr()
    assert code == 0
    assert shown.out == (REPLY + "\n") * 3
    assert shown.err.count("/clear starts") == 2 and "conversation cleared" in shown.err
    assert "the line is not UTF-8 at character 8" in shown.err


def test_the_history_of_a_conversation(monkeypatch, flags, tokenizer):
    seen = []

    def answer(loaded, ids, args, generator, color):
        seen.append(tokenizer.decode(ids))
        return f"<think>想{len(seen)}</think>", len(seen) == 1  # the first is interrupted: its text is kept

    monkeypatch.setattr(eval_model, "answer", answer)
    chat(monkeypatch, "一\n二\n三\n四\n", "--model_mode", 1, "--history_turns", 2, "--system", "助手",
         "--max_new_tokens", 9, *flags)
    assert seen[1] == ("<s>system\n助手</s>\n<s>user\n一</s>\n<s>assistant\n<think>想1</think></s>\n"
                       "<s>user\n二</s>\n<s>assistant\n")
    assert "一" not in seen[3] and "想2" in seen[3] and "想3" in seen[3]
    seen.clear()
    chat(monkeypatch, "一\n二\n", "--model_mode", 1, "--history_turns", 0, *flags)
    assert seen[1] == "<s>user\n二</s>\n<s>assistant\n"


def test_the_oldest_turns_are_dropped_when_the_context_is_full(load, tokenizer):
    loaded = load(1)
    turn = [{"role": "user", "content": "问" * 4}, {"role": "assistant", "content": "答" * 4}]
    system = [{"role": "system", "content": "助手"}]
    ids, dropped = make_prompt(loaded, system, turn * 9, "新", max_new_tokens=40)
    assert 0 < dropped < 9 and len(ids) + 40 <= 128
    assert ids == encode_chat(tokenizer, system + turn * (9 - dropped) + [{"role": "user", "content": "新"}], True)[0]
    one_more = encode_chat(tokenizer, system + turn * (10 - dropped) + [{"role": "user", "content": "新"}], True)[0]
    assert len(one_more) + 40 > 128
    # a limit above the context does not drop the whole history
    assert make_prompt(loaded, [], turn, "新", max_new_tokens=10_000)[1] == 0
    # a long message may leave less room than max_new_tokens
    ids, dropped = make_prompt(loaded, [], turn, "新" * 25, max_new_tokens=100)
    assert dropped == 1 and 64 < len(ids) <= 112


def test_dropped_turns_and_long_messages_are_reported(monkeypatch, capsys, flags):
    lines = "很长很长的问题\n" * 4 + "长" * 400 + "\n"
    assert chat(monkeypatch, lines, "--model_mode", 1, "--history_turns", 9, "--max_new_tokens", 60, *flags) == 0
    shown = capsys.readouterr()
    assert "oldest turn" in shown.err and "too long: " in shown.err
    assert shown.out == (REPLY + "\n") * 4


def test_pretraining_weights_continue_text(monkeypatch, capsys, load, flags, out_dir, tokenizer):
    encoder = TextEncoder.of(tokenizer)
    expected = [encoder.bos_id, *encoder.encode(["</s>你好"])[0]]
    assert make_prompt(load(0), [], [], "</s>你好", 10) == (expected, 0)
    assert encoder.eos_id not in expected
    code = chat(monkeypatch, "你好\n", "--checkpoint", out_dir / "pretrain.pth", "--max_new_tokens", 5, *flags)
    assert code == 0 and "text to continue" in capsys.readouterr().err


# ---- the screen -----------------------------------------------------------------------------

THOUGHTFUL = "<think>\n嗯<\n</think>\n<answer>\n7 < 8\n</answer>"
SHOWN = f"{DIM}嗯<\n{PLAIN}7 < 8\n{PLAIN}"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_thinking_is_dimmed_and_tags_are_hidden(size):
    display = Display(color=True)
    pieces = [THOUGHTFUL[i:i + size] for i in range(0, len(THOUGHTFUL), size)]
    assert "".join(map(display.push, pieces)) + display.flush() == SHOWN


def test_the_display_loses_nothing():
    plain = Display(color=False)
    assert "".join(map(plain.push, THOUGHTFUL)) + plain.flush() == THOUGHTFUL
    display = Display(color=True)
    assert display.push("a <ans") == "a " and display.flush() == "<ans" + PLAIN
    assert "\x1b" not in Display(color=True).push("\x1b[2J")


# ---- Ctrl-C ---------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_ctrl_c_stops_the_answer_and_then_the_program(tmp_path, tokenizer, tokenizer_dir):
    import pty

    model = WeakWater(LLMConfig.preset("nano", vocab_size=len(tokenizer), max_seq_len=50_000, tie_embeddings=False))
    with torch.no_grad():  # the model never generates </s>
        model.model.embed_tokens.weight[:, 0] = 1
        model.lm_head.weight[tokenizer.eos_token_id, 0] = -1e4
    path = tmp_path / "endless.pth"
    save_weights(path, model, {"stage": "distill"})
    command = [sys.executable, "eval_model.py", "--checkpoint", str(path), "--tokenizer_path", str(tokenizer_dir),
               "--max_new_tokens", "40000"]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    screen = b""

    def wait_for(text: bytes, seconds: float = 60) -> None:
        nonlocal screen
        end = time.monotonic() + seconds
        while text not in screen:
            readable = select.select([ours], [], [], max(0, end - time.monotonic()))[0]
            assert readable and process.poll() is None, screen.decode("utf-8", "replace")
            screen += os.read(ours, 65536)
        screen = screen.partition(text)[2]

    try:
        for message in ("你好\n", "再来\n"):  # the second shows that the program continues
            wait_for(b"> ")
            os.write(ours, message.encode())
            wait_for(b"\n")
            before = len(screen)
            while len(screen) < before + 50:
                assert select.select([ours], [], [], 60)[0], screen.decode("utf-8", "replace")
                screen += os.read(ours, 65536)
            process.send_signal(signal.SIGINT)
            wait_for(b"stopped by Ctrl-C]")
        wait_for(b"> ")
        for _ in range(5):  # a signal between the prompt and readline's wait takes effect only with the next one
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.send_signal(signal.SIGINT)
                process.wait(4)
                break
        assert process.returncode == 130
    finally:
        process.kill()
        process.wait()
        os.close(ours)
