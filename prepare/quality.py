"""The phases that score documents, and choose which of them stay by it.

good    one task          a linear model of what the user calls good, against the rest
score   a task a shard    both scores of each document that is no duplicate and no leak
keep    one task          the best by their mean rank

bpb     bits per byte of a document's first 128 tokens by a model of this project, each token predicted from `<s>` and
        those before it: the nats of these tokens / ln 2 / their bytes. Less is better (CCNet, Wenzek et al. 2020,
        arXiv:1911.00359, filters by the perplexity of an n-gram model likewise).
good    log-odds that a document is one of --good rather than one of the rest, by logistic regression over its hashed
        character n-grams. More is better (as the filter of GPT-3, Brown et al. 2020, arXiv:2005.14165, appendix A).
"""

import hashlib
import json
import math
import shutil
from collections import deque
from pathlib import Path

import numpy as np

from common.files import write_whole
from Config import UserError
from prepare.duplicates import REMOVED, Corpus, staying
from prepare.inputs import RawFile, RawReader
from prepare.pipeline import TEXT, clean_text, content_of
from prepare.similarity import normalize, text_key
from prepare.step import Options
from prepare.work import WorkStep, load_json, numbered, save_array, save_json

SCORE_TOKENS = 128
SCORE_CHARS = 8192  # more than 128 tokens of any text
SCORE_BATCH = 16  # documents at once: their logits take 52 MB
DECIMALS = 4
GOOD_CHARS = 1000  # of a text, from its beginning: long and short texts are judged by as much
GOOD_MOST, GOOD_LEAST = 20_000, 100  # texts of each side
GOOD_NGRAMS, GOOD_FEATURES = (1, 3), 2**18
GOOD_HELD_OUT = 10  # every tenth text of each side tests the model
TEXTS_AT_ONCE = 256
# of each document that stays: NaN where it has no such score
SCORED = np.dtype([("number", "<u8"), ("bpb", "<f8"), ("good", "<f8")])

# ---------------------------------------------------------------------------------------------
# bits per byte


class BitsPerByte:
    """Scores texts by the weights in a file. Raises UserError where they cannot be loaded."""

    def __init__(self, checkpoint: str):
        import torch
        from tokenizers.pre_tokenizers import ByteLevel

        from common.weights import check_tokenizer_fits, load_model
        from text.tokenizer import TextEncoder, choose_tokenizer

        self.checkpoint = checkpoint
        torch.set_num_threads(1)
        self.model, meta = load_model(Path(checkpoint), hint="--score_with")
        tokenizer = choose_tokenizer(None, checkpoint, meta.get("tokenizer"), meta.get("tokenizer_sha256"))
        self.encoder = TextEncoder.of(tokenizer)
        check_tokenizer_fits(self.encoder, self.model, Path(checkpoint))
        decoder = json.dumps(json.loads(self.encoder.plain.to_str())["decoder"])
        if '"ByteLevel"' not in decoder or not set(ByteLevel.alphabet()) <= set(self.encoder.plain.get_vocab()):
            raise UserError(f"--score_with {checkpoint}: its tokenizer is not one of bytes, which are to be counted")
        self.size = [len(self.encoder.plain.id_to_token(token) or "") for token in range(self.encoder.vocab_size)]
        self.tokens = min(SCORE_TOKENS, self.model.config.max_seq_len)

    def of(self, texts: list[str]) -> list[float]:
        """Bits per byte of the beginning of each text; infinite where it has no token. Raises UserError where the model
        computes NaN."""
        ids = [found[:self.tokens] for found in self.encoder.encode([text[:SCORE_CHARS] for text in texts])]
        batches = (ids[begin:begin + SCORE_BATCH] for begin in range(0, len(ids), SCORE_BATCH))
        scores = [bits for batch in batches for bits in self._batch(batch)]
        if any(map(math.isnan, scores)):
            raise UserError(f"--score_with {self.checkpoint}: its model computes NaN: take other weights")
        return scores

    def _batch(self, ids: list[list[int]]) -> list[float]:
        import torch
        from torch.nn.functional import cross_entropy

        targets = torch.full((len(ids), max(1, *map(len, ids))), -100)  # what cross_entropy leaves out
        for row, found in enumerate(ids):
            targets[row, :len(found)] = torch.tensor(found)
        inputs = torch.cat([torch.full((len(ids), 1), self.encoder.bos_id), targets[:, :-1].clamp(min=0)], dim=1)
        with torch.inference_mode():
            logits_BTV = self.model(inputs)  # padding is at the end, which no earlier token sees
            nats_BT = cross_entropy(logits_BTV.transpose(1, 2).float(), targets, reduction="none")
        nats = nats_BT.double().sum(dim=1).tolist()
        n_bytes = [sum(self.size[token] for token in found) for found in ids]
        return [n / math.log(2) / size if size else math.inf for n, size in zip(nats, n_bytes, strict=True)]


# ---------------------------------------------------------------------------------------------
# like what the user calls good


