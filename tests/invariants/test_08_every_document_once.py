"""Invariant 8: every training document once per epoch, none of validation in training, each ends, all are counted."""

import json

import numpy as np
import pytest
from conftest import make_chats, make_texts, train, write_jsonl

from Config import UserError
from dataset import StepLoader, load_documents, load_splits
from text.chat import REPLY, encode_chat
from text.records import is_held_out, parse_record, text_hash
from text.sources import find_sources

EOS, BOS = 2, 1
KINDS = [("text", "pretrain", 512), ("chat", "sft", 1024), ("chat", "r1", 512)]


def load(data_dir, tokenizer, cache_dir, kind, file, max_seq_len):
    """All documents of one of data_dir's files."""
    return load_documents(str(data_dir / f"{file}.jsonl"), tokenizer, kind, str(cache_dir), max_seq_len)


def epoch_pieces(loader, epoch: int) -> list:
    """All pieces of an epoch in the order of their steps, checked against the steps' arrays: each buffer is the tokens
    of its pieces, and each target is the token after its position in the same document."""
    documents, pieces = loader.documents, []
    for number in range(loader.steps_in_epoch(epoch)):
        step = loader.step(epoch, number)
        assert 0 < step.tokens <= loader.step_tokens
        coming = iter(step.segments)
        for batch in step.micro_batches:
            position, predicting = 0, {}
            for length in batch.lengths:
                document, offset, piece_length = next(coming)
                assert length == piece_length
                ids = documents.tokens(document)
                assert np.array_equal(batch.tokens[position:position + length], ids[offset:offset + length])
                following = ids[offset + 1:offset + 1 + length]
                predicting |= {position + i: token for i, token in enumerate(following.tolist())}
                position += length
            assert position == len(batch.tokens)
            got = dict(zip(batch.target_index.tolist(), batch.targets.tolist(), strict=True))
            assert len(got) == len(batch.targets) and got.items() <= predicting.items()
            assert documents.caches[0].is_chat or len(got) == len(predicting)
        assert next(coming, None) is None
        pieces += step.segments
    return pieces


@pytest.mark.parametrize("order", ["shuffled", "file"])
@pytest.mark.parametrize("kind, file, max_seq_len", KINDS)
def test_once_per_epoch(data_dir, tokenizer, cache_dir, kind, file, max_seq_len, order):
    """Every document once in each epoch, whole: in text each token but the first once a target, cut at rows only; a
    conversation in one piece, its replies and their ends once targets."""
    documents = load(data_dir, tokenizer, cache_dir, kind, file, max_seq_len)
    for batch_size, accumulation in ((1, 1), (2, 3)):
        loader = StepLoader(documents, max_seq_len, batch_size, accumulation, seed=3, order=order)
        for epoch in range(3):
            pieces = epoch_pieces(loader, epoch)
            assert sum(length for _, _, length in pieces) == documents.length.sum()
            covered = [np.zeros(int(length), int) for length in documents.length]
            for document, offset, length in pieces:
                covered[document][offset:offset + length] += 1
                assert kind == "text" or (offset, length) == (0, documents.length[document])
            assert all((times == 1).all() for times in covered)
            n_targets = sum(len(batch.targets) for number in range(loader.steps_in_epoch(epoch))
                            for batch in loader.step(epoch, number).micro_batches)
            assert n_targets == documents.targets.sum()
            if kind == "text":
                assert n_targets == (documents.length - 1).sum()
                position = 0  # rows are full, and a document is cut nowhere but at a row's end
                for document, offset, length in pieces:
                    ends = offset + length == documents.length[document]
                    position += length
                    assert ends or position % max_seq_len == 0


