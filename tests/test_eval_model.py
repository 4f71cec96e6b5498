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
from common.weights import load_model, load_weights, model_parser, open_weights, save_weights
from Config import LLMConfig, UserError
from eval_model import DIM, PLAIN, Display, make_prompt
from model import WeakWater
from text.chat import encode_chat
from text.tokenizer import TextEncoder

REPLY = "<think>嗯</think><answer>鳄🐊</answer>"  # save_nano requires that no token occurs twice
THOUGHT, PLAIN_REPLY = "<think>嗯</think>鳄🐊", "鳄🐊"  # what thinker.pth answers with and without thinking
EMPTY = "<think>\n\n</think>\n"


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory, tokenizer):
    """Weights of three stages: SFT always answers REPLY; distill and pretrain are untrained; thinker.pth is distill's
    and answers PLAIN_REPLY, or THOUGHT behind an opened <think>."""
    folder = tmp_path_factory.mktemp("out")
    ids = encode_chat(tokenizer, [{"role": "assistant", "content": REPLY}])[0]
    header = encode_chat(tokenizer, [], add_generation_prompt=True)[0]
    content = ids[len(header):ids.index(tokenizer.eos_token_id)]
    save_nano(folder / "SFT.pth", tokenizer, "SFT", content)
    save_nano(folder / "distill.pth", tokenizer, "distill")
    save_nano(folder / "pretrain.pth", tokenizer, "pretrain")
    encoder = TextEncoder.of(tokenizer)
    plain, tags = encoder.encode([PLAIN_REPLY])[0], encoder.tag_ids
    model, meta = load_model(save_nano(folder / "thinker.pth", tokenizer, "distill", plain))
    chain = [tags["<think>"], *encoder.encode(["嗯"])[0], tags["</think>"], plain[0]]
    assert len({*chain, *plain}) == len(chain) + len(plain) - 1
    with torch.no_grad():  # a second way to the same end; see save_nano
        for before, after in zip(chain, chain[1:], strict=False):
            model.lm_head.weight[after] += model.model.embed_tokens.weight[before]
    save_weights(folder / "thinker.pth", model, meta)
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
    (["--model_mode", "1", "--no_think", "--prompt", "a"], "^error: --no_think: SFT weights do not think: only dis"),
    (["--model_mode", "0", "--no_think"], "--no_think: pretrain weights do not think"),
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

    def answer(loaded, ids, args, generator, color, opened):
        seen.append(tokenizer.decode(ids) + opened)
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
    ids, dropped = make_prompt(loaded, system, turn * 9, "新", max_new_tokens=40, thinking=None)
    assert 0 < dropped < 9 and len(ids) + 40 <= 128
    assert ids == encode_chat(tokenizer, system + turn * (9 - dropped) + [{"role": "user", "content": "新"}], True)[0]
    one_more = encode_chat(tokenizer, system + turn * (10 - dropped) + [{"role": "user", "content": "新"}], True)[0]
    assert len(one_more) + 40 > 128
    # a limit above the context does not drop the whole history
    assert make_prompt(loaded, [], turn, "新", max_new_tokens=10_000, thinking=None)[1] == 0
    # a long message may leave less room than max_new_tokens
    ids, dropped = make_prompt(loaded, [], turn, "新" * 25, max_new_tokens=100, thinking=None)
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
    assert make_prompt(load(0), [], [], "</s>你好", 10, None) == (expected, 0)
    assert encoder.eos_id not in expected
    code = chat(monkeypatch, "你好\n", "--checkpoint", out_dir / "pretrain.pth", "--max_new_tokens", 5, *flags)
    assert code == 0 and "text to continue" in capsys.readouterr().err


# ---- thinking -------------------------------------------------------------------------------


@pytest.fixture
def prompts(monkeypatch):
    """The ids of the prompts that are answered, as they come."""
    seen, answer = [], eval_model.answer
    monkeypatch.setattr(eval_model, "answer", lambda loaded, ids, *rest: seen.append(ids) or answer(loaded, ids, *rest))
    return seen


@pytest.fixture
def thinker(out_dir, flags):
    """The flags to chat with weights that think."""
    return ["--checkpoint", str(out_dir / "thinker.pth"), "--temperature", "0", *flags]


def turns(*texts: str) -> list[dict]:
    """A conversation of user, assistant, user, …"""
    return [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(texts)]


@pytest.mark.parametrize("no_think", [False, True])
def test_one_prompt_with_and_without_thinking(thinker, prompts, capsys, tokenizer, no_think):
    """The opened <think> is part of the answer; the empty thought of --no_think is not."""
    assert eval_model.main([*thinker, "--prompt", "你好", *["--no_think"] * no_think]) == 0
    shown = capsys.readouterr()
    assert shown.out == (PLAIN_REPLY if no_think else THOUGHT) + "\n"
    assert f"seed 42, thinking {'off' if no_think else 'on'}\n" in shown.err
    assert tokenizer.decode(prompts[0]) == "<s>user\n你好</s>\n<s>assistant\n" + (EMPTY if no_think else "<think>")
    assert prompts == [encode_chat(tokenizer, turns("你好"), True, thinking=not no_think)[0]]


