"""Categories: clusters of planted topics, each record's category recomputed in plain numpy, and their report."""

import copy
import hashlib
import json
import math
import random
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from Config import UserError
from prepare.report import _draw_categories, report_lines, write_report

TOPICS = {
    "kitchen": "鸡蛋 酱油 翻炒 锅中 面粉 搅拌 土豆 蒜末 食盐 清蒸 烤箱 米饭",
    "court": "法院 被告 原告 诉讼 合同 判决 律师 证据 赔偿 条款 上诉 仲裁",
    "hospital": "患者 手术 药物 症状 血压 医生 肿瘤 护理 疫苗 诊断 感染 胃炎",
    "football": "球员 射门 教练 联赛 进球 球迷 裁判 后卫 决赛 传球 越位 主场",
    "stars": "行星 恒星 轨道 望远 银河 引力 彗星 光年 宇宙 月球 陨石 黑洞",
    "code": "函数 变量 编译 python 数组 递归 linux 指针 接口 调试 线程 内存",
}
FILLER = "可以 然后 我们 这样 一些 比较 非常 需要 因此 而且 大家 现在".split()
NONE = 65535
extra = pytest.mark.extra  # needs requirements-extra.txt


def text_of(rng: random.Random, topic: str, n_words: int = 60) -> str:
    """Two words of a topic and one that is of none, again and again, with marks and numbers between them."""
    words = TOPICS[topic].split()
    parts = [rng.choice(FILLER if i % 3 == 2 else words) + rng.choice(["，", "。", "！3.5 ", " 12%\n", "：", "（"])
             for i in range(n_words)]
    return "".join(parts)


def planted(n_each: int, seed: int = 1, n_words: int = 60) -> tuple[list[dict], list[str]]:
    """(records, the topic of each), in random order, every third a chat."""
    rng = random.Random(seed)
    topics = [topic for topic in TOPICS for _ in range(n_each)]
    rng.shuffle(topics)
    records = []
    for number, topic in enumerate(topics):
        text = text_of(rng, topic, n_words)
        half = len(text) // 2
        chat = [{"role": "user", "content": text[:half]}, {"role": "assistant", "content": text[half:]}]
        records.append({"conversations": chat} if number % 3 == 0 else {"text": text})
    return records, topics


def make_corpus(folder: Path, records: list[dict], in_shard: int = 1000, removed: tuple[int, ...] = ()):
    """The records as the clean phase leaves them, and those of `removed` as exact duplicates."""
    pytest.importorskip("datatrove")
    from prepare.duplicates import REMOVED, Corpus
    from prepare.pipeline import CHAT, META, TEXT

    for name in ("clean", "exact", "progress", "categories"):
        (folder / name).mkdir(parents=True)
    counts = []
    for rank, begin in enumerate(range(0, len(records) or 1, in_shard)):
        meta, lines, offset = [], [], 0
        for record in records[begin:begin + in_shard]:
            line = json.dumps({"id": "raw:1", "source": "raw"} | record, ensure_ascii=False).encode() + b"\n"
            key = int.from_bytes(hashlib.sha256(line).digest()[:8], "little")
            meta.append((offset, len(line), TEXT if "text" in record else CHAT, 9, (key, 0), 0))
            lines.append(line)
            offset += len(line)
        (folder / "clean" / f"{rank:06d}.jsonl").write_bytes(b"".join(lines))
        np.save(folder / "clean" / f"{rank:06d}.npy", np.array(meta, META))
        counts.append(len(meta))
    np.save(folder / "exact" / "000000.npy", np.array([(number, 0, 1) for number in sorted(removed)], REMOVED))
    return Corpus(folder, list(range(len(counts))), counts)


def categories_of(folder: Path, corpus, n_categories: int, seed: int = 1) -> np.ndarray:
    """Run both phases; the category of each record."""
    pytest.importorskip("sklearn")
    from prepare.categories import Categorize, FitCategories

    FitCategories(folder, corpus, n_categories, seed).run(None)
    for rank in range(len(corpus.tasks)):
        Categorize(folder, corpus).run(None, rank)
    found = [np.load(folder / "categories" / f"{rank:06d}.npy") for rank in range(len(corpus.tasks))]
    assert all(part.dtype == np.uint16 for part in found)
    return np.concatenate(found)


def clusters_in(folder: Path) -> dict[str, bytes]:
    names = ("vocabulary.json", "idf.npy", "centroids.npy", "categories.json")
    return {name: (folder / "categories" / name).read_bytes() for name in names}


def described(folder: Path) -> list[dict]:
    from prepare.categories import describe_categories

    return describe_categories(folder)


# ---------------------------------------------------------------------------------------------
# clusters