def _vectorizer():
    try:
        from sklearn.feature_extraction.text import HashingVectorizer
    except ImportError:
        raise UserError("--good needs scikit-learn: pip install -r requirements-extra.txt") from None
    return HashingVectorizer(analyzer="char", ngram_range=GOOD_NGRAMS, n_features=GOOD_FEATURES, lowercase=False,
                             alternate_sign=False, dtype=np.float32)


def _opening(text: str) -> str:
    return " ".join(text[:2 * GOOD_CHARS].split())[:GOOD_CHARS]


def check_good(files: list[RawFile], rename_field) -> None:
    """Read the files of --good once, and print how many texts they hold and how many records are malformed. Raises
    UserError where there are too few."""
    readers = [RawReader(file, rename_field) for file in files]
    for reader in readers:
        deque(reader.read(), maxlen=0)
    records, malformed = (sum(getattr(reader, name) for reader in readers) for name in ("records", "malformed"))
    example = next((example for reader in readers for example in reader.examples), None)
    counted = f"--good: {records:,} texts" + (f", {malformed:,} malformed ({example})" if malformed else "")
    if records < GOOD_LEAST:
        raise UserError(f"{counted}: at least {GOOD_LEAST} are needed to learn from")
    print(counted, flush=True)


class LearnGood(WorkStep):
    """Learns to tell the texts of --good from the others. One task.

    Of each side at most GOOD_MOST texts, drawn by the hash of the text and the seed; every tenth of them is held out,
    to measure how often the model puts a good text before another (area under the ROC curve).
    """

    def __init__(self, folder: Path, corpus: Corpus, files: list[RawFile], options: Options):
        super().__init__(folder, "learn what is good")
        self.corpus, self.files, self.options, self.seed = corpus, files, options, options.seed

    def run(self, data, rank: int = 0, world_size: int = 1) -> None:
        """Writes good/weights.npy (GOOD_FEATURES + 1,), the last one the intercept, and good/good.json. Raises
        UserError where there are too few texts."""
        vectorizer = _vectorizer()
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import roc_auc_score

        good_keys: set[int] = set()
        good = self._draw(self._good_texts(), seen=good_keys)
        rest = self._draw(self._texts(), without=good_keys)
        for name, texts in (("--good", good), ("--data_path, besides those of --good,", rest)):
            if len(texts) < GOOD_LEAST:
                raise UserError(f"--good: {len(texts)} texts in {name} are too few to learn from, at least "
                                f"{GOOD_LEAST} are needed")
        is_good = np.array([True] * len(good) + [False] * len(rest))
        vectors = vectorizer.transform([text for _, text in good + rest])
        held_out = np.arange(len(is_good)) % GOOD_HELD_OUT == 0
        model = LogisticRegression(C=10.0, class_weight="balanced", max_iter=200)
        model.fit(vectors[~held_out], is_good[~held_out])
        auc = float(roc_auc_score(is_good[held_out], model.decision_function(vectors[held_out])))
        save_array(self.folder / "good" / "weights.npy", np.append(model.coef_[0], model.intercept_).astype(np.float64))
        learned = {"good": len(good), "rest": len(rest), "auc": round(auc, DECIMALS)}
        save_json(self.folder / "good" / "good.json", learned)

    def _good_texts(self):
        for file in self.files:
            reader = RawReader(file, self.options.rename_field)
            for _, record in reader.read():  # cleaned as the others are, which else would differ by that
                text = clean_text(content_of(record), self.options)
                if text is not None:
                    yield text

    def _texts(self):
        for shard, begin in enumerate(self.corpus.starts[:-1].tolist()):
            meta = self.corpus.meta(shard)
            self.tick(0, shard / len(self.corpus.tasks))
            stays = staying(self.folder, begin, begin + len(meta)) & (meta["kind"] == TEXT)
            yield from (self.corpus.record(begin + place)["text"] for place in np.flatnonzero(stays).tolist())

    def _draw(self, texts, without: set[int] = frozenset(), seen: set[int] | None = None) -> list[tuple[int, str]]:
        """(key, beginning) of the texts with the smallest draws, each text once; the keys of all are put in `seen`."""
        drawn: dict[int, tuple[int, str]] = {}
        bound = 1 << 64
        for text in texts:
            opening = _opening(text)
            key = text_key("good", normalize(opening))[0]
            draw = text_key(f"draw {self.seed}", str(key))[0]
            if seen is not None:
                seen.add(key)
            if draw < bound and key not in without:
                drawn[draw] = key, opening
                if len(drawn) >= 2 * GOOD_MOST:
                    drawn = dict(sorted(drawn.items())[:GOOD_MOST])
                    bound = max(drawn)
        return [item for _, item in sorted(drawn.items())[:GOOD_MOST]]


# ---------------------------------------------------------------------------------------------
# score