def test_thinking_is_switched_inside_a_conversation(monkeypatch, capsys, thinker, prompts, tokenizer):
    """/think and /no_think decide how the next prompt ends. An earlier reply that thought stands as an empty thought
    and the plain answer, one that did not behind an empty thought: the same, whatever is switched on."""
    assert chat(monkeypatch, "一\n/no_think\n二\n /think \n三\n/help\n", *thinker) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{THOUGHT}\n{PLAIN_REPLY}\n{THOUGHT}\n"
    assert re.findall(r"^\[.*> .*$|^thinking .*$", shown.err, re.MULTILINE) == [
        "[think] > 一", "thinking off", "[no think] > 二", "thinking on", "[think] > 三"]
    assert shown.err.count("/think and /no_think switch") == 2  # at the beginning and for /help
    asked = "<s>user\n{}</s>\n<s>assistant\n".format
    replied = f"{EMPTY}{PLAIN_REPLY}</s>\n"
    assert list(map(tokenizer.decode, prompts)) == [
        asked("一") + "<think>", asked("一") + replied + asked("二") + EMPTY,
        asked("一") + replied + asked("二") + replied + asked("三") + "<think>"]
    assert prompts == [encode_chat(tokenizer, turns(*texts), True, thinking)[0] for texts, thinking in [
        (["一"], True), (["一", THOUGHT, "二"], False), (["一", THOUGHT, "二", PLAIN_REPLY, "三"], True)]]


def test_no_think_holds_until_it_is_switched(monkeypatch, capsys, thinker, prompts, tokenizer):
    assert chat(monkeypatch, "一\n/no_think\n/clear\n二\n/think\n/clear\n三\n", *thinker, "--no_think") == 0
    assert capsys.readouterr().out == f"{PLAIN_REPLY}\n{PLAIN_REPLY}\n{THOUGHT}\n"
    assert prompts == [encode_chat(tokenizer, turns(text), True, thinking)[0]
                       for text, thinking in (("一", False), ("二", False), ("三", True))]


def test_a_thought_that_is_cut(monkeypatch, capsys, thinker, prompts, tokenizer):
    """Cut by --max_new_tokens, which does not count the opened <think>, or by Ctrl-C before the first token: what there
    is is shown, and in the history only an empty thought is left of it."""
    most = len(TextEncoder.of(tokenizer).encode(["嗯"])[0])
    chat(monkeypatch, "一\n二\n", *thinker, "--max_new_tokens", most)
    shown = capsys.readouterr()
    assert shown.out == "<think>嗯\n" * 2 and shown.err.count(f"[{most} tokens, ") == 2
    assert shown.err.count(f"stopped at --max_new_tokens {most}]") == 2
    cut = f"<s>user\n一</s>\n<s>assistant\n{EMPTY}</s>\n<s>user\n二</s>\n<s>assistant\n<think>"
    assert tokenizer.decode(prompts[1]) == cut

    def interrupted(*args):
        raise KeyboardInterrupt

    prompts.clear()
    monkeypatch.setattr(eval_model, "stream", interrupted)
    chat(monkeypatch, "一\n二\n", *thinker)
    shown = capsys.readouterr()
    assert shown.out == "<think>\n" * 2 and shown.err.count("[0 tokens, ") == 2
    assert tokenizer.decode(prompts[1]) == cut


@pytest.mark.parametrize("mode, stage", [(0, "pretrain"), (1, "SFT")])
def test_weights_that_do_not_think(monkeypatch, capsys, flags, prompts, mode, stage):
    """/think and /no_think are never sent to them; each is one note."""
    assert chat(monkeypatch, "/think\n /no_think\n/help\n你好\n", "--model_mode", mode, "--max_new_tokens", 30,
                *flags) == 0
    notes = capsys.readouterr().err.splitlines()
    assert len(prompts) == 1 and "> 你好" in notes
    reason = f"{stage} weights do not think: only distill's have learned to"
    assert [line for line in notes if "think" in line] == [f"/think: {reason}", f"/no_think: {reason}"]


class Terminal(io.StringIO):
    """Lines that are typed."""

    def isatty(self):
        return True


def test_a_terminal_shows_the_state_and_dims_the_thought(monkeypatch, capsys, thinker, flags):
    monkeypatch.setitem(sys.modules, "readline", None)  # as where Python has none
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdin", Terminal("一\n/no_think\n二\n"))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert eval_model.main(thinker) == 0
    shown = capsys.readouterr()
    assert shown.out == (f"[think] > {DIM}嗯{PLAIN}{PLAIN_REPLY}{PLAIN}\n[think] > [no think] > {PLAIN_REPLY}{PLAIN}\n"
                         "[no think] > ")
    assert "> 一" not in shown.err
    monkeypatch.setattr(sys, "stdin", Terminal("/think\n"))
    assert eval_model.main(["--model_mode", "1", *flags]) == 0
    assert capsys.readouterr().out == "> > "


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