@extra
def test_planted_topics_come_apart_with_their_words(tmp_path):
    records, topics = planted(40)
    found = categories_of(tmp_path, make_corpus(tmp_path, records, in_shard=100), 6)
    assert sorted(set(found.tolist())) == list(range(6))
    topic_of = {}
    for category in range(6):
        counts = Counter(topic for topic, number in zip(topics, found, strict=True) if number == category)
        topic_of[category], n = counts.most_common(1)[0]
        assert n == counts.total() == 40  # chats too
    assert set(topic_of.values()) == set(TOPICS)
    for item in described(tmp_path):
        assert len(item["keywords"]) == 8
        assert set(item["keywords"]) <= set(TOPICS[topic_of[item["category"]]].split())


@extra
def test_categories_are_numbered_by_their_size_in_the_sample(tmp_path):
    rng = random.Random(3)
    sizes = dict(zip(TOPICS, (20, 70, 40, 25, 60, 50), strict=True))
    topics = [topic for topic, n in sizes.items() for _ in range(n)]
    found = categories_of(tmp_path, make_corpus(tmp_path, [{"text": text_of(rng, topic)} for topic in topics]), 6)
    assert np.bincount(found).tolist() == [70, 60, 50, 40, 25, 20]


def counted(record: dict) -> Counter:
    """The n-grams of the first 1,000 characters of a record, counted character by character."""
    text = record["text"] if "text" in record else "\n".join(turn["content"] for turn in record["conversations"])
    text, counts, word = text[:1000].lower() + "\n", Counter(), ""
    for char, after in zip(text, text[1:] + "\n", strict=True):
        if "\u4e00" <= char <= "\u9fff" and "\u4e00" <= after <= "\u9fff":
            counts[char + after] += 1
        if "a" <= char <= "z":
            word += char
        else:
            counts[word] += len(word) > 1
            word = ""
    return +counts


@extra
def test_each_record_has_the_nearest_centroid(tmp_path):
    records, _ = planted(30, n_words=12)
    rng = random.Random(5)
    for number in range(0, len(records), 2):  # of two topics, frequent and rare words
        words = [word for topic in rng.sample(list(TOPICS), 2) for word in TOPICS[topic].split()]
        records[number] = {"text": "，".join(rng.choices(words, [1 / (i % 12 + 1) ** 2 for i in range(24)], k=20))}
    records[11] = {"text": (text_of(rng, "stars", 300) + "\n" * 1000)[:1000] + text_of(rng, "court", 900)}
    found = categories_of(tmp_path, make_corpus(tmp_path, records, in_shard=50), 8, seed=4)
    vocabulary = json.loads((tmp_path / "categories" / "vocabulary.json").read_text(encoding="utf-8"))
    idf, centroids = (np.load(tmp_path / "categories" / f"{name}.npy").astype(float) for name in ("idf", "centroids"))
    column = {gram: i for i, gram in enumerate(vocabulary)}
    in_texts = Counter(gram for record in records for gram in counted(record))
    assert set(vocabulary) == {gram for gram, n in in_texts.items() if 3 <= n <= len(records) / 2}
    assert idf == pytest.approx([math.log((1 + len(records)) / (1 + in_texts[gram])) + 1 for gram in vocabulary])
    plain, by_counts = 0, 0
    for record, category in zip(records, found, strict=True):
        weights = np.zeros(len(vocabulary))
        for gram, n in counted(record).items():
            if gram in column:
                weights[column[gram]] = (1 + math.log(n)) * idf[column[gram]]
        scores = centroids @ weights / np.linalg.norm(weights)
        second, first = np.sort(scores)[-2:]
        assert scores[category] == pytest.approx(first, abs=1e-5)
        plain += first - second > 1e-5
        by_counts += category == np.argmax(centroids @ (weights / idf))
    assert plain > 0.95 * len(records) and by_counts < len(records)  # else the weights would not be put to the test
    assert len(set(found.tolist())) == 8
    lone = [number for number, record in enumerate(records) if "行星" in str(record) and "法院" not in str(record)]
    assert found[11] in found[lone]  # the words behind its first 1,000 characters do not count


@extra
def test_the_same_seed_gives_the_same_bytes_however_the_records_are_sharded(tmp_path, monkeypatch):
    pytest.importorskip("datatrove")
    monkeypatch.setattr("prepare.categories.SAMPLE", 50)
    records, _ = planted(25)
    made, found = [], []
    for number, (in_shard, seed) in enumerate(((1000, 1), (31, 1), (1000, 2))):
        folder = tmp_path / str(number)
        found.append(categories_of(folder, make_corpus(folder, records, in_shard, removed=(3, 40)), 4, seed))
        made.append(clusters_in(folder))
    assert made[0] == made[1] != made[2]
    assert found[0].tolist() == found[1].tolist()
    from prepare.categories import fit

    texts = [record["text"] for record in records if "text" in record]
    assert [(fit(texts, 4, 1)[2] == fit(texts, 4, seed)[2]).all() for seed in (1, 2)] == [True, False]


