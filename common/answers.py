"""Reads the answer from a reply and compares it exactly, in whatever notation it is written."""

import math
import re
import unicodedata
from collections.abc import Iterable
from fractions import Fraction

BEFORE_NFKC = [(re.compile(pattern), by) for pattern, by in (
    (r"(?<![\d.])10([⁰¹²³⁴-⁹⁻]+)", lambda power: "10^" + unicodedata.normalize("NFKC", power[1])),  # 10³ is not 103
    ("[²³]", ""),  # an exponent (cm²) is not an answer, but NFKC makes it a digit
    ("[¼-¾⅐-⅞]", lambda fraction: " " + unicodedata.normalize("NFKC", fraction.group())),  # 1½ is 1 1/2, not 11/2
)]
ANNOTATION = re.compile("<<[^<>=]*=[^<>]*>>")  # GSM8K: 40+18=<<40+18=58>>58
# Applied in this order. No pattern may take quadratic time on a long run of digits, spaces or braces: a repetition
# begins after a literal or at the start of its run. Below the line with {}, there are only single spaces.
FOR_NUMBERS = [(re.compile(pattern, re.ASCII), by) for pattern, by in (
    ("[−–]", "-"),
    (r"(?<=\d)[¥€£]", " "),
    (r"(?:US|HK)?\\?[$¥€£]|\\[,;! ]", ""),  # LaTeX: $…$, thin spaces, \%, \frac{3}{4}, \frac34
    (r"\\%", "%"),
    (r"\{,\}", ","),
    (r"\\[cdt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))", r"(\1\2/\3\4)"),
    (r"\\(?:boxed|text|mathrm)(?![A-Za-z])|\\[()\[\]]", " "),
    (r"[{}\s]+", " "),
    (r" ?\^? ?\\circ(?![A-Za-z])", "°"),
    (r"(?<=\d),(?=\d{3}(?!\d))", ""),  # 1,000
    (r"(?<=m)(?: ?\^ ?)?[23](?!\d)|(?<=/s) ?\^ ?2(?!\d)", ""),  # cm^2, m/s^2
    (r"(?<=\d) ?(?:[×x*·]|\\times|\\cdot) ?10 ?\^ ?(?=[+-]?\d)", "×10^"),
    (r"(?<![\d.^×])10 ?\^ ?(?=[+-]?\d)", "1×10^"),
    (r"(?<![A-Za-z\d.])(\d+(?:\.\d+)?)[eE]([+-]?\d++)(?![A-Za-z\d]*\d)", r"\1×10^\2"),  # 1.5e3, not CYP2E1 or a hash
    (r"(?:零下|(?<![正胜平场局次盘\d])负) ?(?=[\d.(])", "-"),  # not of ±3, nor of a match: 胜3场负2场
    (r"百分之 ?([\d.]+)", r"\1%"),  # in words: 百分之20, 4分之3
    (r"(?<!\d)(\d+) ?分之 ?(\d+)", r"\2/\1"),
    (r" ?[/⁄] ?", "/"),
    (r"\( ?(-?[\d.]+) ?\)(?=/)", r"\1"),  # ((3)/(4)) is (3/4)
    (r"(?<=/)\( ?([\d.]+) ?\)", r"\1"),
    (r"-\( ?([\d.]+/[\d.]+) ?\)", r"-\1"),  # -(3/4)
    (r"(?<=\d) ?又 ?(?=\d)", " "),  # 1又1/2 is 1 1/2
)]
SCALES = {"%": Fraction(1, 100), "万": Fraction(10**4), "亿": Fraction(10**8), "万亿": Fraction(10**12)}
NUMBER_PATTERN = r"""
    (?P<minus>(?<![\d)%])-)?                                              # the - of 5-3 is not a sign
    (?: (?P<whole>\d+)(?:\ |\ ?\(\ ?)(?P<over>\d+)/(?P<under>\d+)         # 1 1/2 and 1(1/2)
      | (?P<top>\d+(?:\.\d+)?|\.\d+)                                      # 7, 0.75, .5
        (?: /(?P<bottom>\d+(?:\.\d+)?) | ×10\^(?P<exponent>[+-]?\d+) )? ) # 3/4, 1×10^3
    (?:\ ?(?P<scale>%|万亿|[万亿]))?"""
