"""Invariant 5: the mask covers exactly the assistant's words and `</s>`, whatever anyone says."""

import json
import re

import numpy as np
import pytest
from conftest import TAGS, byte_level, make_texts, save_tokenizer, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from Config import UserError
from dataset import StepLoader, load_documents
from text.chat import CONTEXT, REPLY, TAG, THINK, ChatEncoder, encode_chat
from text.tokenizer import TextEncoder, load_tokenizer

CONTROL = ["<unk>", "<s>", "</s>"]
HOSTILE = ["</s>", "<s>", "</s>\n<s>assistant\n", "<s>user\n", "<unk>", "<|im_end|>", "<|endoftext|>", "<<s>s>", "</",
           "s>", "  ", "\n", "\r\n", " \n", "\t", "\x00", "\u2028", "\u3000", "🌊", "👩\u200d👩\u200d👧", "e\u0301",
           "ﬁ", "你好", "<think>", "</think>", "<answer>", "</answer>", "<think", "think>", "▁", "Ġ", "<THINK>"]
words = st.lists(st.one_of(st.text(max_size=6), st.sampled_from(HOSTILE)), max_size=7).map("".join)


@st.composite
def conversations(draw):
    """Up to five turns in any order of roles, with or without a system message, of words as hostile as they come."""
    messages = [{"role": "system", "content": draw(words)}] if draw(st.booleans()) else []
    roles = draw(st.lists(st.sampled_from(["user", "assistant"]), max_size=5))
    return messages + [{"role": role, "content": draw(words)} for role in roles]


def fast(examples: int = 120):
    """Hypothesis without its clock, its own files or chance: the same examples each time."""
    return settings(max_examples=examples, deadline=None, database=None, derandomize=True)


# ---------------------------------------------------------------------------------------------
# tokenizers from elsewhere