@extra
def test_the_sample_is_of_documents_and_of_chats_that_stay(tmp_path, monkeypatch):
    pytest.importorskip("datatrove")
    from prepare.categories import FitCategories

    records, _ = planted(50)
    corpus = make_corpus(tmp_path, records, in_shard=70, removed=tuple(range(0, 300, 2)))
    chats = [number for number in range(1, 300, 2) if number % 3 == 0]
    documents = [number for number in range(1, 300, 2) if number % 3]
    assert FitCategories(tmp_path, corpus, 6, 1)._sample() == sorted(chats + documents)
    monkeypatch.setattr("prepare.categories.SAMPLE", 60)
    samples = [FitCategories(tmp_path, corpus, 6, seed)._sample() for seed in (1, 2)]
    for sample in samples:
        assert len(set(sample)) == 60 + len(chats)
        assert set(chats) < set(sample) < set(chats + documents)
    assert samples[0] != samples[1]
    assert any(number < 100 for number in samples[0]) and any(number > 200 for number in samples[0])


@extra
def test_what_does_not_stay_has_no_category_and_no_part_in_them(tmp_path):
    records, topics = planted(30)
    gone = tuple(number for number, topic in enumerate(topics) if topic == "court" or number % 10 == 0)
    found = categories_of(tmp_path, make_corpus(tmp_path, records, in_shard=40, removed=gone), 5)
    assert np.flatnonzero(found == NONE).tolist() == list(gone)
    assert len(set(found.tolist()) - {NONE}) == 5
    assert not {"法院", "诉讼"} & set(json.loads((tmp_path / "categories" / "vocabulary.json").read_text()))


@extra
@pytest.mark.parametrize("n_records, n_categories", [(0, 1), (1, 1), (19, 1), (40, 2), (119, 5), (120, 6)])
def test_few_records_have_few_categories(tmp_path, n_records, n_categories):
    records = planted(20)[0][:n_records]
    found = categories_of(tmp_path, make_corpus(tmp_path, records), 50)
    assert len(described(tmp_path)) == n_categories
    assert sorted(set(found.tolist())) == list(range(n_categories if n_records else 0))
    assert bool(described(tmp_path)[0]["keywords"]) == bool(n_records)


@extra
def test_texts_without_a_known_ngram_have_a_category(tmp_path):
    records, _ = planted(20)
    strange = ["", "12345 67.8% !!!", "x y z", "zyxwv utsrq", "ひらがな", "鱻", "𠮷野"]
    records += [{"text": text} for text in strange]
    found = categories_of(tmp_path, make_corpus(tmp_path, records), 6)
    assert found[-len(strange):].tolist() == [0] * len(strange)
    alone = tmp_path / "alone"
    found = categories_of(alone, make_corpus(alone, [{"text": text} for text in ["1 2 3", "。", ""] * 20]), 6)
    assert found.tolist() == [0] * 60 and described(alone) == [{"category": 0, "keywords": []}]


@extra
@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
@pytest.mark.parametrize("texts", [["春天来了，花开了"], ["春天来了，花开了", "a 机器人 b"], ["春雨", "夏日", "秋风"]])
def test_fewer_texts_than_categories(tmp_path, texts):
    found = categories_of(tmp_path, make_corpus(tmp_path, [{"text": text} for text in texts] * 60), 3 * len(texts))
    assert [item["category"] for item in described(tmp_path)] == list(range(len(texts)))
    assert len(set(found[:len(texts)].tolist())) == len(texts)
    assert found.tolist() == found[:len(texts)].tolist() * 60
    for text, category in zip(texts, found, strict=False):
        assert all(word in text for word in described(tmp_path)[category]["keywords"])  # none of the other categories


@extra
def test_the_first_of_equal_centroids():
    pytest.importorskip("datatrove")
    from prepare.categories import nearest

    centroids = np.array([[0, 1], [1, 0], [1, 0], [0, 1]], np.float32)
    assert nearest(np.array([[2, 1], [1, 2], [1, 1], [0, 0]], np.float32), centroids).tolist() == [1, 0, 0, 0]


