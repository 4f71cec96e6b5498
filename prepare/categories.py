"""The phases that sort records into categories: clusters by their words.

clusters      one task          the clusters of a sample, with keywords
categorize    a task a shard    the category of each record that stays

A text is a vector of TF-IDF weights (1 + log of the count, times scikit-learn's smoothed inverse document frequency) of
its n-grams: pairs of hanzi that stand side by side, and words of Latin letters. The sample's vectors are projected to
TOPICS dimensions by a truncated SVD (latent semantic analysis, Deerwester et al. 1990) and scaled to length 1, then
clustered by k-means. A record's category is the centroid with the greatest cosine to it in these dimensions. Since the
projection is linear, that is the row of centroids.npy, which has one column an n-gram, with the greatest dot product
with the record's weights.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from Config import UserError
from prepare.arrange import KINDS, NO_CATEGORY, rows_of
from prepare.duplicates import Corpus, staying
from prepare.pipeline import content_of
from prepare.work import WorkStep, load_json, numbered, save_array, save_json

SAMPLE = 20_000  # documents, and as many chats
CHARS = 1000  # of a record, from its beginning: long and short ones are judged by as much
LEAST_RECORDS = 20  # of the sample, for each category
LEAST_TEXTS, MOST_TEXTS = 3, 0.5  # that hold an n-gram: fewer say nothing about others, more are no topic
FEATURES = 20_000  # n-grams
TOPICS = 100
STARTS = 4  # of k-means, of which the best is taken
TEXTS_AT_ONCE = 256
KEYWORDS = 8
CANDIDATES = 200  # n-grams that the keywords of a category are made from
LONGEST_WORD = 16  # hanzi: templates of prompts are shown whole
MOST_COMMON = 2  # characters that two keywords may share in a row
HOLDS = 0.6  # of the texts with a pair of hanzi: a longer word in as many stands in its place

HANZI = "\u3400-\u9fff\U00020000-\U0003ffff"
RUN = re.compile(f"[{HANZI}]{{2,}}|[a-z]{{2,}}")
THOUGHT_TAGS = re.compile(r"</?(?:think|answer)>")
PARTICLES = "的了着是在和与或把被"  # no keyword begins or ends with them

# ---------------------------------------------------------------------------------------------
# n-grams


def beginning(record: dict) -> str:
    """What of a cleaned record is looked at: its first CHARS characters, in lower case, without R1's tags."""
    return THOUGHT_TAGS.sub(" ", content_of(record)[:CHARS]).lower()


def ngrams(text: str) -> list[str]:
    """The n-grams of a text, each as often as it stands there."""
    found = []
    for run in RUN.findall(text):
        if run[0] <= "z":
            found.append(run)
        else:
            found += [run[i:i + 2] for i in range(len(run) - 1)]
    return found


def _vectorizer(**more):
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError:
        raise UserError("categories need scikit-learn: pip install -r requirements-extra.txt, or "
                        "--categories 0") from None
    return TfidfVectorizer(analyzer=ngrams, sublinear_tf=True, dtype=np.float32, **more)


# ---------------------------------------------------------------------------------------------
# clusters