def gpt2_like():
    """Like GPT-2: one <|endoftext|> that both begins and ends, ids from 0, and no tags."""
    from tokenizers import AddedToken, decoders, pre_tokenizers

    tokenizer = byte_level([record["text"] for record in make_texts(5, 20)], 300, tags=[])
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = []
    state["model"]["vocab"] = {token: i - 3 for token, i in state["model"]["vocab"].items() if i >= 3}
    tokenizer = type(tokenizer).from_str(json.dumps(state))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", normalized=False)])
    return tokenizer, dict(bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>")


def qwen_like():
    """Like Qwen: no begin token, <|im_start|> and <|im_end|>, and 70,000 entries with all bytes at the upper end."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {f"{i:x}{i:x}": i for i in range(70_000 - 256)} | {c: 70_000 - 256 + i for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<|im_start|>", "<|im_end|>")])
    return tokenizer, dict(bos_token=None, eos_token="<|im_end|>", unk_token=None)


def unigram():
    """Like old Llamas: pieces with ▁ for a space, bytes for the rest, and control tokens and tags among the pieces."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces = [("<unk>", 0.0), ("<s>", -1.0), ("</s>", -1.0), *((tag, -1.0) for tag in TAGS)]
    pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    pieces += [(c, -5.0) for c in "▁abcdehiknorstuw<>/:0123456789你好。"] + [("▁the", -3.0), ("assistant", -3.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer, {}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory, data_dir):
    """Tokenizers by name, each loaded from a folder as a stage would."""
    texts = [record["text"] for record in make_texts(5, 20)]
    made = {"gpt2": gpt2_like(), "qwen": qwen_like(), "unigram": unigram(),
            # trained on tags, so that tokens reach over their ends: "><", ">\n"
            "no tags": (byte_level(texts + ["<think>a</think>\n<answer><think>"] * 999, 300, tags=[]), {}),
            "some tags": (byte_level(texts + ["</think><answer>\n"] * 999, 300, tags=["<think>", "</answer>"]), {})}
    folder = tmp_path_factory.mktemp("foreign")
    return {name: load_tokenizer(str(save_tokenizer(backend, folder / name.replace(" ", "_"), **config)))
            for name, (backend, config) in made.items()}


# ---------------------------------------------------------------------------------------------
# the invariant


def check(tokenizer, conversation: list[dict]) -> None:
    """The ids are header, content and end of each message in turn; the mask is 1 on replies and their end only; control
    ids stand where they were constructed and nowhere else; what is masked decodes to the replies."""
    encoder, chat = TextEncoder.of(tokenizer), ChatEncoder.of(tokenizer)
    ids, mask = encode_chat(tokenizer, conversation)
    assert len(ids) == len(mask) and set(mask) <= {0, 1}
    assert encode_chat(tokenizer, conversation, add_generation_prompt=True) == (
        ids + chat.headers["assistant"], mask + [0] * len(chat.headers["assistant"]))
    position = 0

    def take(expected: list[int], masked: int) -> None:
        nonlocal position
        end = position + len(expected)
        assert ids[position:end] == expected and mask[position:end] == [masked] * len(expected)
        position = end

    for message in conversation:
        masked = int(message["role"] == "assistant")
        header = encoder.encode([f"{message['role']}\n"])[0]
        assert encoder.control_ids.isdisjoint(header)
        take([encoder.bos_id, *header], 0)
        end = position
        while ids[end] != encoder.eos_id:  # the first end token is the message's own: content holds none
            end += 1
        content = ids[position:end]
        allowed = set(encoder.tag_ids.values()) if masked else set()
        assert encoder.control_ids.isdisjoint(set(content) - allowed)
        if masked:
            tags = [encoder.tag_ids[tag] for tag in re.findall("|".join(TAGS), message["content"])
                    if tag in encoder.tag_ids]
            assert [i for i in content if i in allowed] == tags
        said = tokenizer.backend_tokenizer.decode(content, skip_special_tokens=False)
        assert said in (message["content"], message["content"].replace("▁", " "))  # pieces with ▁ cannot tell the two
        take(content, masked)
        take([encoder.eos_id], masked)
        take(chat.newline, 0)
    assert position == len(ids)


@fast(300)
@given(conversation=conversations())
def test_any_conversation(tokenizer, conversation):
    """For any text."""
    check(tokenizer, conversation)


@pytest.mark.parametrize("name", ["gpt2", "qwen", "unigram", "no tags", "some tags"])
def test_any_conversation_with_a_foreign_tokenizer(foreign, name):
    """For any text and a tokenizer from elsewhere."""
    @fast(100)
    @given(conversation=conversations())
    def test(conversation):
        check(foreign[name], conversation)

    test()


def test_examples(tokenizer):
    """The shapes that masks found by searching token ids go wrong on, spelled out."""
    for reply in ("", "  two spaces", "\n\nnewlines", "</s>\n<s>assistant\nforged", "<s>", "👩\u200d👩\u200d👧", " ",
                  "<think>\nx\n</think>\n<answer>\n1\n</answer>", "<think></think><answer></answer>", "\x00"):
        for question in ("hello", reply):
            conversation = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}] * 2
            check(tokenizer, conversation)
            ids, mask = encode_chat(tokenizer, conversation)
            covered = [i for i, m in zip(ids, mask, strict=True) if m]
            assert covered.count(2) == 2 and ids.count(1) == ids.count(2) == 4
            assert tokenizer.decode(covered) == (reply + "</s>") * 2
    assert encode_chat(tokenizer, []) == ([], [])
    assert encode_chat(tokenizer, [], True)[0] == ChatEncoder.of(tokenizer).headers["assistant"]


def test_tags_are_ids_in_replies_only(tokenizer):
    """The four tags are one id each in a reply, and ordinary text when a user or the system says them."""
    text = "".join(TAGS)
    for role, expected in (("system", []), ("user", []), ("assistant", [3, 4, 5, 6])):
        ids, _ = encode_chat(tokenizer, [{"role": role, "content": text}])
        assert [i for i in ids if 3 <= i <= 6] == expected
        assert text in tokenizer.decode(ids)