@pytest.mark.parametrize("kind, file, max_seq_len", KINDS)
def test_each_begins_and_ends(data_dir, tokenizer, cache_dir, kind, file, max_seq_len):
    """Each document begins with <s>; text ends with </s>, a conversation with the reply's </s> and its newline, also
    where last turns were lost."""
    documents = load(data_dir, tokenizer, cache_dir, kind, file, max_seq_len)
    if file == "sft":
        shorter = load(data_dir, tokenizer, cache_dir, kind, file, 300)
        assert shorter.counts[0]["lost last turns"] > 5 and shorter.length.max() <= 300
        cases = [documents, shorter]
    else:
        cases = [documents]
    lines = (data_dir / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
    newline = tokenizer.backend_tokenizer.encode("\n").ids
    for documents in cases:
        assert len(documents) > 50
        for document in range(len(documents)):
            ids = documents.tokens(document).tolist()
            assert ids[0] == BOS
            if kind == "text":
                assert ids[-1] == EOS and ids.count(EOS) == ids.count(BOS) == 1
                continue
            assert ids[-2:] == [EOS, *newline]
            line = documents.caches[0].documents["line"][documents.index[document]]
            messages = json.loads(lines[line - 1])["conversations"]
            kept = messages[:ids.count(EOS)]  # whole turns of it
            assert kept[-1]["role"] == "assistant" and encode_chat(tokenizer, kept)[0] == ids


def test_order(data_dir, tokenizer, cache_dir):
    """The order differs by epoch and by seed; --order file keeps the file's."""
    text = load(data_dir, tokenizer, cache_dir, "text", "pretrain", 512)
    chat = load(data_dir, tokenizer, cache_dir, "chat", "sft", 1024)
    for documents in (text, chat):
        def order(epoch, seed=1, documents=documents, **options):
            loader = StepLoader(documents, 1024, 4, 1, seed, **options)
            return [piece[0] for piece in epoch_pieces(loader, epoch)]

        orders = [order(0), order(1), order(2), order(0, seed=2), order(0, order="file")]
        assert len({tuple(o) for o in orders}) == 5
        assert order(1) == orders[1]  # and the same again
        assert order(0, order="file") == order(1, order="file") == order(0, seed=2, order="file")
    in_file = [piece[0] for piece in epoch_pieces(StepLoader(text, 512, 4, 1, 0, order="file"), 1)]
    assert in_file == sorted(in_file)
    # a conversation may wait for a step with room, but comes in the file's order as far as it fits
    loader = StepLoader(chat, 1024, 4, 1, 0, order="file")
    steps = [{piece[0] for piece in loader.step(0, n).segments} for n in range(loader.steps_in_epoch(0))]
    waiting = set(range(len(chat)))
    for chosen in steps:
        assert min(waiting) in chosen  # the first that waits is never passed over
        ahead = [d for d in waiting - chosen if d < max(chosen)]
        room = loader.step_tokens - int(chat.length[sorted(chosen)].sum())
        assert all(chat.length[d] > room for d in ahead)
        waiting -= chosen


@pytest.mark.parametrize("kind, file, max_seq_len", KINDS)
def test_a_step_by_its_number(data_dir, tokenizer, cache_dir, kind, file, max_seq_len):
    """Asked for (epoch, step) out of the blue, a new loader gives what one that went through all steps gives."""
    documents = load(data_dir, tokenizer, cache_dir, kind, file, max_seq_len)
    through = StepLoader(documents, max_seq_len, 1, 2, seed=5)
    steps = {(epoch, n): through.step(epoch, n) for epoch in range(3) for n in range(through.steps_in_epoch(epoch))}
    for place in [(1, 3), (0, 0), (2, through.steps_in_epoch(2) - 1), (1, 0)]:
        step = StepLoader(documents, max_seq_len, 1, 2, seed=5).step(*place)
        assert step.segments == steps[place].segments and step.total_weight == steps[place].total_weight
        for a, b in zip(step.micro_batches, steps[place].micro_batches, strict=True):
            assert a.lengths == b.lengths and all(
                np.array_equal(getattr(a, name), getattr(b, name))
                for name in ("tokens", "target_index", "targets", "weights"))


@pytest.mark.parametrize("kind, file, max_seq_len, min_tokens, max_tokens, cut, share", [
    ("text", "pretrain", 512, 0, None, (84, 2), 0.995), ("text", "pretrain", 512, 0, None, (8, 1), 0.995),
    ("chat", "sft", 512, 0, 512, (84, 2), 0.97), ("chat", "sft", 512, 0, 512, (8, 1), 0.97),
    ("chat", "sft", 1024, 513, 1024, (21, 8), 0.97), ("chat", "sft", 1024, 513, 1024, (4, 1), 0.92),
    ("chat", "r1", 1024, 0, None, (21, 8), 0.97), ("chat", "r1", 1024, 0, None, (4, 1), 0.97),
])
def test_steps_are_full(data_dir, tokenizer, cache_dir, kind, file, max_seq_len, min_tokens, max_tokens, cut, share):
    """With the stages' own batch sizes and enough documents for fifty steps, the steps' buffers are full (of small ones
    of a few long conversations a little less so); and no micro-batch is larger than its share by a document."""
    path = str(data_dir / f"{file}.jsonl")
    documents = load_documents(path, tokenizer, kind, str(cache_dir), max_seq_len, min_tokens, max_tokens)
    copies = 1 + (250 if kind == "text" else 50) * cut[0] * cut[1] * max_seq_len // int(documents.length.sum())
    loader = StepLoader(documents.take(np.tile(np.arange(len(documents)), copies)), max_seq_len, *cut, seed=1)
    steps = loader.steps_in_epoch(0)
    assert loader.tokens_per_epoch / (steps * loader.step_tokens) >= share
    batches = loader.step(0, steps // 2).micro_batches
    assert len(batches) == cut[1]
    assert max(len(b.tokens) for b in batches) < cut[0] * max_seq_len + (max_seq_len if kind == "chat" else 1)


# ---------------------------------------------------------------------------------------------
# validation


def split(file, tokenizer, folder, say):
    """Training and validation documents of a text file."""
    return load_splits(find_sources([str(file)]), None, tokenizer, "text", str(folder / "c"), 64, say=say)


def texts_of(documents) -> set[int]:
    """The text hashes of some documents."""
    return set(documents.hash.tolist())


def test_validation_by_hash(tokenizer, tmp_path):
    """Without --val_path 0.5 % validate, by the hash of their text: both copies of a double on one side, whatever their
    weight or other keys, and doubles in validation scored once."""
    records = make_texts(9, 1200, longest=40)
    doubles = [record for record in records if is_held_out(text_hash(record))][:2] + records[:50]
    records += [record | {"weight": 0.25, "note": "again"} for record in doubles]
    file = write_jsonl(tmp_path / "data.jsonl", records)
    said = []
    training, validation = split(file, tokenizer, tmp_path, say=said.append)
    assert 2 <= len(validation) <= 14  # of 1,200 about 6
    assert not texts_of(training) & texts_of(validation)
    assert len(texts_of(validation)) == len(validation)
    assert all(is_held_out(h) for h in texts_of(validation)) and not any(is_held_out(h) for h in texts_of(training))
    held_out = sum(bool(is_held_out(text_hash(record))) for record in records)
    assert len(training) == 1252 - held_out and held_out - len(validation) >= 2
    assert training.counts[0]["doubles in validation"] == held_out - len(validation)
    assert f"{held_out - len(validation)} doubles in validation" in said[-2]


def test_at_least_one_validates(tokenizer, tmp_path):
    """Of few documents one validates, with its double; of a single text nothing is left to train on."""
    records = [r for r in make_texts(10, 30, longest=40) if not is_held_out(text_hash(r))][:5]
    lowest = min(records, key=text_hash)
    file = write_jsonl(tmp_path / "few.jsonl", [*records, lowest])
    training, validation = split(file, tokenizer, tmp_path, say=lambda _: None)
    assert len(validation) == 1 and texts_of(validation) == {text_hash(lowest)}
    assert texts_of(training) == {text_hash(r) for r in records} - {text_hash(lowest)}
    file = write_jsonl(tmp_path / "one.jsonl", [lowest, lowest])
    with pytest.raises(UserError, match="nothing is left to train on"):
        split(file, tokenizer, tmp_path, say=lambda _: None)


def test_val_path_overlap(tokenizer, tmp_path):
    """With --val_path, what is in it is taken out of training and counted; nothing else is held out."""
    records = make_chats(11, 60)
    data = write_jsonl(tmp_path / "data.jsonl", records)
    other = [{"conversations": r["conversations"], "weight": 2.0, "text": "else"} for r in records[10:14]]
    val = write_jsonl(tmp_path / "val.jsonl", [*other, other[0], *make_chats(12, 3)])
    said = []
    training, validation = load_splits(find_sources([str(data)]), [str(val)], tokenizer, "chat", str(tmp_path / "c"),
                                       1024, say=said.append)
    assert len(training) == 56 and len(validation) == 7 and not texts_of(training) & texts_of(validation)
    assert training.counts[0]["also in the validation data"] == 4 and validation.counts[0]["doubles in validation"] == 1
    assert "4 also in the validation data" in said[-2] and "56 train" in said[-2] and "7 documents" in said[-1]
    assert any(str(val) in line and "8 lines" in line for line in said)


# ---------------------------------------------------------------------------------------------
# what is left out is counted


def test_text_is_counted(tokenizer, tmp_path):
    """Text: malformed, empty and weightless lines, each by its number; nothing for its length."""
    texts = [{"text": "好" * 2000}, {"text": ""}, {"text": "a", "weight": 0}, {"text": " "}, {"text": "b"}]
    file = write_jsonl(tmp_path / "t.jsonl", texts)
    with open(file, "a", encoding="utf-8") as stream:
        stream.write('\n\n{"text": 5}\nnot json\n')
    said = []
    documents = load_documents(str(file), tokenizer, "text", str(tmp_path / "c"), 64, max_bad_ratio=0.5,
                               say=said.append)
    assert documents.counts[0] == {"lines": 7, "malformed": 2, "empty": 2, "weight 0": 1}
    assert len(documents) == 2 and documents.length.max() > 1000
    assert f"{file}:8" in said[0] and f"{file}:9" in said[1]
    with pytest.raises(UserError, match="2 of 7 lines are malformed.*max_bad_ratio 0.25.*:8: "):
        load_documents(str(file), tokenizer, "text", str(tmp_path / "c"), 64, max_bad_ratio=0.25, say=said.append)


def test_chats_are_counted(tokenizer, tmp_path):
    """Conversations: what is too short, too long, without a reply, without room for one, cut, weightless, empty."""
    def turn(question, answer):
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    long = "1" * 100  # a digit is a token
    records = {
        "kept": turn("1" * 20, "2"), "cut once": turn("1" * 20, "2") + turn("3", long),
        "cut twice": turn("1" * 20, "2") + turn("3", long) + turn("4", "5"),
        "no room": turn("1" * 20, long), "no room for the question": turn(long, "2"),
        "no reply": [{"role": "user", "content": "1" * 30}], "empty": [], "short": turn("1", "2"),
        "empty reply": turn("1" * 20, ""), "question after": turn("1" * 20, "2") + [{"role": "user", "content": "?"}],
        "long": turn("1" * 20, "2") * 8,
    }
    lines = [{"conversations": record} for record in records.values()]
    lines.append({"conversations": turn("1" * 20, "2"), "weight": 0})
    file = write_jsonl(tmp_path / "chat.jsonl", lines)
    at_least = len(encode_chat(tokenizer, records["short"])[0]) + 1
    documents = load_documents(str(file), tokenizer, "chat", str(tmp_path / "c"), 64, at_least, 200)
    assert documents.counts[0] == {
        "lines": 12, "malformed": 0, "empty": 1, "left out for an empty reply": 1, "lost last turns": 2,
        "lost a last turn without reply": 1, "fewer than min_tokens": 1,
        "more than max_tokens": 1, "no assistant turn": 1, "first reply does not fit": 2, "weight 0": 1}
    numbers = documents.caches[0].documents["line"][documents.index].tolist()
    assert [list(records)[n - 1] for n in numbers] == ["kept", "cut once", "cut twice", "question after"]
    kept = encode_chat(tokenizer, records["kept"])[0]
    for document in range(4):
        assert documents.tokens(document).tolist() == kept  # whole turns are lost, and questions without a reply
        assert documents.targets[document] == 2 and documents.bytes[document] == 1


def test_lengths_choose_the_stage(data_dir, tokenizer, cache_dir):
    """Of one file, SFT's 0-512 and SFT_long's 513-1,024 tokens take each conversation once, by its whole length."""
    path = (str(data_dir / "sft.jsonl"), tokenizer, "chat", str(cache_dir))
    short = load_documents(*path, 512, 0, 512)
    long = load_documents(*path, 1024, 513, 1024)
    assert len(short) > 50 and len(long) > 30 and short.length.max() <= 512 < long.length.min()
    assert len(short) + len(long) == 150 and not set(short.index) & set(long.index)
    lengths = {number: len(encode_chat(tokenizer, parse_record(line, "chat")["conversations"])[0])
               for number, line in enumerate((data_dir / "sft.jsonl").read_bytes().splitlines())}
    assert sorted(short.index) == [n for n, length in lengths.items() if length <= 512]


def test_a_stage_prints_the_counts(tokenizer_dir, tmp_path, capsys):
    """The account of all lines is on the console and in the log of a run, and the epoch's tokens are trained on."""
    records = [*make_texts(13, 20, longest=60), {"text": ""}, {"text": "x", "weight": 0}]
    file = write_jsonl(tmp_path / "t.jsonl", records)
    rows = train("pretrain", file, tokenizer_dir, tmp_path / "out", preset="nano", batch_size=2, accumulation_steps=1,
                 max_seq_len=64, epochs=2)
    line = "22 lines, 0 malformed, 1 empty, 1 weight 0; 19 train"
    printed = capsys.readouterr().out
    assert line in printed and line in (tmp_path / "out" / "log" / "pretrain.log").read_text(encoding="utf-8")
    per_epoch = int(printed.split("19 train (")[1].split(" tokens")[0].replace(",", ""))
    assert rows[-1]["tokens"] == 2 * per_epoch and rows[-1]["epoch"] == 2
    assert "no padding tokens" in printed and "target share" in printed


def test_kinds_cover_every_target(data_dir, tokenizer, cache_dir):
    """The number of targets a document is said to have is what its kinds say, cut or not."""
    documents = load(data_dir, tokenizer, cache_dir, "chat", "sft", 300)
    for document in range(len(documents)):
        assert (documents.types(document) >= REPLY).sum() == documents.targets[document] > 0