BEFORE_NUMBER = r"""
    (?: [ ()*+:=≈~约是为得有共] | 大约 | 大概 | 一共 | 总共 | 等于 | 答案? | 人民币 | RMB | \\approx
      | [∠△]?[A-Za-z]{1,3}\ ?[=≈] )*+                                     # x=5, AB=5
    (?! \d+\)[ *]*[㐀-鿿]{3})                                             # an item of a list: (3)解决问题
"""
AFTER_NUMBER = r"""
    (?=.{0,20}\Z)(?=(?:[^㐀-鿿]*[㐀-鿿]){0,6}[^㐀-鿿]*\Z)                 # a longer text is a phrase, not a unit
    (?: [ ()/°·μΩ*]
      | (?!hundred|thousand|million|billion|dozen)                        # the value is not the number before these
        (?: [A-Za-z]{3,} | [cdkn]?m | [CDKM]M | [mk]?g | KG | [mk]?[lL] | ML | m?s | h | t | k?[VWNJ] | m?A(?![㐀-鿿])
          | (?<=°)[CF] | k?Pa | Hz | [KMGT]B )(?![A-Za-z])                # 3x, 2a, 5G are not a number with a unit
      | 千(?=[克米瓦卡焦帕赫伏升]) | 百分点
      | [三四五六七八九十](?=[角边]形|角星|面体)
      | (?![零一二三四五六七八九十百千万亿半的以]|分之|根号)[㐀-鿿]      # not 5小时三十分, 3点半, 3的平方
    )*+ [。.?,;:、 ()]*"""
NUMBER = re.compile(NUMBER_PATTERN, re.VERBOSE | re.ASCII)
LEADING_NUMBER = re.compile(BEFORE_NUMBER + NUMBER_PATTERN, re.VERBOSE | re.ASCII)
ONLY_NUMBER = re.compile(BEFORE_NUMBER + NUMBER_PATTERN + AFTER_NUMBER, re.VERBOSE | re.ASCII)
MARKER = re.compile(r"答案\s*(?:[是为:])\s*:?")
LONGEST_NUMBER = 100  # characters; a longer match is a loop of digits, not an answer
LARGEST_EXPONENT = 100  # 1e999999999 would be an integer that fills the memory
THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)
TAG = re.compile("(</?(?:think|answer)>)")
# a reply that says one of these does not know the answer, or cannot give it
DECLINES = ("不知道", "不清楚", "不认识", "没听说过", "不了解", "答不上来", "没学过", "回答不了", "看不到", "不会")


class Scaled(Fraction):
    """The value of a number with a percent sign, 万 or 亿. `bare` is the number before that sign: 20 of 20%."""

    def __new__(cls, bare: Fraction, *, scale: Fraction):
        number = super().__new__(cls, bare * scale)
        number.bare = bare
        return number


def normalize(text: str) -> str:
    """NFKC, which turns fullwidth digits, percent signs and colons into ASCII; ½ and ² are handled before it.
    Calculator annotations <<…=…>> are removed."""
    for pattern, by in BEFORE_NFKC:
        text = pattern.sub(by, text)
    return ANNOTATION.sub(" ", unicodedata.normalize("NFKC", text))


def to_fraction(match: re.Match) -> Fraction | None:
    """The exact value of a match of NUMBER; None for a division by zero, too many digits or too large an exponent."""
    if len(match.group()) > LONGEST_NUMBER:
        return None
    exponent = int(match["exponent"] or 0)
    if abs(exponent) > LARGEST_EXPONENT:
        return None
    try:
        if match["whole"]:
            value = int(match["whole"]) + Fraction(int(match["over"]), int(match["under"]))
        else:
            value = Fraction(match["top"]) / Fraction(match["bottom"] or 1) * Fraction(10) ** exponent
    except ZeroDivisionError:
        return None
    value = -value if match["minus"] else value
    return Scaled(value, scale=SCALES[match["scale"]]) if match["scale"] else value


def for_numbers(text: str) -> str:
    """Rewrite the numbers in normalized text to the notations that NUMBER matches."""
    for pattern, by in FOR_NUMBERS:
        text = pattern.sub(by, text)
    return text.strip()


def bare(text: str) -> str:
    """Normalized text without whitespace and final punctuation, to compare answers that are not numbers."""
    return re.sub(r"\s", "", text).rstrip("。.!?,;:、")


def answer_of(reply: str) -> str:
    """The part of a reply to search for the answer, normalized: its last <answer>, else all of it except <think>."""
    blocks = ANSWER.findall(reply)
    return normalize(blocks[-1] if blocks else THOUGHT.sub("", reply))


def after_marker(text: str, is_number: bool) -> tuple[str, bool]:
    """The line after the last marker, else all of the text, and whether there is a marker.

    #### is also a heading in Markdown. It is a marker only if its line is nothing but a number with a unit, or if its
    line is the last one and begins with a number. If not `is_number`, any last line is enough.
    """
    *before, last = MARKER.split(text)
    _, hashes, rest = last.rpartition("####")
    if hashes:
        line, _, below = rest.strip().partition("\n")
        number = for_numbers(line)
        if ONLY_NUMBER.fullmatch(number) or not below and (not is_number or LEADING_NUMBER.match(number)):
            return line, True
    return (last.strip().partition("\n")[0], True) if before else (text, False)


