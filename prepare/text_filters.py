"""Steps that judge a text: blocklist, length, language, symbols, repetition. They drop it or leave it as it is.

Characters are counted with numpy over the code points of the text.
"""

import functools
import re
import unicodedata
from collections import Counter

import numpy as np

from prepare.step import Drop, Options, Step

# ---------------------------------------------------------------------------------------------
# code points and their classes


HAN, KANA, HANGUL, LATIN, LETTER, DIGIT, SPACE, PUNCTUATION, SYMBOL = range(9)
_RANGES = {HAN: [(0x3007, 0x3007), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF)],
           KANA: [(0x3041, 0x309F), (0x30A1, 0x30FA), (0x30FC, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F)],
           HANGUL: [(0x1100, 0x11FF), (0x3131, 0x318E), (0xAC00, 0xD7A3)]}


@functools.lru_cache
def _classes() -> np.ndarray:
    """The class of each code point."""
    table = np.full(0x110000, SYMBOL, np.uint8)
    for code in range(0x20000):
        kind = unicodedata.category(chr(code))
        if kind[0] in "LM":
            table[code] = LATIN if code < 0x250 or 0x1E00 <= code < 0x1F00 else LETTER
        elif kind == "Nd":
            table[code] = DIGIT
        elif kind[0] == "P":
            table[code] = PUNCTUATION
        elif kind[0] == "Z" or code in (9, 10, 13):
            table[code] = SPACE
    for kind, ranges in _RANGES.items():
        for first, last in ranges:
            table[first:last + 1] = kind
    return table