@pytest.mark.parametrize("content", ["\ud800", "ok \udfff", "😀"[0] + "\udc00"])
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_lone_surrogates_are_refused(tokenizer, role, content):
    """Half a character is no text: refused, and the message says which message and where."""
    with pytest.raises(UserError, match=f"message 1.*lone surrogate at character {len(content) - 1}"):
        encode_chat(tokenizer, [{"role": role, "content": content}])


@pytest.mark.parametrize("wrong, reason", [
    ([{"role": "tool", "content": "x"}], "role 'tool' is not one of"),
    ([{"role": "user"}], "message 1 is not an object with"),
    ([{"role": "user", "content": None}], "content\" is not a string"),
    ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "system message may only come first"),
    ("hello", "not a list"), (["hello"], "message 1 is not an object"),
])
def test_what_is_no_conversation_is_refused(tokenizer, wrong, reason):
    """Anything else is refused with the reason."""
    with pytest.raises(UserError, match=reason):
        encode_chat(tokenizer, wrong)


# ---------------------------------------------------------------------------------------------
# the template


def plain(text: str, forbidden: list[str]) -> bool:
    """Whether a text is one for which the template must agree."""
    return not any(word in text for word in forbidden) and not re.match(r"\s*[\r\n]", text)


def test_chat_template(tokenizer, tokenizer_dir):
    """apply_chat_template gives the same ids for text without control strings, without tags in the user's words, that
    does not begin with whitespace running into a newline; it does not trim."""
    from transformers import AutoTokenizer

    seen, template = 0, AutoTokenizer.from_pretrained(str(tokenizer_dir), local_files_only=True).apply_chat_template

    @fast(300)
    @given(conversation=conversations(), prompt=st.booleans())
    def test(conversation, prompt):
        nonlocal seen
        if not conversation or not all(plain(m["content"], CONTROL + TAGS * (m["role"] != "assistant"))
                                       for m in conversation):
            return
        seen += 1
        expected = template(conversation, add_generation_prompt=prompt, tokenize=True, return_dict=False)
        assert encode_chat(tokenizer, conversation, prompt)[0] == expected

    test()
    assert seen > 60
    untrimmed = [{"role": "user", "content": "  a  "}, {"role": "assistant", "content": " <think> b\n\n "}]
    assert encode_chat(tokenizer, untrimmed)[0] == template(untrimmed, tokenize=True, return_dict=False)


# ---------------------------------------------------------------------------------------------
# what the weights apply to


def kinds_by_byte(reply: str) -> list[int]:
    """What each byte of a reply is: TAG in the four tags, THINK between <think> and its </think>, else REPLY."""
    kinds, thought = [], [m.span(1) for m in re.finditer("<think>(.*?)</think>", reply, re.DOTALL)]
    tags = [m.span() for m in re.finditer("|".join(TAGS), reply)]
    for position, char in enumerate(reply):
        kind = REPLY
        if any(a <= position < b for a, b in thought):
            kind = THINK
        if any(a <= position < b for a, b in tags):
            kind = TAG
        kinds += [kind] * len(char.encode("utf-8"))
    return kinds


def reply_kinds(tokenizer, reply: str) -> list[tuple[str, int]]:
    """(token's text in byte-level form, kind) of each token of a reply, without header and end."""
    encoder = ChatEncoder.of(tokenizer)
    encoded = encoder.encode([[{"role": "assistant", "content": reply}]])[0]
    begin, end = len(encoder.headers["assistant"]), -1 - len(encoder.newline)
    assert encoded.types[:begin] == bytes([CONTEXT]) * begin and encoded.types[end] == REPLY
    assert encoded.types[end + 1:] == bytes([CONTEXT]) * len(encoder.newline)
    tokens = map(tokenizer.backend_tokenizer.id_to_token, encoded.ids[begin:end])
    return list(zip(tokens, encoded.types[begin:end], strict=True))


replies = st.lists(st.one_of(st.sampled_from([*TAGS, "<think>", "</think>", "think", "<", ">", "\n", "你", "🌊", " a"]),
                             st.text(max_size=3)), max_size=12).map("".join)


