"""How alike two texts are: normalization, shingles, MinHash signatures and overlap.

Two texts are compared by their sets of shingles: all runs of five characters of the normalized text. Their Jaccard
overlap is |A ∩ B| / |A ∪ B|, their containment |A ∩ B| / min(|A|, |B|).

MinHash (Broder 1997, "On the resemblance and containment of documents"): for a random hash function the probability
that two sets have the same smallest hash is their Jaccard overlap. 100 functions are put together to 20 bands of five:
two texts of overlap s have a band in common with probability 1 - (1 - s^5)^20. The same 100 numbers, put together in
another order, give 20 more bands for nothing but the time to compare them; so the probability is nearly
1 - (1 - s^5)^40: 96 % for an overlap of 0.6, where 20 bands alone find 80 %.
"""

import hashlib
import re
import sys
import unicodedata

import numpy as np

SHINGLE = 5  # characters
HASHES, ROWS = 100, 5
ARRANGEMENTS = 2
BANDS = ARRANGEMENTS * HASHES // ROWS

_SHINGLE_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, its bits look random
_rng = np.random.Generator(np.random.PCG64(2026))
_MULTIPLIER = _rng.integers(0, 1 << 64, HASHES, dtype=np.uint64) | np.uint64(1)
_OFFSET = _rng.integers(0, 1 << 64, HASHES, dtype=np.uint64)
_ARRANGEMENT = np.concatenate([np.arange(HASHES), *(_rng.permutation(HASHES) for _ in range(ARRANGEMENTS - 1))])
_BLOCK = 2048  # shingles hashed at once: more do not fit into the cache

# ---------------------------------------------------------------------------------------------
# normalization


# What says nothing about whether two texts are the same: white space, punctuation, controls. Symbols stay, since 3+5 is
# not 3=5, and so do the marks that calculate, where they stand beside a number.
_REMOVED = dict.fromkeys(code for code in range(sys.maxunicode + 1) if chr(code) not in "-*/.:%()" and (
    unicodedata.category(chr(code)) in ("Cc", "Cf") or unicodedata.category(chr(code))[0] in "PZ"
    or chr(code) in "`^~"))
_NOT_OF_A_NUMBER = re.compile(r"(?<!\d)[*/.:%]+|[*/.:]+(?!\d)|-+(?!\d)|\((?!\d)|(?<!\d)\)")


def normalize(text: str) -> str:
    """The text in NFKC and lower case, without white space and punctuation, but for what makes another number or sum
    (-3, 3/4, 12:30, 50%, (2+3)*4). Text that is nothing else stays as it is."""
    normalized = unicodedata.normalize("NFKC", text).lower().translate(_REMOVED)
    return _NOT_OF_A_NUMBER.sub("", normalized) or text


def text_key(kind: str, normalized: str) -> tuple[int, int]:
    """128 bits that identify a normalized text of a kind, as two numbers."""
    digest = hashlib.blake2b(f"{kind}\0{normalized}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


# ---------------------------------------------------------------------------------------------
# shingles and signatures


def shingles(normalized: str) -> np.ndarray:
    """The set of a normalized text's shingles as sorted 64-bit hashes (n,); empty for a text of fewer characters."""
    codes = np.frombuffer(normalized.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    if len(codes) < SHINGLE:
        return np.empty(0, np.uint64)
    hashed = codes[:len(codes) - SHINGLE + 1].copy()
    for offset in range(1, SHINGLE):
        hashed *= _SHINGLE_BASE
        hashed += codes[offset:len(codes) - SHINGLE + 1 + offset]
    hashed ^= hashed >> np.uint64(31)  # the finalizer of splitmix64: each bit depends on all
    hashed *= np.uint64(0xBF58476D1CE4E5B9)
    hashed ^= hashed >> np.uint64(27)
    hashed *= np.uint64(0x94D049BB133111EB)
    hashed ^= hashed >> np.uint64(31)
    return np.unique(hashed)


def signature(hashed: np.ndarray) -> np.ndarray:
    """The MinHash signature (HASHES,) of a set of shingles that is not empty: for each hash function, the upper 32 bits
    of the smallest value."""
    smallest = np.full(HASHES, ~np.uint64(0))
    for begin in range(0, len(hashed), _BLOCK):
        values = hashed[begin:begin + _BLOCK, None] * _MULTIPLIER + _OFFSET  # modulo 2^64
        np.minimum(smallest, values.min(axis=0), out=smallest)
    return (smallest >> np.uint64(32)).astype(np.uint32)


def band_hashes(band: int) -> np.ndarray:
    """Which of the hash functions make up a band, of 0 to BANDS - 1."""
    return _ARRANGEMENT[band * ROWS:(band + 1) * ROWS]


def band_keys(rows: np.ndarray, group: np.ndarray) -> np.ndarray:
    """One number a text, from the ROWS values of a band (ROWS, n) and the group (n,) that it is compared within."""
    keys = group.copy()
    for row in rows:
        keys ^= row
        keys *= _SHINGLE_BASE
        keys ^= keys >> np.uint64(29)
    return keys


# ---------------------------------------------------------------------------------------------
# overlap


def n_common(a: np.ndarray, b: np.ndarray) -> int:
    """How many shingles two sets share."""
    short, long = (a, b) if len(a) <= len(b) else (b, a)
    if not len(short):
        return 0
    found = np.searchsorted(long, short)
    found[found == len(long)] = 0
    return int(np.count_nonzero(long[found] == short))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """The Jaccard overlap of two sets of shingles; 0 where one is empty."""
    common = n_common(a, b)
    return common / (len(a) + len(b) - common) if common else 0.0
