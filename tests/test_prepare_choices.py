"""prepare_data.py's choices: scores of quality, --keep, --sort_by, --weight_by, --balance; each recomputed here."""

import contextlib
import functools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, paragraph, train, write_jsonl

from common.weights import save_weights
from Config import LLMConfig, UserError
from model import WeakWater
from prepare.step import Options
from prepare.steps import STEPS
from text.tokenizer import TextEncoder, tokenizer_files

extra = pytest.mark.extra
TOKENS, BANDS = 128, 20
NAMES = tuple(step.name for step in STEPS)
# GPT-2's characters for bytes, by value: those that can be seen stand for themselves
SEEN = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_OF = {chr(value): value for value in SEEN} | {
    chr(256 + place): value for place, value in enumerate(value for value in range(256) if value not in SEEN)}


@pytest.fixture(autouse=True, scope="module")
def threads():
    """Scoring sets torch to one thread."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def quality():
    pytest.importorskip("datatrove")
    import prepare.quality

    return prepare.quality


@pytest.fixture(scope="module")
def arrange():
    pytest.importorskip("datatrove")
    import prepare.arrange

    return prepare.arrange


def make_weights(path: Path, tokenizer, seed: int, meta: dict | None = None, **config) -> Path:
    """A nano model with random weights, large enough that its predictions differ, saved as a stage saves it."""
    torch.manual_seed(seed)
    encoder = TextEncoder.of(tokenizer)
    config = LLMConfig.preset("nano").to_dict() | {"vocab_size": encoder.vocab_size} | config
    model = WeakWater(LLMConfig.from_dict(config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    own = {"tokenizer": tokenizer_files(tokenizer), "tokenizer_sha256": encoder.fingerprint}
    save_weights(path, model, meta or own)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory, tokenizer) -> Path:
    return make_weights(tmp_path_factory.mktemp("weights") / "nano.pth", tokenizer, seed=1)


@functools.cache
def load_plainly(weights: Path, tokenizer_dir: Path):
    """(model in float64, tokenizer without added tokens, the id of <s>, the token of each id)."""
    from tokenizers import Tokenizer

    content = torch.load(weights, weights_only=True)
    model = WeakWater(LLMConfig.from_dict(content["config"]))
    model.load_state_dict(content["model"])
    state = json.loads((tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))
    names = {number: name for name, number in state["model"]["vocab"].items()}
    bos = next(token["id"] for token in state["added_tokens"] if token["content"] == "<s>")
    return model.double().eval(), Tokenizer.from_str(json.dumps(state | {"added_tokens": []})), bos, names


def bits_per_byte(weights: Path, tokenizer_dir: Path, text: str, n_tokens: int = TOKENS) -> float:
    """By the definition: one text, token by token, in float64."""
    model, tokenizer, bos, names = load_plainly(weights, tokenizer_dir)
    ids = tokenizer.encode(text, add_special_tokens=False).ids[:n_tokens]
    read = bytes(BYTE_OF[character] for token in ids for character in names[token])
    assert text.encode().startswith(read) and (len(ids) == n_tokens or text.encode() == read)
    with torch.no_grad():
        log_p = model(torch.tensor([[bos, *ids[:-1]]]))[0].log_softmax(dim=-1)
    return -sum(log_p[place, token].item() for place, token in enumerate(ids)) / math.log(2) / len(read)


def mean_ranks(values) -> list[float]:
    """How many values are smaller, and half of the others that are equal, by all others."""
    values = list(values)
    return [(sum(other < value for other in values) + (values.count(value) - 1) / 2) / max(1, len(values) - 1)
            for value in values]


# ---------------------------------------------------------------------------------------------
# bits per byte


def odd_texts() -> list[str]:
    """Texts of one character and of 9,000, in several languages, with control strings; more than one batch."""
    rng = random.Random(3)
    hanzi = "".join(chr(rng.randrange(0x4E00, 0x9FA0)) for _ in range(9000))
    texts = ["水", "。", "a", "\n", "🌊", "水比石头弱。", "小明在学校看见了苹果，共3个。", "The cat sat on the mat.",
             "x = 3\nif x > 1:\n    x -= 1\n", "他写下<s>和</s>，又写<think>。", "天地玄黄，" * 400, hanzi,
             paragraph(rng, 1000), paragraph(rng, 9000), "\u3000\u3000段首", "é ü ж"]
    texts += [hanzi[place:place + rng.randint(1, 300)] for place in range(0, 400, 10)]
    rng.shuffle(texts)
    return texts


def test_bits_per_byte_by_brute_force(quality, weights, tokenizer_dir):
    texts = odd_texts()
    assert len(texts) > 3 * quality.SCORE_BATCH and max(map(len, texts)) > quality.SCORE_CHARS
    found = quality.BitsPerByte(str(weights)).of(texts)
    wanted = [bits_per_byte(weights, tokenizer_dir, text) for text in texts]
    assert found == pytest.approx(wanted, rel=1e-4)
    assert max(wanted) > 1.2 * min(wanted)


def test_a_model_of_few_tokens_is_asked_for_as_many(quality, tokenizer, tokenizer_dir, tmp_path):
    weights = make_weights(tmp_path / "short.pth", tokenizer, seed=2, max_seq_len=16)
    texts = ["水", "小明在学校看见了苹果，共3个。" * 5]
    wanted = [bits_per_byte(weights, tokenizer_dir, text, 16) for text in texts]
    assert quality.BitsPerByte(str(weights)).of(texts) == pytest.approx(wanted, rel=1e-4)


def test_the_bytes_of_its_tokens_are_those_of_a_text(quality, weights):
    scorer, texts = quality.BitsPerByte(str(weights)), odd_texts()
    for text, ids in zip(texts, scorer.encoder.encode(texts), strict=True):
        assert sum(scorer.size[token] for token in ids) == len(text.encode()), text[:20]


def test_weights_that_cannot_score_are_refused(quality, tokenizer, weights, tmp_path):
    state = json.loads(tokenizer_files(tokenizer)["tokenizer.json"])
    vocabulary = {name: number for name, number in state["model"]["vocab"].items() if name != "ÿ"}
    for number, change in enumerate(({"decoder": None}, {"model": state["model"] | {"vocab": vocabulary}})):
        files = tokenizer_files(tokenizer) | {"tokenizer.json": json.dumps(state | change)}
        path = make_weights(tmp_path / f"{number}.pth", tokenizer, 1, {"tokenizer": files})
        with pytest.raises(UserError, match="is not one of bytes"):
            quality.fingerprint(str(path))
    content = torch.load(weights, weights_only=True)
    content["model"]["model.norm.weight"] = torch.full_like(content["model"]["model.norm.weight"], 3e38)
    content["meta"] = {key: value for key, value in content["meta"].items() if key != "weights_sha256"}
    torch.save(content, tmp_path / "overflow.pth")
    with pytest.raises(UserError, match="computes NaN"):
        quality.BitsPerByte(str(tmp_path / "overflow.pth")).of(["水比石头弱。"])


# ---------------------------------------------------------------------------------------------
# what is good


class FakeCorpus:
    """Documents that all stay, in one shard, as LearnGood sees them."""

    def __init__(self, texts: list[str]):
        from prepare.pipeline import META, TEXT

        self.starts, self.tasks = np.array([0, len(texts)]), [0]
        self.meta = lambda shard: np.array([(0, 0, TEXT, 0, (0, 0), 0)] * len(texts), META)
        self.record = lambda number: {"text": texts[number]}


@extra
@pytest.mark.parametrize("n_good, n_rest, n_shared, message", [
    (99, 300, 0, "--good: 99 texts in --good are too few to learn from, at least 100 are needed"),
    (150, 99, 0, "--good: 99 texts in --data_path, besides those of --good, are too few"),
    (150, 50, 150, "--good: 50 texts in --data_path, besides those of --good, are too few"), (150, 100, 150, None)])
def test_good_is_learned_from_a_hundred_texts_of_each_side(quality, tmp_path, n_good, n_rest, n_shared, message):
    """A text of both sides is a good one, also where white space and punctuation differ."""
    pytest.importorskip("sklearn")
    from prepare.inputs import find_raw_files

    rng = random.Random(4)
    good, rest = ([make_text(rng, kind, 60) for _ in range(n)] for kind, n in ((0, n_good), (1, n_rest)))
    write_jsonl(tmp_path / "good.jsonl", [{"text": text} for text in good * 2])
    files = find_raw_files([str(tmp_path / "good.jsonl")], "--good")[0]
    corpus = FakeCorpus(rest + [text.replace("，", " , ") for text in good[:n_shared]])
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        quality.LearnGood(tmp_path, corpus, files, Options(skip=NAMES)).run(None)
        learned = json.loads((tmp_path / "good" / "good.json").read_text(encoding="utf-8"))
        assert learned == {"good": n_good, "rest": n_rest, "auc": 1.0}


# ---------------------------------------------------------------------------------------------
# places, weights, shares, bands


@pytest.mark.parametrize("values", [
    [5.0], [2.0, 2.0, 2.0], [3.0, 1.0, 2.0], [1.0, 2.0, 2.0, 3.0, 3.0, 3.0], [-0.0, 0.0, 1.0],
    [math.inf, 1.0, math.inf], [random.Random(1).randint(0, 30) / 4 for _ in range(200)]])
def test_places_and_weights(quality, arrange, values):
    ranks = mean_ranks(values)
    assert quality.places(np.array(values)).tolist() == pytest.approx(ranks)
    weights = [arrange.weight_of(value, np.sort(values)) for value in values]
    if len(values) > 1:
        assert weights == pytest.approx([0.5 + rank for rank in ranks], abs=1e-4)
    assert 0.5 <= min(weights) and max(weights) <= 1.5 and sum(weights) / len(weights) == pytest.approx(1, abs=1e-4)


def test_shares_grow_with_the_square_root(arrange):
    shares = arrange.balanced_shares({3: (50, 400), 0: (20, 100), 1: (99, 900)})
    assert list(shares) == [(0,), (1,), (3,)]
    assert list(shares.values()) == pytest.approx([1 / 6, 3 / 6, 2 / 6])
    assert arrange.balanced_shares({}) == {}


def test_small_categories_share_a_file(arrange):
    """Those with fewer than 20 records or a thousandth of the bytes, and more until they are as many together."""
    large = {0: (500, 90_000), 1: (400, 9_000)}
    assert list(arrange.balanced_shares(large | {2: (19, 2_000), 3: (30, 99)})) == [(0,), (1,), (2, 3)]
    assert list(arrange.balanced_shares(large | {2: (1, 500), 3: (25, 700)})) == [(0,), (1,), (2, 3)]
    assert list(arrange.balanced_shares({0: (500, 900), 1: (1, 5)})) == [(0, 1)]
    assert list(arrange.balanced_shares({5: (3, 900)})) == [(5,)]


def test_bands(arrange):
    """Of as many records each where values differ, equal values in one, each group by itself."""
    rng = random.Random(2)
    values = rng.sample(range(10_000), 400)
    bands = arrange.bands_of(np.array(values), np.zeros(400)).tolist()
    assert {band: bands.count(band) for band in bands} == dict.fromkeys(range(BANDS), 20)
    assert [band for _, band in sorted(zip(values, bands, strict=True))] == sorted(bands)
    values = np.array([rng.randint(1, 50) for _ in range(300)])
    groups = np.array([rng.randint(0, 2) for _ in range(300)])
    bands = arrange.bands_of(values, groups)
    for group in range(3):
        mine = np.flatnonzero(groups == group)
        wanted = [min(BANDS - 1, int(rank * BANDS + 1e-9)) for rank in mean_ranks(values[mine].tolist())]
        assert bands[mine].tolist() == wanted


# ---------------------------------------------------------------------------------------------
# a small corpus, and runs on it

KINDS, N_TEXTS, N_CHATS = 3, 240, 60


def make_text(rng: random.Random, kind: int, n_chars: int) -> str:
    """Words of one kind, which no other kind has."""
    words = random.Random(f"words {kind}")
    words = ["".join(chr(words.randrange(0x4E00, 0x9FA0)) for _ in range(2)) for _ in range(60)]
    text = ""
    while len(text) < n_chars:
        text += "".join(rng.choices(words, k=rng.randint(3, 7))) + rng.choice("，，。！\n")
    return text.strip()


class Made:
    """The corpus: four files of documents, of which a kind in three is good, some with weights, one a copy and one a
    leak; chats of up to 1,024 tokens, some with thoughts; other good texts; weights. `argv` reads all of it."""

    def __init__(self, folder: Path, weights: Path, tokenizer_dir: Path):
        rng = random.Random(8)
        self.folder, self.tokenizer_dir = folder, tokenizer_dir
        self.weights, self.good = folder / "scorer.pth", folder / "good.jsonl"
        self.weights.write_bytes(weights.read_bytes())
        self.texts = [{"text": make_text(rng, number % KINDS, rng.randint(40, 400))} for number in range(N_TEXTS)]
        for record in self.texts[::7]:
            record["weight"] = 0.5
        leak, copy = {"text": make_text(rng, 0, 100)}, {"text": self.texts[5]["text"]}
        self.chats = []
        for number in range(N_CHATS):
            kind = number % 4 % KINDS  # half of them of one kind: its records do not end where those of a task do
            reply = make_text(rng, kind, rng.randint(5, 240))
            if number % 6 == 0:
                thought = make_text(rng, kind, rng.randint(5, 60))
                reply = f"<think>\n{thought}\n</think>\n<answer>\n{reply}\n</answer>"
            self.chats.append({"conversations": [{"role": "user", "content": make_text(rng, kind, 20)},
                                                 {"role": "assistant", "content": reply}]})
        files = [write_jsonl(folder / f"texts{part}.jsonl", self.texts[part::4] + [[leak], [copy], [], []][part])
                 for part in range(4)]
        files.append(write_jsonl(folder / "chats.jsonl", self.chats))
        self.good_texts = [make_text(rng, 0, 200) for _ in range(120)]
        write_jsonl(self.good, [{"text": text} for text in self.good_texts])
        write_jsonl(folder / "val.jsonl", [leak])
        self.argv = ["--data_path", *files, "--val_path", folder / "val.jsonl", "--tokenizer_path", tokenizer_dir,
                     "--task_mb", 1, "--mini_share", 0.5]
        self.scores = ["--score_with", self.weights, "--good", self.good, "--keep", 0.8]
        self.all = [*self.argv, *self.scores, "--categories", 3, "--balance", "category", "--sort_by", "length",
                    "--weight_by", "score"]


def prepare(*argv, workers: int = 1, charts: bool = False) -> None:
    """Run prepare_data.py in this process; without charts, which take a second."""
    import prepare_data

    handler = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.nullcontext() if charts else mock.patch("prepare.report._draw_charts"):
            assert prepare_data.main([*map(str, argv), "--workers", str(workers)]) == 0
    finally:
        signal.signal(signal.SIGTERM, handler)


def start(*argv) -> subprocess.Popen:
    """Start it in another."""
    return subprocess.Popen([sys.executable, ROOT / "prepare_data.py", *map(str, argv)], text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def read(folder: Path, name: str) -> list[dict]:
    """The records of the files with this name, in their order."""
    from text.records import read_lines

    return [json.loads(line) for file in sorted(folder.glob(name)) for _, line in read_lines(file)]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of an output; of the manifest, what is not of the run."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
             if path.is_file() and path.relative_to(folder).parts[0] not in (".prepare", "run.lock")}
    manifest = json.loads(files["manifest.json"])
    del manifest["run"]
    return files | {"manifest.json": json.dumps(manifest).encode()}


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)


def visible(record: dict) -> int:
    """Characters of a record but white space."""
    text = record.get("text") or "".join(message["content"] for message in record["conversations"])
    return len("".join(text.split()))


@pytest.fixture(scope="module")
def made(tmp_path_factory, weights, tokenizer_dir) -> Made:
    pytest.importorskip("datatrove")
    pytest.importorskip("sklearn")
    return Made(tmp_path_factory.mktemp("choices"), weights, tokenizer_dir)


@pytest.fixture(scope="module")
def scored(made) -> Path:
    """Both scores, the best 0.8, no order."""
    prepare(*made.argv, *made.scores, "--categories", 0, "--out_dir", made.folder / "scored")
    return made.folder / "scored"


@pytest.fixture(scope="module")
def by_length(made) -> Path:
    prepare(*made.argv, "--categories", 0, "--sort_by", "length", "--out_dir", made.folder / "by_length")
    return made.folder / "by_length"


@pytest.fixture(scope="module")
def everything(made) -> Path:
    """All flags at once, by two workers."""
    process = start(*made.all, "--out_dir", made.folder / "everything", "--workers", 2)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, (out, err)
    return made.folder / "everything"


# ---------------------------------------------------------------------------------------------
# scores, and what stays by them


@extra
def test_bpb_of_each_document(made, scored):
    documents = read(scored, "pretrain-*") + read(scored, "dropped/quality*")
    assert len(documents) == N_TEXTS
    for record in documents[::3]:
        wanted = bits_per_byte(made.weights, made.tokenizer_dir, record["text"])
        assert record["bpb"] == pytest.approx(wanted, abs=2e-4), record["id"]


def ngram_vectors(texts: list[str]):
    """Counts of runs of 1 to 3 characters, hashed to 2^18 columns, in rows of length 1."""
    from scipy.sparse import csr_matrix
    from sklearn.utils import murmurhash3_32

    rows, columns, values = [], [], []
    for row, text in enumerate(texts):
        text = " ".join(text.split())[:1000]
        grams = Counter(text[i:i + size] for size in (1, 2, 3) for i in range(len(text) - size + 1))
        counts = Counter()
        for gram, n in grams.items():
            counts[abs(murmurhash3_32(gram.encode(), 0)) % 2**18] += n
        length = math.sqrt(sum(n * n for n in counts.values()))
        rows += [row] * len(counts)
        columns += counts
        values += [n / length for n in counts.values()]
    return csr_matrix((values, (rows, columns)), shape=(len(texts), 2**18))


@extra
def test_good_of_each_document(made, scored):
    """The model is learned again, from all texts but the held-out tenth, which the hash of the text chooses."""
    from sklearn.linear_model import LogisticRegression

    from prepare.similarity import normalize, text_key

    documents = read(scored, "pretrain-*") + read(scored, "dropped/quality*")

    def in_order(texts) -> list[str]:
        return sorted(texts, key=lambda text: text_key("draw 42", str(text_key("good", normalize(text))[0]))[0])

    good, rest = in_order(made.good_texts), in_order(record["text"] for record in documents)
    held_out = np.arange(len(good) + len(rest)) % 10 == 0
    vectors, is_good = ngram_vectors(good + rest), np.arange(len(good) + len(rest)) < len(good)
    model = LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000)
    model.fit(vectors[~held_out], is_good[~held_out])
    wanted = model.decision_function(ngram_vectors([record["text"] for record in documents]))
    assert [record["good"] for record in documents] == pytest.approx(wanted, abs=0.02)
    assert max(wanted) - min(wanted) > 1
    scores = model.decision_function(vectors[held_out])
    pairs = [(a > b) + (a == b) / 2 for a in scores[is_good[held_out]] for b in scores[~is_good[held_out]]]
    learned = manifest_of(scored)["quality"]["learned"]
    assert (learned["good"], learned["rest"]) == (len(good), len(rest))
    assert learned["auc"] == pytest.approx(sum(pairs) / len(pairs), abs=0.01)
    kinds = {record["text"]: number % KINDS for number, record in enumerate(made.texts)}
    of_kind = [[record["good"] for record in documents if kinds[record["text"]] == kind] for kind in range(KINDS)]
    assert np.mean(of_kind[0]) > max(map(np.mean, of_kind[1:])) + 0.5


@extra
def test_the_best_by_mean_rank_stay(made, scored):
    kept, dropped = read(scored, "pretrain-*"), read(scored, "dropped/quality*")
    assert Counter(r["text"] for r in kept + dropped) == Counter(r["text"] for r in made.texts)
    both = kept + dropped
    ranks = [(a + b) / 2 for a, b in zip(mean_ranks(r["bpb"] for r in both), mean_ranks(-r["good"] for r in both),
                                         strict=True)]
    assert len(kept) == round(0.8 * N_TEXTS) and max(ranks[:len(kept)]) <= min(ranks[len(kept):])
    assert [record["place"] for record in dropped] == pytest.approx(ranks[len(kept):], abs=1e-4)
    assert {record["reason"] for record in dropped} == {"lower scores than those kept"}
    places = [(Path(record["id"]).name.split(":")[0], int(record["id"].rsplit(":", 1)[1])) for record in kept]
    assert places == sorted(places)
    own = {record["text"]: record.get("weight") for record in made.texts}
    assert all(record.get("weight") == own[record["text"]] for record in both)


@extra
def test_chats_are_untouched_and_the_account_adds_up(made, scored):
    chats = read(scored, "sft_512-*") + read(scored, "sft_1024-*") + read(scored, "r1_1024-*")
    assert all(read(scored, f"{name}-*") for name in ("sft_512", "sft_1024", "r1_1024"))
    assert sorted(json.dumps(chat["conversations"]) for chat in chats) == sorted(
        json.dumps(chat["conversations"]) for chat in made.chats)
    assert all(set(chat) == {"id", "source", "conversations"} for chat in chats)
    steps = {step["name"]: step for step in manifest_of(scored)["steps"]}
    assert steps["quality"]["in"] == {"text": N_TEXTS}
    assert steps["quality"]["dropped"] == {"text": N_TEXTS - round(0.8 * N_TEXTS)}
    for name in ("exact", "leak"):
        (record,) = read(scored, f"dropped/{name}*")
        assert not {"bpb", "good", "place"} & set(record)
    quality = manifest_of(scored)["quality"]
    assert (quality["scored"], quality["kept"]) == (N_TEXTS, round(0.8 * N_TEXTS))
    kept = [record["bpb"] for record in read(scored, "pretrain-*")]
    assert quality["bpb"]["kept"][::4] == pytest.approx([min(kept), max(kept)], abs=1e-4)
    assert f"{N_TEXTS - len(kept):,}" in (scored / "data_report.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------
# order and weights


def bands_in_order(values: list) -> list[list[int]]:
    """The places of the values in their list, by band; fails where a band begins before another has ended."""
    bands = [min(BANDS - 1, int(rank * BANDS + 1e-9)) for rank in mean_ranks(values)]
    assert bands == sorted(bands)
    return [[place for place, band in enumerate(bands) if band == number] for number in range(BANDS)]


@extra
def test_sorted_by_length(made, scored, by_length):
    written = read(by_length, "pretrain-*")
    lengths = [visible(record) for record in written]
    bands = bands_in_order(lengths)
    assert all(6 <= len(band) <= 18 for band in bands)
    assert any([lengths[i] for i in band] != sorted(lengths[i] for i in band) for band in bands)
    assert any([written[i]["id"] for i in band] != sorted(written[i]["id"] for i in band) for band in bands)
    unsorted = {r["id"]: r["text"] for r in read(scored, "pretrain-*") + read(scored, "dropped/quality*")}
    assert {record["id"]: record["text"] for record in written} == unsorted and len(written) == len(unsorted)
    assert not any({"bpb", "good", "category"} & set(record) for record in written)

    bands_in_order([visible(record) for record in read(by_length, "r1_1024-*")])  # replies that think by themselves
    chats = [visible(record) for name in ("sft_512", "sft_1024") for record in read(by_length, f"{name}-*")]
    n_short, ranks = len(read(by_length, "sft_512-*")), mean_ranks(chats)
    for part in (ranks[:n_short], ranks[n_short:]):
        bands = [min(BANDS - 1, int(rank * BANDS + 1e-9)) for rank in part]
        assert bands == sorted(bands) and len(set(bands)) > 2
    for name in ("sft_512", "sft_1024", "r1_1024"):
        assert sorted(map(str, read(by_length, f"{name}-*"))) == sorted(map(str, read(scored, f"{name}-*")))


@extra
def test_another_seed_shuffles_otherwise_inside_the_bands(made, by_length, tmp_path):
    prepare(*made.argv, "--categories", 0, "--sort_by", "length", "--seed", 7, "--out_dir", tmp_path / "data")
    one, other = ([record["id"] for record in read(folder, "pretrain-*")] for folder in (by_length, tmp_path / "data"))
    bands = bands_in_order([visible(record) for record in read(by_length, "pretrain-*")])
    assert all({one[i] for i in band} == {other[i] for i in band} for band in bands)
    assert sum([one[i] for i in band] != [other[i] for i in band] for band in bands) > BANDS / 2


@extra
def test_sorted_and_weighted_by_score(made, tmp_path, tokenizer):
    """And a stage reads the weights, and the order with --order file."""
    from dataset import load_documents

    out = tmp_path / "data"
    prepare(*made.argv, "--score_with", made.weights, "--categories", 0, "--sort_by", "score", "--weight_by", "score",
            "--out_dir", out)
    written = read(out, "pretrain-*")
    assert len(written) == N_TEXTS and not (out / "dropped" / "quality.jsonl.zst").exists()
    bands_in_order([record["bpb"] for record in written])
    own = {record["text"]: record.get("weight", 1) for record in made.texts}
    shares = [record["weight"] / own[record["text"]] for record in written]
    ranks = mean_ranks(record["bpb"] for record in written)
    assert shares == pytest.approx([0.5 + rank for rank in ranks], abs=3e-4)
    assert sum(shares) / len(shares) == pytest.approx(1, abs=1e-3)
    assert (min(shares), max(shares)) == pytest.approx((0.5, 1.5), abs=3e-4)
    assert all("weight" not in record for record in read(out, "sft_512-*"))

    documents = load_documents(str(out / "pretrain-*"), tokenizer, "text", str(tmp_path / "cache"), 256, say=str)
    assert documents.weight.tolist() == pytest.approx([record["weight"] for record in written], abs=1e-6)
    encoded = [len(ids) + 2 for ids in TextEncoder.of(tokenizer).encode([record["text"] for record in written])]
    assert documents.length.tolist() == encoded
    rows = train("pretrain", out / "pretrain-*", made.tokenizer_dir, tmp_path / "out", preset="nano", order="file",
                 max_steps=2, batch_size=2, max_seq_len=128, cache_dir=tmp_path / "cache")
    assert rows[-1]["step"] == 2 and all(math.isfinite(row["loss"]) for row in rows)


# ---------------------------------------------------------------------------------------------
# balance, and all flags at once


@extra
def test_a_file_a_category_and_shares(made, scored, everything, tmp_path, monkeypatch):
    kept = {}
    for name in ("pretrain", "sft_512", "sft_1024", "r1_1024"):
        sizes = defaultdict(int)
        for file in sorted(everything.glob(f"{name}-*")):
            records = read(everything, file.name)
            source, here = file.name.removesuffix("-00000.jsonl.zst"), {record["category"] for record in records}
            assert source in (f"{name}-rest", f"{name}-c{min(here):03d}") and source.endswith("rest") == (len(here) > 1)
            bands = bands_in_order([visible(record) for record in records]) if (
                name in ("pretrain", "r1_1024") and len(here) == 1) else []
            assert sum(map(len, bands)) in (0, len(records))
            assert len(here) == 1 and len(records) >= 20 or source.endswith("rest") or len(list(everything.glob(
                f"{name}-*"))) == 1
            for record in records:
                text = record.get("text") or "\n".join(message["content"] for message in record["conversations"])
                sizes[source] += len(text.encode())
                kept[record["id"]] = record
        lines = (everything / "shares" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        shares = {source: float(share) for source, _, share in (line.partition("=") for line in lines)}
        total = sum(math.sqrt(size) for size in sizes.values())
        assert shares == pytest.approx({source: math.sqrt(size) / total for source, size in sizes.items()}, abs=1e-6)
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5) and (name != "pretrain" or len(shares) > 1)
    assert len(kept) == round(0.8 * N_TEXTS) + N_CHATS

    kinds = {record["text"]: number % KINDS for number, record in enumerate(made.texts)}
    together = Counter((kinds[r["text"]], r["category"]) for r in kept.values() if "text" in r)
    assert len(together) == KINDS and len({category for _, category in together}) == KINDS  # one category a kind

    sample, whole = read(everything, "sft_mini_512-*"), read(everything, "sft_512-*")
    assert len(whole) / 3 < len(sample) < len(whole) and all(record in whole for record in sample)
    assert {record["id"] for record in sample} == {record["id"] for record in read(scored, "sft_mini_512-*")}
    assert [file.name for file in everything.glob("sft_mini_512*")] == ["sft_mini_512-00000.jsonl.zst"]

    (tmp_path / "data").symlink_to(everything)
    monkeypatch.chdir(tmp_path)
    for stage, name in (("pretrain", "pretrain"), ("SFT", "sft_512")):
        sources = Path("data", "shares", f"{name}.txt").read_text(encoding="utf-8").split()
        more = {"preset": "nano"} if stage == "pretrain" else {"init_from": "out/pretrain.pth"}
        rows = train(stage, sources, made.tokenizer_dir, "out", max_steps=2, batch_size=2, max_seq_len=512,
                     order="file", **more)
        assert rows[-1]["step"] == 2


@extra
def test_all_flags_together_drop_and_weigh_the_same(made, scored, everything):
    """As each alone: the same documents stay, with the same scores; weights are by those that stay."""
    alone = {record["id"]: record for record in read(scored, "pretrain-*")}
    together = {record["id"]: record for record in read(everything, "pretrain-*")}
    assert set(alone) == set(together)
    records = list(together.values())
    assert all(record[key] == alone[record["id"]][key] for record in records for key in ("bpb", "good", "text"))
    ranks = mean_ranks(record["bpb"] for record in records)
    wanted = [(0.5 + rank) * alone[record["id"]].get("weight", 1) for record, rank in zip(records, ranks, strict=True)]
    assert [record["weight"] for record in records] == pytest.approx(wanted, abs=2e-4)
    assert all(not {"bpb", "good", "weight"} & set(record) for record in read(everything, "sft_512-*"))


@extra
def test_one_worker_gives_the_same_bytes(made, everything, tmp_path):
    prepare(*made.all, "--out_dir", tmp_path / "data", workers=1, charts=True)
    assert contents(tmp_path / "data") == contents(everything)


@extra
def test_killed_while_it_scores_it_goes_on_to_the_same_bytes(made, everything, tokenizer, tmp_path):
    """And is refused with other weights or other good texts under the same names."""
    out = tmp_path / "data"
    process = start(*made.all, "--out_dir", out, "--workers", 1)
    done = out / ".prepare" / "phases" / "score" / "completions"
    while process.poll() is None and not (done.exists() and any(done.iterdir())):
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert 0 < len([*done.iterdir()]) < 5 and not (out / ".prepare" / "phases" / "keep").exists()

    whole = made.weights.read_bytes()
    make_weights(made.weights, tokenizer, seed=9)
    with pytest.raises(UserError, match="--score_with, --good: the files are not those"):
        prepare(*made.all, "--out_dir", out, "--resume")
    made.weights.write_bytes(whole)
    texts, stat = made.good.read_bytes(), made.good.stat()
    made.good.write_bytes(texts + texts.splitlines(keepends=True)[0])
    with pytest.raises(UserError, match="--score_with, --good: the files are not those"):
        prepare(*made.all, "--out_dir", out, "--resume")
    made.good.write_bytes(texts)
    os.utime(made.good, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(UserError, match="--keep: this run was begun with 0.8"):
        prepare(*made.all, "--keep", 0.7, "--out_dir", out, "--resume")

    prepare(*made.all, "--out_dir", out, "--resume", charts=True)
    assert contents(out) == contents(everything)


# ---------------------------------------------------------------------------------------------
# refused


@extra
@pytest.mark.parametrize("flags, message", [
    (["--keep", 0.8], "--keep 0.8 needs scores: --score_with WEIGHTS, --good FILE or both"),
    (["--keep", 1.5], "must be between 0 and 1"), (["--keep", "nan"], "must be between 0 and 1"),
    (["--sort_by", "score"], "--sort_by score needs --score_with"),
    (["--sort_by", "score", "--good", "GOOD"], "--sort_by score needs --score_with"),
    (["--weight_by", "score"], "--weight_by score needs --score_with"),
    (["--balance", "category", "--categories", 0], "--balance category needs --categories"),
    (["--score_with", "none.pth"], "none.pth: no such file (--score_with)"),
    (["--score_with", "GOOD"], "not a checkpoint"),
    (["--good", "none.jsonl"], "--good none.jsonl: no such file"),
    (["--good", "ALL"], "--good: 0 texts in --data_path, besides those of --good, are too few")])
def test_refused_in_one_line(made, tmp_path, capsys, flags, message):
    files = {"GOOD": made.good}
    if "ALL" in flags:
        files["ALL"] = write_jsonl(tmp_path / "all.jsonl", made.texts)
    flags = [files.get(flag, flag) for flag in flags]
    argv = [*made.argv, *([] if "--categories" in flags else ["--categories", 0]), "--out_dir", tmp_path / "data"]
    with pytest.raises((UserError, SystemExit)) as refused:
        prepare(*argv, *flags)
    is_parsed = isinstance(refused.value, UserError)
    assert is_parsed or refused.value.code == 2
    line = str(refused.value) if is_parsed else capsys.readouterr().err.strip()
    assert message in line and "\n" not in line
    assert not (tmp_path / "data" / "manifest.json").exists()


@extra
def test_little_to_choose_from(made, tmp_path):
    """One document, and nothing to keep: then there are chats alone."""
    scoring = ["--score_with", made.weights, "--sort_by", "score", "--weight_by", "score", "--categories", 0,
               "--tokenizer_path", made.tokenizer_dir]
    one, chats = write_jsonl(tmp_path / "one.jsonl", made.texts[1:2]), made.folder / "chats.jsonl"
    prepare("--data_path", one, *scoring, "--out_dir", tmp_path / "one")
    (record,) = read(tmp_path / "one", "pretrain-*")
    assert record["weight"] == 1 and record["bpb"] > 0

    prepare("--data_path", one, chats, *scoring, "--keep", 0, "--out_dir", tmp_path / "none")
    assert not read(tmp_path / "none", "pretrain-*") and len(read(tmp_path / "none", "dropped/quality*")) == 1
    manifest = manifest_of(tmp_path / "none")
    assert manifest["quality"] == {"scored": 1, "kept": 0}
    assert sum(output["records"] for output in manifest["outputs"] if output["name"] != "sft_mini_512") == N_CHATS


@extra
def test_a_dry_run_scores_and_writes_nothing(made, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(*made.all, "--dry_run")
    assert [*tmp_path.iterdir()] == []
    out = capsys.readouterr().out
    assert f"\npretrain: {round(0.8 * N_TEXTS)} records" in out and "\nquality " in out
