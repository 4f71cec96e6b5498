"""The numbers of a text in order, and the signs between them: two chats that differ in one of these are not
duplicates, however alike their words are. What counts too much does no harm, as copies of a text have it both; what
counts too little makes one of two problems."""

import re
import unicodedata
from functools import lru_cache

DIGITS = "0-9０-９"
VALUES = {char: value for value, chars in enumerate(
    ("零〇", "一壹", "二贰两俩", "三叁仨", "四肆", "五伍", "六陆", "七柒", "八捌", "九玖")) for char in chars}
TENS = {"十": 10, "拾": 10, "百": 100, "佰": 100, "千": 1000, "仟": 1000}
MYRIADS = {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
SHORT = {"廿": "二十", "卅": "三十", "卌": "四十"}
HAN = "".join([*VALUES, *TENS, *MYRIADS, *SHORT])
# ①, Ⅲ, ½, ² and the like: characters that are a number, without the hanzi and the digits; and 半, which is no digit
SIGNS = "半" + "".join(char for char in map(chr, range(0x80, 0x3400)) if unicodedata.category(char) in ("No", "Nl"))
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
ALWAYS_MINUS = "负⁻₋"
MINUS = "-－−﹣–" + ALWAYS_MINUS
OPERAND = re.compile(rf"[A-Za-z{DIGITS}{HAN}{SIGNS})）\]】%％]\s*$")  # a minus behind one of these is no sign
TWO_DIGITS = re.compile(rf"[{''.join(VALUES)[2:]}]{{2}}")
ENGLISH = {word: str(value) for value, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen".split())}
ENGLISH |= {word: str(value) for value, word in zip(range(20, 100, 10), (
    "twenty thirty forty fifty sixty seventy eighty ninety".split()), strict=True)}
ENGLISH |= {"hundred": "100", "thousand": "1000", "million": "1000000", "billion": "1000000000"}
# These keep their own names, as third is 3. or 1/3, and neither is three
ENGLISH |= {word: word for word in (
    "half halves quarter dozen first second third fourth fifth sixth seventh eighth ninth tenth twice double "
    "triple").split()}
# A character class first, as above; that no letter is before the word is looked at behind its first letter
ENGLISH_NUMBER = re.compile("[{}](?<![A-Za-z].)(?i:{})(?![A-Za-z])".format(
    "".join(sorted({case(word[0]) for word in ENGLISH for case in (str.lower, str.upper)})),
    "|".join(f"(?<={first})(?:{'|'.join(word[1:] for word in ENGLISH if word[0] == first)})s?"
             for first in sorted({word[0] for word in ENGLISH}))))
# Words with one numeral that count nothing. They are found by the numeral and what is on its two sides.
WORD_AFTER = {
    "十": "分足", "百": "姓科货般", "千": "古里秋方", "万": "物能分事", "三": "角明", "四": "周处川肢", "五": "官行谷",
    "七": "夕", "八": "卦", "两": "岸旁侧性", "千万": "别不要记注小"}
MINUTES = "十分钟", "十分之"
# Alone they are surnames (陆, 伍) and parts of words (收拾): they count like 一, and at the end of a clause
FORMAL = "壹贰叁肆伍陆柒捌玖拾佰仟"
CLAUSE_END = re.compile(r"\s*(?:[，。；：！？、）)\],.;:!?]|$)")
# "一" is an article and a part of many words (一般, 统一): it counts with one of these behind it, or "第" and the like
ONE_BEFORE = frozenset("第初负加减乘除以于期拜周之选得剩点又从到至比⁻")
ONE_AFTER = frozenset(
    "个只条张本支枝件斤克吨米里尺寸元角分块毛天日号月年岁秒钟周星小倍层楼排列组班级人位名口头匹棵朵颗粒片双副辆台架艘间座栋所"
    "家户页章节句字份批箱袋瓶杯碗盒桶包筐堆车趟场项步门科折瓣公千平立加减乘除等季代世英海光亩根把套枚盏扇滴壶盘袭届轮次种段对群串束")
ONE_ALONE_AFTER = ONE_AFTER | frozenset("半又刻分幅首篇部封顶圈遍声餐顿碟勺盆罐桌卷册课题问道尾行笔面")
# The signs of arithmetic, in one way of writing
OPERATORS = {sign: normal for normal, signs in {
    "+": "+＋", "-": "-−－﹣", "×": "×xX*＊∗⋅·", "÷": "÷/／", "=": "=＝", "<": "<＜", ">": ">＞", "≤": "≤⩽", "≥": "≥⩾",
    "^": "^＾", "√": "√"}.items() for sign in signs}
OPERATORS |= {"<=": "≤", ">=": "≥", "**": "^", r"\times": "×", r"\cdot": "×", r"\div": "÷", r"\sqrt": "√", r"\le": "≤",
              r"\leq": "≤", r"\ge": "≥", r"\geq": "≥"}
ROOTS = "√", r"\sqrt"
BEFORE_OPERATOR = frozenset(f"0123456789０１２３４５６７８９{HAN}{SIGNS}()（）[]{{}}［］%％‰")
OPERATOR = re.compile(
    rf"[+＋\-−－﹣×xX*＊∗⋅·÷/／=＝<＜>＞≤⩽≥⩾^＾√\\](?:(?<=[<>])=|(?<=\*)\*|(?<=\\)(?:times|cdot|div|sqrt|leq?|geq?)|(?<!\\))"
    rf"(?=\s*(?:(?<![xX])[-−－+√\\]\s*(?:sqrt)?)?(?:[{DIGITS}{HAN}{SIGNS}()（）\[\]{{}}［］]|[A-Za-z](?![A-Za-z])))")


def number_sequence(text: str) -> tuple[str, ...]:
    """All numbers of a text in order, each in one way of writing.

    Arabic numbers have their sign, decimals, fraction (3/4) and percent sign, without separators of thousands; Chinese
    ones, English ones and signs as ③ are written in Arabic digits (两 is 2, 一万二 is 12000); 半 and half stay. 一 and
    陆 alone count with a measure word behind them; a few words as 十分 and 万一 count nothing.
    """
    numbers, places = [], []
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
        if start and text[start - 1] in MINUS and (text[start - 1] in ALWAYS_MINUS or not OPERAND.search(
                text, max(0, start - 4), start - 1)):
            value = "-" + value
        numbers.append(value)
        places.append(start)
    english = [(match.start(), match[0].lower()) for match in ENGLISH_NUMBER.finditer(text)]
    if english:
        numbers = [value for _, value in sorted([*zip(places, numbers, strict=True), *(
            (start, ENGLISH.get(word) or ENGLISH.get(word[:-1], word)) for start, word in english)])]
    return tuple(numbers)


def operators(text: str) -> tuple[str, ...]:
    """The signs of arithmetic of a text in order, each in one way of writing: + - × ÷ = < > ≤ ≥ ^ √.

    They count between two numbers, brackets or single letters, with or without white space; √ needs none before it.
    """
    found = []
    for match in OPERATOR.finditer(text):
        sign, end = match[0], match.start()
        while end and text[end - 1].isspace():
            end -= 1
        before = text[end - 1:end]
        if sign in ROOTS or before and (before in BEFORE_OPERATOR or before.isascii() and before.isalpha() and not (
                end > 1 and text[end - 2].isascii() and text[end - 2].isalpha())):
            found.append(OPERATORS[sign])
    return tuple(found)


def _counts_nothing(text: str, word: str, start: int, end: int) -> bool:
    """True for a numeral that is a part of a word."""
    after = text[end:end + 1]
    if word == "万一":
        return after not in ONE_AFTER
    if word == "一" or word in FORMAL:
        return after not in ONE_ALONE_AFTER and (not start or text[start - 1] not in ONE_BEFORE) and not (
            word != "一" and CLAUSE_END.match(text, end))
    return bool(after) and after in WORD_AFTER.get(word, "") and text[start:end + 2] not in MINUTES


@lru_cache(1 << 14)
def _han_value(word: str) -> str:
    """A Chinese numeral in Arabic digits: 三十五 is 35, 二〇二四 is 2024, 一万二 is 12000. What is none (三四十, "30
    or 40") keeps its units as they are."""
    word = "".join(SHORT.get(char, char) for char in word)
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
