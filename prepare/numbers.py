"""The numbers of a text in order: two chats whose numbers differ are not duplicates, however alike their words are."""

import re
import unicodedata
from functools import lru_cache

DIGITS = "0-9０-９"
VALUES = {char: value for value, chars in enumerate(
    ("零〇", "一壹", "二贰两俩", "三叁仨", "四肆", "五伍", "六陆", "七柒", "八捌", "九玖")) for char in chars}
TENS = {"十": 10, "拾": 10, "百": 100, "佰": 100, "千": 1000, "仟": 1000}
MYRIADS = {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
HAN = "".join([*VALUES, *TENS, *MYRIADS])
# ①, Ⅲ, ½, ² and the like: characters that are a number, without the hanzi and the digits
SIGNS = "".join(char for char in map(chr, range(0x80, 0x3400)) if unicodedata.category(char) in ("No", "Nl"))
# One character class first: `re` then skips to the next of these characters. What comes before a match is looked at
# afterwards. A "," or "，" with three digits after it separates thousands.
NUMBER = re.compile(
    rf"[{DIGITS}{HAN}{SIGNS}](?:"
    rf"(?<=[{DIGITS}])(?:[{DIGITS}]{{0,2}}(?:[,，]\s?[{DIGITS}]{{3}}(?![{DIGITS}]))+|[{DIGITS}]*)(?:[.．][{DIGITS}]+)*"
    rf"(?:\s?[/／⁄]\s?[{DIGITS}]+)?(?:\s?[%％‰])?"
    rf"|(?<=[{HAN}])[{HAN}]*|)")
NO_DIGIT = re.compile(r"[\s,，]")
LEADING_ZEROS = re.compile(r"(?<![\d.])0+(?=\d)")
TO_ASCII = str.maketrans("０１２３４５６７８９．／⁄％", "0123456789.//%")
MINUS = "-－−﹣–负"
OPERAND = re.compile(rf"[A-Za-z{DIGITS}{HAN}{SIGNS})）\]】%％]\s*$")  # a minus behind one of these is no sign
TWO_DIGITS = re.compile(rf"[{''.join(VALUES)[2:]}]{{2}}")
# Words with one numeral that count nothing. They are found by the numeral and what is on its two sides.
WORD_AFTER = {
    "十": "分足", "百": "姓科货般", "千": "古里秋方", "万": "物能分事", "三": "角明", "四": "周处川肢", "五": "官行谷",
    "七": "夕", "八": "卦", "两": "岸旁侧性", "千万": "别不要记注小"}
MINUTES = "十分钟", "十分之"
FORMAL = "贰叁肆伍陆柒捌玖拾佰仟"  # alone they are surnames (陆, 伍) and parts of words (收拾): they count like 一
# "一" is an article and a part of many words (一般, 统一): it counts with one of these behind it, or "第" and the like
ONE_BEFORE = frozenset("第初负加减乘除以于期拜周")
ONE_AFTER = frozenset(
    "个只条张本支枝件斤克吨米里尺寸元角分块毛天日号月年岁秒钟周星小倍层楼排列组班级人位名口头匹棵朵颗粒片双副辆台架艘间座栋所"
    "家户页章节句字份批箱袋瓶杯碗盒桶包筐堆车趟场项步门科折瓣公千平立加减乘除等季代世英海光亩根把套枚盏扇滴壶盘袭届轮次种段对群串束")


def number_sequence(text: str) -> tuple[str, ...]:
    """All numbers of a text in order, each in one way of writing.

    Arabic numbers have their sign, decimals, fraction (3/4) and percent sign, without separators of thousands; Chinese
    ones and signs as ③ are written in Arabic digits (两 is 2, 一万二 is 12000). 一 and 陆 alone count with a measure
    word behind them; a few words as 十分 and 万一 count nothing.
    """
    numbers = []
    for match in NUMBER.finditer(text):
        word, start, end = match[0], match.start(), match.end()
        first = word[0]
        if first in HAN:
            if (len(word) == 1 or word == "千万" or word == "万一") and _counts_nothing(text, word, start, end):
                continue
            value = _han_value(word)
        elif first.isdecimal():
            value = word if word.isascii() and word.isdigit() else NO_DIGIT.sub("", word).translate(TO_ASCII)
            if value[0] == "0" or "/0" in value:
                value = LEADING_ZEROS.sub("", value)
        else:
            value = unicodedata.normalize("NFKC", word).replace("⁄", "/")
        if start and text[start - 1] in MINUS and (text[start - 1] == "负" or not OPERAND.search(
                text, max(0, start - 4), start - 1)):
            value = "-" + value
        numbers.append(value)
    return tuple(numbers)


def _counts_nothing(text: str, word: str, start: int, end: int) -> bool:
    """True for a numeral that is a part of a word."""
    after = text[end:end + 1]
    if word == "万一":
        return after not in ONE_AFTER
    if word in "一壹" or word in FORMAL:
        return after not in ONE_AFTER and (not start or text[start - 1] not in ONE_BEFORE)
    return bool(after) and after in WORD_AFTER.get(word, "") and text[start:end + 2] not in MINUTES


@lru_cache(1 << 14)
def _han_value(word: str) -> str:
    """A Chinese numeral in Arabic digits: 三十五 is 35, 二〇二四 is 2024, 一万二 is 12000. What is none (三四十, "30
    or 40") keeps its units as they are."""
    if len(word) > 24 or TWO_DIGITS.search(word) or not any(char in TENS or char in MYRIADS for char in word):
        return "".join(str(VALUES.get(char, char)) for char in word)
    total, part, digit, unit = 0, 0, None, 1
    for char in word:
        if char in VALUES:
            digit = VALUES[char]
            unit = 1 if digit == 0 else unit
        elif char in TENS:
            unit = TENS[char]
            part += (1 if digit is None else digit) * unit
            digit = None
        else:
            unit = MYRIADS[char]
            part += digit or 0
            total = (total + part) * unit if unit == 10**8 else total + (part or 1) * unit
            total, part, digit = total or unit, 0, None
    if digit is not None:
        part += digit * (unit // 10 if unit > 10 else 1)  # 一万二, 二百五
    return str(total + part)