class Score(WorkStep):
    """Scores the documents of a shard that stay, by the weights of --score_with, the model of --good, or both."""

    def __init__(self, folder: Path, corpus: Corpus, checkpoint: str | None, by_good: bool):
        super().__init__(folder, "score")
        self.corpus, self.checkpoint, self.by_good = corpus, checkpoint, by_good

    def run(self, data, rank: int = 0, world_size: int = 1) -> None:
        """Writes score/RANK.npy (SCORED)."""
        begin, end = map(int, self.corpus.starts[rank:rank + 2])
        stays = staying(self.folder, begin, end) & (self.corpus.meta(rank)["kind"] == TEXT)
        numbers = begin + np.flatnonzero(stays)
        scored = np.zeros(len(numbers), SCORED)
        scored["number"], scored["bpb"], scored["good"] = numbers, np.nan, np.nan
        if len(numbers):
            model = BitsPerByte(self.checkpoint) if self.checkpoint else None
            if self.by_good:
                vectorizer, weights = _vectorizer(), np.load(self.folder / "good" / "weights.npy")
        for a in range(0, len(numbers), TEXTS_AT_ONCE):
            self.tick(rank, a / len(numbers))
            some = slice(a, a + TEXTS_AT_ONCE)
            texts = [self.corpus.record(number)["text"] for number in numbers[some].tolist()]
            if model:
                scored["bpb"][some] = np.round(model.of(texts), DECIMALS)
            if self.by_good:
                vectors = vectorizer.transform(map(_opening, texts))
                scored["good"][some] = np.round(vectors @ weights[:-1] + weights[-1], DECIMALS)
        save_array(numbered(self.folder / "score", rank, ".npy"), scored)


def fingerprint(checkpoint: str | None) -> str | None:
    """The hash of a weights file, or None without one. Raises UserError where it cannot score texts."""
    if checkpoint is None:
        return None
    BitsPerByte(checkpoint)
    with open(checkpoint, "rb") as weights:
        return hashlib.file_digest(weights, "sha256").hexdigest()


def keep_weights(checkpoint: str, work: Path) -> str:
    """Copy the weights into the work folder, so that all tasks score by the same. Returns the copy's path."""
    copy = work / "weights.pth"
    if not copy.exists():
        with open(checkpoint, "rb") as weights:
            write_whole(copy, lambda stream: shutil.copyfileobj(weights, stream, 1 << 20))
    return str(copy)


def load_scores(folder: Path, rank: int) -> np.ndarray:
    """SCORED of a shard, sorted by number; empty where nothing was scored."""
    file = numbered(folder / "score", rank, ".npy")
    return np.load(file) if file.exists() else np.empty(0, SCORED)


def places(values: np.ndarray) -> np.ndarray:
    """The place of each value among all, from 0 (smallest) to 1; equal values have the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    mean = np.cumsum(counts) - (counts + 1) / 2
    return mean[inverse] / max(1, len(values) - 1)


# ---------------------------------------------------------------------------------------------
# keep


class KeepBest(WorkStep):
    """Chooses the share `keep` of the scored documents: those with the best mean of their places by bpb and by good.
    One task."""

    def __init__(self, folder: Path, n_shards: int, keep: float):
        super().__init__(folder, "keep the best")
        self.n_shards, self.keep = n_shards, keep

    def run(self, data, rank: int = 0, world_size: int = 1) -> None:
        """Writes quality/000000.npy (REMOVED, whose overlap is the place, 0 the best), score/bpb.npy, the sorted scores
        of the documents that stay, and score/summary.json."""
        parts = (load_scores(self.folder, shard) for shard in range(self.n_shards))
        scored = np.concatenate([np.empty(0, SCORED), *parts])
        parts = [places(sign * scored[name]) for name, sign in (("bpb", 1), ("good", -1))
                 if not np.isnan(scored[name]).all()]
        place = np.mean(parts, axis=0) if parts else np.zeros(len(scored))
        order = np.lexsort((scored["number"], place))
        goes = np.sort(order[round(len(order) * self.keep):])
        removed = np.zeros(len(goes), REMOVED)
        removed["number"], removed["overlap"] = scored["number"][goes], place[goes]
        save_array(numbered(self.folder / "quality", 0, ".npy"), removed)
        kept = np.delete(scored, goes)
        save_array(self.folder / "score" / "bpb.npy", np.sort(kept["bpb"]))
        summary = {"scored": len(scored), "kept": len(kept)}
        for name in ("bpb", "good"):
            if len(kept) and not np.isnan(scored[name]).all():
                summary[name] = {"all": _quantiles(scored[name]), "kept": _quantiles(kept[name])}
        save_json(self.folder / "score" / "summary.json", summary)


def _quantiles(values: np.ndarray) -> list[float]:
    """Minimum, quartiles and maximum."""
    return [round(float(value), DECIMALS) for value in np.quantile(values, [0, 0.25, 0.5, 0.75, 1])]


def describe_quality(folder: Path) -> dict:
    """The scores for the manifest: how many documents were scored and kept, the quartiles, and what was learned."""
    good = folder / "good" / "good.json"
    return load_json(folder / "score" / "summary.json") | ({"learned": load_json(good)} if good.exists() else {})