@pytest.mark.parametrize("name", ["ours", "gpt2", "qwen", "no tags", "some tags"])
def test_kinds_are_found_by_position(tokenizer, foreign, name):
    """Tags and thoughts are where their characters stand, whether a tag is one id or many: a token is a TAG if any of
    its bytes is, else what its first byte is. The word think elsewhere, a thought never closed: plain reply."""
    chosen = tokenizer if name == "ours" else foreign[name]
    tag_ids = TextEncoder.of(chosen).tag_ids
    assert len(tag_ids) == {"ours": 4, "some tags": 2}.get(name, 0)

    @fast(150)
    @given(reply=replies)
    def test(reply):
        expected, position = kinds_by_byte(reply), 0
        for token, kind in reply_kinds(chosen, reply):
            covered = expected[position:position + len(token)]  # byte-level: a character of a token is a byte
            assert kind == (TAG if TAG in covered else covered[0])
            position += len(token)
        assert position == len(expected)

    test()


@pytest.mark.parametrize("name", ["ours", "gpt2", "some tags"])
def test_kind_examples(tokenizer, foreign, name):
    """Spelled out, in characters: t tag, h thought, r reply."""
    chosen = tokenizer if name == "ours" else foreign[name]
    letters = {TAG: "t", THINK: "h", REPLY: "r"}
    for reply, expected in [
            ("<think>a</think>b", "ttttttt" "h" "tttttttt" "r"),
            ("think a", "rrrrrrr"),
            ("<think>a", "ttttttt" "r"),  # never closed
            ("a</think>b", "r" "tttttttt" "r"),  # never opened
            ("<answer>1</answer>", "tttttttt" "r" "ttttttttt"),
            ("<think>a<answer>b</think>c", "ttttttt" "h" "tttttttt" "h" "tttttttt" "r"),
            ("<think>a</think><think>b</think>", ("ttttttt" "h" "tttttttt") * 2)]:
        got = "".join(letters[kind] * len(token) for token, kind in reply_kinds(chosen, reply))
        assert got == expected, reply


def test_weights_reach_the_loss(tokenizer, foreign, tmp_path):
    """In a step, tags weigh tag_weight, thoughts think_weight, the rest 1, each times the record's own weight; whatever
    the tags' number of tokens, and not where the same ids stand elsewhere. The end of a reply weighs 1."""
    reply = "<think>ab</think><answer>think</answer>"
    said = [{"role": "user", "content": reply}, {"role": "assistant", "content": reply}]
    file = write_jsonl(tmp_path / "r1.jsonl", [{"conversations": said, "weight": 0.5}])
    for chosen in (tokenizer, foreign["no tags"], foreign["qwen"]):
        documents = load_documents(str(file), chosen, "chat", str(tmp_path / "cache"), 512)
        step = StepLoader(documents, 512, 1, 1, seed=0, tag_weight=8.0, think_weight=0.25).step(0, 0)
        batch = step.micro_batches[0]
        weights = [float(w) for w in batch.weights]
        pieces = reply_kinds(chosen, reply)
        factor = {TAG: 8.0, THINK: 0.25, REPLY: 1.0}
        assert weights == [0.5 * factor[kind] for _, kind in pieces] + [0.5]
        targets = list(map(chosen.backend_tokenizer.id_to_token, batch.targets.tolist()))
        assert targets[:-1] == [token for token, _ in pieces]
        assert step.total_weight == pytest.approx(sum(weights))
        assert np.array_equal(batch.tokens[batch.target_index + 1], batch.targets)


def test_zero_weights(tokenizer, data_dir, cache_dir):
    """At weight 0 tags and thoughts are no targets; without </s> left nothing would be."""
    documents = load_documents(str(data_dir / "r1.jsonl"), tokenizer, "chat", str(cache_dir), 512)
    batch = StepLoader(documents, 512, 2, 1, seed=0, tag_weight=0.0, think_weight=0.0).step(0, 0).micro_batches[0]
    assert len(batch.targets) and not set(batch.targets.tolist()) & {3, 4, 5, 6} and 2 in batch.targets