class FitCategories(WorkStep):
    """Clusters a sample of the records that stay: the same clusters for the same records and seed."""

    def __init__(self, folder: Path, corpus: Corpus, n_categories: int, seed: int):
        super().__init__(folder, "clusters")
        self.corpus, self.n_categories, self.seed = corpus, n_categories, seed

    def run(self, data, rank: int = 0, world_size: int = 1) -> None:
        """Writes categories/vocabulary.json (n-grams), idf.npy (n,), centroids.npy (n_categories, n), and
        categories.json, what describe_categories returns: at most one category for LEAST_RECORDS of the sample. Raises
        UserError where scikit-learn is missing."""
        texts = []
        numbers = self._sample()
        for done, number in enumerate(numbers):
            self.tick(rank, 0.2 + 0.2 * done / len(numbers))
            texts.append(beginning(self.corpus.record(number)))
        vocabulary, idf, centroids, keywords = fit(texts, self.n_categories, self.seed, lambda: self.tick(rank, 0.5))
        save_json(self.folder / "categories" / "vocabulary.json", vocabulary)
        save_array(self.folder / "categories" / "idf.npy", idf)
        save_array(self.folder / "categories" / "centroids.npy", centroids)
        save_json(self.folder / "categories" / "categories.json",
                  [{"category": number, "keywords": words} for number, words in enumerate(keywords)])

    def _sample(self) -> list[int]:
        """The numbers of up to SAMPLE documents and SAMPLE chats: those with the smallest draws."""
        chosen, n_shards = [], len(self.corpus.tasks)
        for phase in KINDS:
            best = np.empty(0, [("draw", "<u8"), ("number", "<u8")])
            for shard in range(n_shards):
                self.tick(0, 0.2 * shard / n_shards)
                rows = rows_of(self.folder, self.corpus, shard, phase, self.seed)
                more = np.empty(len(rows), best.dtype)
                more["draw"], more["number"] = rows["draw"], rows["number"]
                best = np.sort(np.concatenate([best, more]), order=["draw", "number"])[:SAMPLE]
            chosen += best["number"].tolist()
        return sorted(chosen)