@extra
def test_without_scikit_learn_the_error_says_what_to_do(tmp_path, monkeypatch):
    corpus = make_corpus(tmp_path, planted(2)[0])
    from prepare.categories import FitCategories

    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    with pytest.raises(UserError, match=r"scikit-learn: pip install -r requirements-extra.txt, or --categories 0"):
        FitCategories(tmp_path, corpus, 5, 1).run(None)


# ---------------------------------------------------------------------------------------------
# keywords


@extra
@pytest.mark.parametrize("texts, candidates, keywords", [
    (["根据人民法院的判决", "人民法院认为", "向人民法院起诉，人民"], "民法 人民 法院", ["人民法院"]),  # the longest
    (["人民法院", "人民生活", "人民币", "人民"], "人民 民法 法院", ["人民"]),  # few that hold 人民 hold 人民法院
    (["本的方法", "的方法", "方法的"], "的方 方法 法的", ["方法"]),  # without 的 at the ends
    (["学习 python", "python学习"], "python 学习", ["python", "学习"]),
    (["函数，数组。数数"], "函数 数组 数数", ["函数", "数组", "数数"]),  # words do not reach over marks
    (["甲乙丙丁", "乙丙丁戊"] * 2, "甲乙 丁戊 丙丁 乙丙", ["甲乙丙丁"]),  # of words that share three one stays
    (["甲 乙", "。"], "", [])])
def test_keywords_are_words(texts, candidates, keywords):
    pytest.importorskip("datatrove")
    from prepare.categories import choose_keywords

    assert choose_keywords(texts, candidates.split()) == keywords


# ---------------------------------------------------------------------------------------------
# the report


def make_manifest(n_categories: int, keywords: tuple[str, ...] = ("法院", "a|b*", "linux")) -> dict:
    names = ("pretrain", "sft_512", "sft_mini_512")
    outputs = [{"name": name, "records": 9, "bytes": 9, "characters": 9, "tokens": 9, "files": [], "by_source": {},
                "lengths": {"unit": "tokens", "edges": [0, 9], "counts": [9]},
                "by_category": {str(category): 1000 * place + category for category in range(0, n_categories, 2)}}
               for place, name in enumerate(names, 1)]
    items = [{"category": category, "keywords": list(keywords) if category else []} for category in range(n_categories)]
    return {"settings": {}, "inputs": [], "steps": [], "outputs": outputs, "dropped": [], "listed": [],
            "categories": items}


def test_the_report_has_a_row_a_category():
    lines = report_lines(make_manifest(5))
    titles = [line for line in lines if line.startswith("## ")]
    assert titles[titles.index("## Categories") - 1:][:3] == ["## What came out", "## Categories", "## The account"]
    section = lines[lines.index("## Categories"):lines.index("## The account")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in section if line.startswith("|")]
    assert rows[0] == ["#", "keywords", "pretrain", "sft_512", "sft_mini_512"]
    words = r"法院 · a\|b\* · linux"
    assert rows[2:] == [["0", "–", "1,000", "2,000", "3,000"], ["1", words, "0", "0", "0"],
                        ["2", words, "1,002", "2,002", "3,002"], ["3", words, "0", "0", "0"],
                        ["4", words, "1,004", "2,004", "3,004"]]


def test_a_report_without_categories_is_as_before(tmp_path):
    manifest = make_manifest(5)
    with_section = report_lines(manifest)
    begin, end = with_section.index("## Categories"), with_section.index("## The account")
    for value in ([], None, "left out"):
        other = copy.deepcopy(manifest)
        other["categories"] = value
        if value == "left out":
            del other["categories"]
        assert report_lines(other) == with_section[:begin] + with_section[end:]
    write_report(tmp_path, other)
    assert sorted(file.name for file in (tmp_path / "charts").iterdir()) == ["lengths.png", "sources.png", "steps.png"]


def test_the_chart_stacks_the_outputs_but_no_sample(tmp_path):
    manifest = make_manifest(5)
    axes = _draw_categories(manifest, None).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "2", "3", "4"]
    bars = [[(bar.get_x(), bar.get_width()) for bar in container] for container in axes.containers]
    assert bars == [[(0, 1000), (0, 0), (0, 1002), (0, 0), (0, 1004)],
                    [(1000, 2000), (0, 0), (1002, 2002), (0, 0), (1004, 2004)]]
    assert [text.get_text() for text in axes.texts] == ["3,000", "0", "3,004", "0", "3,008"]
    write_report(tmp_path, manifest)
    assert (tmp_path / "charts" / "categories.png").read_bytes()[:4] == b"\x89PNG"
    assert len(_draw_categories(make_manifest(1000), None).axes[0].containers[0]) == 100
    manifest["outputs"] = []
    assert [text.get_text() for text in _draw_categories(manifest, None).axes[0].texts] == ["nothing was written"]
