"""Normalization, shingles and MinHash against plain definitions."""

import random

import numpy as np
import pytest

from prepare.similarity import (
    BANDS,
    HASHES,
    ROWS,
    band_hashes,
    band_keys,
    jaccard,
    n_common,
    normalize,
    shingles,
    signature,
    text_key,
)

LETTERS = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜金生丽水玉出昆冈"


def plain_shingles(text: str) -> set[str]:
    return {text[i:i + 5] for i in range(len(text) - 4)}


def text_of(rng: random.Random, n: int) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(n))


def replaced(rng: random.Random, text: str, share: float) -> str:
    """The text with a share of it replaced in bursts of ten characters."""
    characters = list(text)
    for begin in rng.sample(range(0, len(text) - 9, 10), round(share * len(text) / 10)):
        characters[begin:begin + 10] = text_of(rng, 10)
    return "".join(characters)


@pytest.mark.parametrize("a, b", [
    ("他说：“你好，世界！”", "他说 你好世界"), ("ＡＢＣ１２３", "abc 123"), ("第一行\n\n第二行　", "第一行第二行"),
    ("**重点**：`x`", "重点x"), ("\ufeff零\u200b宽", "零宽")])
def test_the_same_text_in_another_dress(a, b):
    assert normalize(a) == normalize(b)


@pytest.mark.parametrize("a, b", [
    ("3+5=8", "35=8"), ("3-5", "35"), ("-3度", "3度"), ("3.5元", "35元"), ("3/4", "34"), ("3*4", "34"),
    ("12:30", "1230"), ("50%", "50"), ("3>5", "3<5"), ("他好😀", "他好😢")])
def test_marks_that_calculate_and_symbols_stay(a, b):
    assert normalize(a) != normalize(b)


def test_text_of_punctuation_alone_stays_itself():
    assert normalize("。。。") == "。。。" != normalize("？？")
    assert text_key("text", "好") != text_key("chat", "好") != text_key("chat", "坏")


def test_shingles_are_the_set_of_five_characters():
    rng = random.Random(1)
    for n in (0, 4, 5, 6, 50, 400):
        a, b = text_of(rng, n), text_of(rng, n) + text_of(rng, 30)
        b = a[n // 3:] + b
        assert len(shingles(a)) == len(plain_shingles(a))
        assert n_common(shingles(a), shingles(b)) == len(plain_shingles(a) & plain_shingles(b))
        union = len(plain_shingles(a) | plain_shingles(b))
        assert jaccard(shingles(a), shingles(b)) == pytest.approx(
            len(plain_shingles(a) & plain_shingles(b)) / union if n > 4 else 0)
    assert len(shingles("𠮷野家牛肉饭")) == 2  # a character outside of the basic plane is one character


def test_a_signature_estimates_the_overlap():
    rng, errors = random.Random(2), []
    for share in (0.05, 0.1, 0.2, 0.4):
        for _ in range(25):
            text = text_of(rng, 600)
            a, b = shingles(text), shingles(replaced(rng, text, share))
            errors.append(np.mean(signature(a) == signature(b)) - jaccard(a, b))
    assert abs(np.mean(errors)) < 0.02 and np.std(errors) < 0.06  # of 100 hashes the deviation is at most 0.05
    long = shingles(text_of(rng, 5000))  # in several blocks
    assert (signature(long) == np.minimum.reduce([signature(part) for part in np.array_split(long, 7)])).all()


def test_bands_find_what_their_formula_says():
    """1 - (1 - s^5)^20 with the first 20 bands; with all 40 nearly 1 - (1 - s^5)^40."""
    rng, found, expected = random.Random(3), np.zeros((3, 2)), np.zeros((3, 2))
    for row, share in enumerate((0.1, 0.2, 0.4)):
        for _ in range(200):
            text = text_of(rng, 600)
            a, b = shingles(text), shingles(replaced(rng, text, share))
            signatures = np.stack([signature(a), signature(b)], axis=1)
            group = np.zeros(2, np.uint64)
            keys = [band_keys(signatures[band_hashes(band)], group) for band in range(BANDS)]
            equal = [key[0] == key[1] for key in keys]
            overlap = jaccard(a, b)
            found[row] += any(equal[:HASHES // ROWS]), any(equal)
            expected[row] += [1 - (1 - overlap ** ROWS) ** n for n in (HASHES // ROWS, BANDS)]
    found, expected = found / 200, expected / 200
    assert found == pytest.approx(expected, abs=0.1)
    assert found[1, 1] > found[1, 0] + 0.1  # the second arrangement is worth it


def test_groups_are_never_compared():
    values = np.ones((ROWS, 3), np.uint32)
    keys = band_keys(values, np.array([7, 7, 9], np.uint64))
    assert keys[0] == keys[1] != keys[2]