def fit(texts: list[str], n_categories: int, seed: int, tick=lambda: None) -> tuple[
        list[str], np.ndarray, np.ndarray, list[list[str]]]:
    """Cluster texts.

    Returns (vocabulary, idf (n,), centroids (n_categories, n), keywords of each category): the category with the most
    texts first.
    """
    from threadpoolctl import threadpool_limits

    n_categories = max(1, min(n_categories, len(texts) // LEAST_RECORDS))
    limits = {"min_df": LEAST_TEXTS, "max_df": MOST_TEXTS} if n_categories > 1 else {}
    vectorizer = _vectorizer(max_features=FEATURES, **limits)
    with threadpool_limits(1):  # sums over threads would round otherwise
        try:
            weights = vectorizer.fit_transform(texts)
        except ValueError:  # no n-gram, or none in enough texts
            return [], np.empty(0, np.float32), np.zeros((1, 0), np.float32), [[]]
        tick()
        centroids = _cluster(weights, n_categories, seed)
    labels, known = nearest(weights, centroids), weights.getnnz(axis=1) > 0
    sizes = np.bincount(labels[known], minlength=len(centroids))
    order = np.argsort(-sizes, kind="stable")[:np.count_nonzero(sizes)]
    vocabulary = vectorizer.get_feature_names_out().tolist()
    mean, keywords = np.asarray(weights.mean(axis=0)).ravel(), []
    for number in order:
        tick()
        mine = np.flatnonzero((labels == number) & known)
        gain = np.asarray(weights[mine].mean(axis=0)).ravel() - (mean if len(order) > 1 else 0)
        best = np.argsort(-gain, kind="stable")[:CANDIDATES]
        keywords.append(choose_keywords([texts[i] for i in mine], [vocabulary[i] for i in best if gain[i] > 0]))
    return vocabulary, vectorizer.idf_.astype(np.float32), centroids[order], keywords


def _cluster(weights, n_categories: int, seed: int) -> np.ndarray:
    """Centroids (at most n_categories, n) of weights (texts, n), of length 1 in the dimensions of the SVD."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.preprocessing import normalize

    n_topics = min(TOPICS, weights.shape[0] - 1, weights.shape[1] - 1)
    if n_categories == 1 or n_topics < 1:
        return np.zeros((1, weights.shape[1]), np.float32)
    svd = TruncatedSVD(n_topics, random_state=seed)
    means = KMeans(n_categories, n_init=STARTS, random_state=seed).fit(normalize(svd.fit_transform(weights)))
    return (normalize(means.cluster_centers_) @ svd.components_).astype(np.float32)


def nearest(weights, centroids: np.ndarray) -> np.ndarray:
    """The category (texts,) of each row of weights (texts, n), a sparse matrix; of equal ones the smallest number."""
    return np.argmax(weights @ centroids.T, axis=1)


# ---------------------------------------------------------------------------------------------
# keywords


def choose_keywords(texts: list[str], candidates: list[str]) -> list[str]:
    """Up to KEYWORDS words from n-grams that stand out in `texts`, best first: a pair of hanzi is made longer where
    most texts that hold it hold the longer word, and of overlapping words one stays."""
    known, counts = set(candidates), Counter()
    for text in texts:
        counts.update({word[i:i + size] for word in _stretches(text, known) for size in range(2, LONGEST_WORD + 1)
                       for i in range(len(word) - size + 1)})
    chosen = []
    for candidate in candidates:
        least = HOLDS * counts[candidate]
        word = max((word for word, n in counts.items() if n >= least and candidate in word),
                   key=lambda word: (len(word), counts[word], word), default=candidate)
        while len(word) > 1 and (word[0] in PARTICLES or word[-1] in PARTICLES):
            word = word[1:] if word[0] in PARTICLES else word[:-1]
        if len(word) > 1 and not any(_overlap(word, other) for other in chosen):
            chosen.append(word)
        if len(chosen) == KEYWORDS:
            break
    return chosen


def _overlap(a: str, b: str) -> bool:
    """Whether one of two words holds the other, or more than MOST_COMMON characters of it in a row."""
    size = min(len(a), len(b), MOST_COMMON + 1)
    return any(a[i:i + size] in b for i in range(len(a) - size + 1))


def _stretches(text: str, known: set[str]) -> Iterator[str]:
    """The longest parts of a text of which all pairs of hanzi are known."""
    for run in RUN.findall(text):
        begin = 0
        for i in range(len(run) if run[0] > "z" else 0):
            if run[i:i + 2] not in known:
                if i > begin:
                    yield run[begin:i + 1]
                begin = i + 1


# ---------------------------------------------------------------------------------------------
# categories of all records


class Categorizer:
    """Finds the category of texts, by what FitCategories saved. Raises UserError where scikit-learn is missing."""

    def __init__(self, folder: Path):
        self.centroids = np.load(folder / "categories" / "centroids.npy")
        vocabulary = load_json(folder / "categories" / "vocabulary.json")
        self.vectorizer = None
        if vocabulary:
            self.vectorizer = _vectorizer(vocabulary=vocabulary)
            self.vectorizer.idf_ = np.load(folder / "categories" / "idf.npy")

    def find(self, texts: list[str]) -> np.ndarray:
        """The category (texts,) of each; 0 where no n-gram is known."""
        if self.vectorizer is None:
            return np.zeros(len(texts), np.int64)
        return nearest(self.vectorizer.transform(texts), self.centroids)


class Categorize(WorkStep):
    """Finds the category of each record of a shard that stays."""

    def __init__(self, folder: Path, corpus: Corpus):
        super().__init__(folder, "categorize")
        self.corpus = corpus

    def run(self, data, rank: int = 0, world_size: int = 1) -> None:
        """Writes categories/RANK.npy, uint16, one entry a record: NO_CATEGORY where it does not stay."""
        begin, end = map(int, self.corpus.starts[rank:rank + 2])
        found, stays = np.full(end - begin, NO_CATEGORY, np.uint16), np.flatnonzero(staying(self.folder, begin, end))
        categorizer = Categorizer(self.folder)
        for first in range(0, len(stays), TEXTS_AT_ONCE):
            self.tick(rank, first / len(stays))
            some = stays[first:first + TEXTS_AT_ONCE]
            found[some] = categorizer.find([beginning(self.corpus.record(begin + int(i))) for i in some])
        save_array(numbered(self.folder / "categories", rank, ".npy"), found)


def describe_categories(folder: Path) -> list[dict]:
    """The categories for the manifest: [{"category": 0, "keywords": [...]}, …]."""
    return load_json(folder / "categories" / "categories.json")