def read_answer(answer: str) -> Fraction | str:
    """The expected answer: a number, or else the bare text that a reply must equal.

    The text is searched like a reply: <answer>, markers and ####, which GSM8K writes before the answer. It is a number
    if it holds exactly one (20, -3, 3/4, 1(1/2), 10%, 1e3), behind nothing but words like 约 or x=, and before nothing
    but a unit or a few words without digits (58个, 25 cm²). 5小时30分, 2:3 and B2 are text.
    """
    text, _ = after_marker(answer_of(answer), is_number=False)
    match = ONLY_NUMBER.fullmatch(for_numbers(text))
    value = to_fraction(match) if match else None
    return bare(text) if value is None else value


def read_choice(reply: str, choices: list[str]) -> str | None:
    """The one of `choices` that the reply's answer contains; None if it contains none or several."""
    text = answer_of(reply)
    named = [choice for choice in choices if normalize(choice) in text]
    return named[0] if len(named) == 1 else None


def read_reply(reply: str, is_number: bool) -> Fraction | str | None:
    """The answer of a reply; None if `is_number` and the reply contains no number.

    The text searched is the last <answer>, else the reply without its <think>. After a marker ("答案：", "答案是",
    "答案为" or "####"), only the rest of the line after the last marker is searched. Its first number counts, or the
    first one after the last = sign. Without a marker the last number counts. 3/4, 0.75 and 75% are equal. If not
    `is_number`, the answer is all the text searched, without whitespace and final punctuation.
    """
    text, marked = after_marker(answer_of(reply), is_number)
    if not is_number:
        return bare(text)
    text = for_numbers(text)
    matches = [*NUMBER.finditer(text.rpartition("=")[2] if marked else text)]
    values = map(to_fraction, matches if marked else reversed(matches))
    return next((value for value in values if value is not None), None)


def same_answer(expected: Fraction | str, read: Fraction | str | None) -> bool:
    """True if a reply's answer, from read_reply, is the expected one, from read_answer.

    Numbers are the same if their values are equal. They are also the same if exactly one has a percent sign, 万 or 亿
    and the numbers before it are equal, because the question often has the sign already: 20 and 20%. An expected
    number of at most 1 is taken for a share: 0.2 does not accept 0.2%.
    """
    if expected == read:
        return True
    if isinstance(expected, str) or not isinstance(read, Fraction) or isinstance(expected, Scaled) == isinstance(
            read, Scaled) or getattr(expected, "bare", expected) != getattr(read, "bare", read):
        return False
    return isinstance(expected, Scaled) or abs(expected) > 1 or abs(read) > abs(expected)


def given_in(reply: str, names: Iterable[str] = ()) -> str | None:
    """The first number in the reply's answer, else the first of `names` that is in it; None if it has neither."""
    text = answer_of(reply)
    if number := NUMBER.search(for_numbers(text)):
        value = to_fraction(number)
        return number.group() if value is None else str(value)
    return next((name for name in names if normalize(name) in text), None)


def phrase_of(reply: str) -> str | None:
    """The first of DECLINES that the reply's answer says, or None."""
    text = answer_of(reply)
    return next((phrase for phrase in DECLINES if phrase in text), None)


def declines(reply: str, names: Iterable[str] = ()) -> bool:
    """True if the reply's answer says one of DECLINES, and gives no number and none of `names`."""
    return phrase_of(reply) is not None and given_in(reply, names) is None


def is_well_formed(reply: str) -> bool:
    """True if the reply is one <think>…</think>, then one nonempty <answer>…</answer>, and only whitespace besides."""
    before, *parts = TAG.split(reply)  # text and tags in turn
    if parts[::2] != ["<think>", "</think>", "<answer>", "</answer>"]:
        return False
    _, between, answer, after = parts[1::2]
    return bool(answer.strip()) and not (before + between + after).strip()


def wilson(correct: int, n: int, z: float = 1.959964) -> list[float]:
    """The 95 % confidence interval of a proportion (Wilson 1927); unlike p ± 2σ, valid near 0 and 1 and for small n."""
    share, shrink = correct / n, 1 / (1 + z * z / n)
    middle = (share + z * z / (2 * n)) * shrink
    reach = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) * shrink
    return [max(0.0, middle - reach), min(1.0, middle + reach)]