def code_points(text: str) -> np.ndarray:
    """The code points of a text."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def count_classes(text: str) -> list[int]:
    """How many characters of each class a text has, in the order HAN, KANA, HANGUL, LATIN, LETTER (of other scripts),
    DIGIT, SPACE, PUNCTUATION, SYMBOL."""
    return np.bincount(_classes()[code_points(text)], minlength=9).tolist()


# ---------------------------------------------------------------------------------------------
# blocklist and length


@functools.lru_cache(maxsize=4)
def _blocklist(words: tuple[str, ...]) -> tuple[re.Pattern, dict[str, list[str]]]:
    """A pattern of the words' first characters, and the words by first character: alternatives would be tried one after
    another at each character of the text."""
    by_first: dict[str, list[str]] = {}
    for word in sorted({word.strip().lower() for word in words} - {""}):
        by_first.setdefault(word[0], []).append(word)
    return re.compile("[" + "".join(map(re.escape, by_first)) + "]"), by_first


def _is_ascii_word(text: str, index: int) -> bool:
    return 0 <= index < len(text) and text[index].isascii() and text[index].isalnum()


def apply_blocklist(text: str, options: Options, counts: Counter) -> str | Drop:
    """Drop a text that has a word of the list; a word in Latin letters must stand alone ("ass" is not in "class")."""
    first, by_first = _blocklist(options.blocklist)
    if not by_first:
        return text
    lower = text.lower()
    for match in first.finditer(lower):
        start = match.start()
        for word in by_first[match.group()]:
            if lower.startswith(word, start):
                end = start + len(word)
                inside = (_is_ascii_word(lower, start) and _is_ascii_word(lower, start - 1)
                          or _is_ascii_word(lower, end - 1) and _is_ascii_word(lower, end))
                if not inside:
                    return Drop("word of the blocklist")
    return text


def check_length(text: str, options: Options, counts: Counter) -> str | Drop:
    """Drop a text of less than min_chars or more than max_chars characters, white space not counted."""
    if len(text) > 3 * options.max_chars:
        return Drop("too long")
    length = len("".join(text.split()))
    if length < options.min_chars:
        return Drop("too short")
    return Drop("too long") if length > options.max_chars else text


# ---------------------------------------------------------------------------------------------
# language


# fenced code, `code`, formulas, commands of LaTeX, addresses of pages, tags: of no language
NO_LANGUAGE = re.compile(
    r"^[ \t]*```[^\n`]*\n(?:.*?^[ \t]*```[ \t]*$|(?<=[A-Za-z+#]\n).*)|`[^`\n]+`|\$\$[^$]{1,2000}\$\$|\$[^$\n]{1,300}\$"
    r"|\\[A-Za-z]+|https?://[!-~]+|</?[A-Za-z_]{1,20}>", re.M | re.S)
LANGUAGE_MARKS = re.compile(r"[`$\\<]|://")
FEW_LETTERS = 20  # less are no evidence: sums, tables of numbers
MOST_KANA, MOST_HANGUL = 0.15, 0.15  # of the letters of East Asia; a Japanese text has about 0.5


def judge_language(text: str, options: Options, counts: Counter) -> str | Drop:
    """Drop a text that is not Chinese by the share of the scripts among its letters, code and formulas not counted.

    The share of hanzi is that of all letters, or, if larger, that of the lines in which hanzi have their share: a
    conversation with a Chinese question and an answer in English, and a translation line by line, are Chinese enough.
    """
    plain = NO_LANGUAGE.sub(" ", text) if LANGUAGE_MARKS.search(text) else text
    han, kana, hangul, latin, other, *_ = count_classes(plain)
    letters = han + kana + hangul + latin + other
    if letters < FEW_LETTERS:
        return text
    if kana > MOST_KANA * (han + kana):
        reason = "Japanese"
    elif hangul > MOST_HANGUL * (han + hangul):
        reason = "Korean"
    elif han >= options.min_han * letters:
        return text
    else:
        reason = "few hanzi"
    chinese = lines = 0
    for line in plain.split("\n"):
        n = count_classes(line) if line.strip() else [0]
        if letters_here := sum(n[:5]):
            lines += 1
            chinese += n[HAN] >= 0.5 * letters_here and n[KANA] <= MOST_KANA * n[HAN]
    return text if chinese >= max(1, options.min_han * lines) else Drop(reason)


# ---------------------------------------------------------------------------------------------
# symbols and the shape of lines


FORMULA = re.compile(r"\$\$[^$]{1,2000}\$\$|\$[^$\n]{1,300}\$|```.*?```", re.S)
# a number in a sentence (10月1日, 41.2万亿元, 6.5%): it stands before a hanzi, or is a score between teams
NUMBER_IN_TEXT = re.compile(r"(?<![0-9.])"
                            r"(?:[0-9]{1,5}|[0-9]{1,3}(?:,[0-9]{3}){1,4})(?:\.[0-9]{1,4})?%?(?=[\u4e00-\u9fff])"
                            r"|(?<![0-9.])[0-9]{1,5}(?:\.[0-9]{1,4})?%"
                            r"|(?<=[\u4e00-\u9fff])[0-9]{1,3} ?[-:：–] ?[0-9]{1,3}(?![0-9])"
                            r"|(?<=[\u4e00-\u9fff] )[0-9]{1,3} ?[-:：–] ?[0-9]{1,3}(?= ?[\u4e00-\u9fff，。；）])")
SUM = re.compile(r"[0-9(][0-9 ().,+\-−–×÷*/·:xX^%]{0,80}[=≈≠<>≤≥]\s?[-−0-9.,/%…?（）() ]+")
TABLE_LINE = re.compile(r"^[ \t]*\|[^\n]*\|[ \t]*$", re.M)
ELLIPSIS_END = ("…", "...", "。。。")
SENTENCE_END = tuple("。！？；：，、….!?;:,”’」』）)》\"")
BULLET = tuple("-*•·●◆■▪○")
MOST_SYMBOLS, MOST_DIGITS, MOST_SIGNS = 0.25, 0.4, 0.65  # of the characters; signs: symbols, digits and punctuation
MOST_ELLIPSIS, ELLIPSIS_LINES = 0.3, 5  # share of the lines that are cut, from so many lines
SHORT_LINE, SHORT_LINES, FEW_ENDS = 6, 10, 0.1  # characters of a line on average, lines, lines that end like a sentence
MOST_GAPS, FEW_MARKS = 0.15, 0.01  # share of spaces and bars between hanzi, and of punctuation: a menu on one line


def judge_symbols(text: str, options: Options, counts: Counter) -> str | Drop:
    """Drop a text of symbols, of numbers, of lines that are cut, or of menus. Formulas, sums, tables and code count as
    text."""
    counted = _too_many_signs(text)
    if counted and _too_many_signs(TABLE_LINE.sub("", SUM.sub("", FORMULA.sub("", text)))):
        return Drop(counted)
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    n = len(lines)
    if n >= ELLIPSIS_LINES and sum(line.endswith(ELLIPSIS_END) for line in lines) > MOST_ELLIPSIS * n:
        return Drop("lines that are cut")
    if n >= SHORT_LINES and sum(len(line.lstrip("-*•·●◆■▪○ ")) for line in lines) < SHORT_LINE * n and sum(
            line.endswith(SENTENCE_END) for line in lines) < FEW_ENDS * n and not _is_of_numbers(text):
        return Drop("short lines")
    if n < SHORT_LINES and text.count(" ") + text.count("|") > MOST_GAPS * len(text):
        kinds = count_classes(text)
        if kinds[HAN] > 0.5 * len(text) and kinds[PUNCTUATION] < FEW_MARKS * len(text):
            return Drop("menu")
    return text


def _is_of_numbers(text: str) -> bool:
    kinds = count_classes(text)
    return kinds[DIGIT] + kinds[SYMBOL] > kinds[HAN] + kinds[LATIN]


def _too_many_signs(text: str) -> str | None:
    """The reason to drop a text with too many symbols or digits, or None. Numbers in sentences count as text."""
    kinds = count_classes(text)
    length = len(text) - kinds[SPACE]
    if kinds[SYMBOL] > MOST_SYMBOLS * length:
        return "symbols"
    digits = kinds[DIGIT]
    signs = kinds[SYMBOL] + digits + kinds[PUNCTUATION]
    if digits > MOST_DIGITS * length or signs > MOST_SIGNS * length:
        in_text = sum(char.isdecimal() for number in NUMBER_IN_TEXT.findall(text) for char in number)
        digits, signs = digits - in_text, signs - in_text
    if digits > MOST_DIGITS * length:
        return "digits"
    return "signs" if signs > MOST_SIGNS * length else None


# ---------------------------------------------------------------------------------------------
# repetition


DUPLICATE_LINES = 0.287  # share of the lines that stood before
DUPLICATE_LINE_CHARACTERS = 0.25  # and of the characters
# characters a gram → share of the text in grams that stood before: statutes, which repeat their terms, reach 0.54, 0.46
# and 0.37 · share of the text that the most frequent gram has, if it is there so often
DUPLICATE_GRAMS = {8: 0.55, 12: 0.47, 16: 0.38}
TOP_GRAMS = {3: 0.25, 6: 0.25, 16: 0.12}
OFTEN = 6
GRAMS = {2: (1, 1), 3: (2, 1), 4: (2, 2), 6: (4, 2), 8: (4, 4), 12: (8, 4), 16: (8, 8)}  # the two parts of each


def gram_hashes(codes: np.ndarray, wanted: set[int]) -> dict[int, np.ndarray]:
    """The 64-bit hashes of all grams of the wanted numbers of characters, in order of their first characters."""
    hashes = {1: codes.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)}

    def of(n: int) -> np.ndarray:
        if n not in hashes:
            first, second = GRAMS[n]
            a, b = of(first), of(second)
            mixed = a[:len(codes) - n + 1] * np.uint64(0xBF58476D1CE4E5B9) + b[first:first + len(codes) - n + 1]
            hashes[n] = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
        return hashes[n]

    return {n: of(n) for n in sorted(wanted) if len(codes) >= n}


def repetition_shares(text: str) -> dict[str, float]:
    """How much of a text is repeated, as shares: "lines" and "line characters" (lines that stood before), "top 3", …
    (the most frequent gram of three characters, if it is there OFTEN), "repeated 8", … (grams of eight characters that
    stood before).

    White space is not counted. In place of words, as in Gopher (arXiv:2112.11446, table A1) and FineWeb-2, the grams
    are of characters: a Chinese word has about 1.7. A character counts once, however many repeated grams cover it.
    """
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    total = sum(map(len, lines)) or 1
    seen = set(lines)
    shares = {"lines": 1 - len(seen) / max(1, len(lines)) if lines else 0.0,
              "line characters": 1 - sum(map(len, seen)) / total}
    codes = code_points("".join(text.split()))
    size = len(codes)
    bits = np.uint64(max(1, size).bit_length())
    places = np.arange(size, dtype=np.uint64)
    position = (np.uint64(1) << bits) - np.uint64(1)
    for n, hashes in gram_hashes(codes, {*TOP_GRAMS, *DUPLICATE_GRAMS}).items():
        # sorted by hash and then by place: of equal hashes all but the first stood before
        keys = np.sort(hashes & ~position | places[:len(hashes)])
        equal = (keys[1:] >> bits) == (keys[:-1] >> bits)
        if n in TOP_GRAMS:
            ends = np.flatnonzero(~equal)
            most = int(np.diff(ends, prepend=-1, append=len(equal)).max()) if len(equal) else 1
            shares[f"top {n}"] = min(1.0, most * n / size) if most >= OFTEN else 0.0
        if n in DUPLICATE_GRAMS:
            covered = np.zeros(size + 1, np.int32)
            again = (keys[1:][equal] & position).astype(np.int64)
            covered[again] += 1  # each place is there once
            covered[again + n] -= 1
            shares[f"repeated {n}"] = float(np.count_nonzero(np.cumsum(covered) > 0)) / size
    return shares


def judge_repetition(text: str, options: Options, counts: Counter) -> str | Drop:
    """Drop a text that repeats its lines, or its grams of characters: see repetition_shares."""
    shares = repetition_shares(text)
    if shares["line characters"] > DUPLICATE_LINE_CHARACTERS or (
            shares["lines"] > DUPLICATE_LINES and shares["line characters"] > DUPLICATE_LINE_CHARACTERS / 2):
        return Drop("repeated lines")
    if any(shares.get(f"top {n}", 0) > most for n, most in TOP_GRAMS.items()):
        return Drop("one phrase again and again")
    if any(shares.get(f"repeated {n}", 0) > most for n, most in DUPLICATE_GRAMS.items()):
        return Drop("repeated passages")
    return text


FILTERS = (
    Step("blocklist", "drop a text with a word of the file of --blocklist; words in Latin letters must stand alone",
         "the list is the user's", "whole", apply_blocklist, lambda options: bool(options.blocklist)),
    Step("length", "drop a text with fewer than --min_chars or more than --max_chars characters, without white space",
         "common practice; the numbers are flags", "text", check_length),
    Step("language", "drop a text whose letters, or whose lines, are by less than --min_han Chinese; Japanese "
         "by its kana, Korean by its hangul; code, formulas and addresses are not counted",
         "script shares: hanzi tell Chinese from all others but Japanese",
         "whole", judge_language),
    Step("symbols", "drop a text of over 25% symbols, 40% digits or 65% signs, of cut lines, of menus; formulas, sums, "
         "tables and numbers before hanzi count as text",
         "Gopher's ratios of symbols and of lines with an ellipsis, set on real text", "text", judge_symbols),
    Step("repetition", "drop a text in which repeated lines, one phrase or repeated passages take more than "
         "their share (docs/DATA.md, Repetition)",
         "Gopher and FineWeb-2 (cmn_Hani), from words to characters", "text", judge_repetition),
)
