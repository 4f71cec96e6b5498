"""Reads the answer from a reply and compares it exactly, in whatever notation it is written."""

import math
import re
import unicodedata
from fractions import Fraction

BEFORE_NFKC = [(re.compile(pattern), by) for pattern, by in (
    ("[²³]", ""),  # an exponent (cm²) is not an answer, but NFKC makes it a digit
    ("[¼-¾⅐-⅞]", lambda fraction: " " + unicodedata.normalize("NFKC", fraction.group())),  # 1½ is 1 1/2, not 11/2
)]
FOR_NUMBERS = [(re.compile(pattern, re.ASCII), by) for pattern, by in (
    ("[−–]", "-"),
    (r"\$|\\[,;! ]", ""),  # LaTeX: $…$, thin spaces, \%, \frac
    (r"\\%", "%"),
    (r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"(\1/\2)"),
    (r"(?<=\d),(?=\d{3}(?!\d))", ""),  # 1,000
    (r"(?<=m)\^?\{?[23]\}?", ""),  # cm^2
    (r"百分之\s*([\d.]+)", r"\1%"),  # in words: 百分之20, 4分之3
    (r"(\d+)\s*分之\s*(\d+)", r"\2/\1"),
    (r"\s*[/⁄]\s*", "/"),
    (r"\((-?[\d.]+)\)(?=/)", r"\1"),  # ((3)/(4)) is (3/4)
    (r"(?<=/)\(([\d.]+)\)", r"\1"),
    (r"-\(([\d.]+/[\d.]+)\)", r"-\1"),  # -(3/4)
    (r"(?<=\d)\s*又\s*(?=\d)", " "),  # 1又1/2 is 1 1/2
)]
NUMBER = re.compile(r"""
    (?P<minus>(?<![\d)%])-)?                                              # the - of 5-3 is not a sign
    (?: (?P<whole>\d+)(?:\s+|\s*\()(?P<over>\d+)/(?P<under>\d+)           # 1 1/2 and 1(1/2)
      | (?P<top>\d+(?:\.\d+)?|\.\d+)(?:/(?P<bottom>\d+(?:\.\d+)?))? )     # 7, 0.75, .5, 3/4
    (?P<percent>\s*%)?""", re.VERBOSE | re.ASCII)
MARKER = re.compile(r"答案\s*(?:[是为:])\s*:?")
LONGEST_NUMBER = 100  # characters; a longer match is a loop of digits, not an answer
THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)
WELL_FORMED = re.compile(r"\s*<think>.*</think>\s*<answer>.*\S.*</answer>\s*", re.DOTALL)
TAG = re.compile("</?(?:think|answer)>")


def normalize(text: str) -> str:
    """NFKC, which turns fullwidth digits, percent signs and colons into ASCII. ½ and ² are handled before it."""
    for pattern, by in BEFORE_NFKC:
        text = pattern.sub(by, text)
    return unicodedata.normalize("NFKC", text)


def to_fraction(match: re.Match) -> Fraction | None:
    """The exact value of a match of NUMBER; None for a division by zero or too many digits."""
    if len(match.group()) > LONGEST_NUMBER:
        return None
    try:
        if match["whole"]:
            value = int(match["whole"]) + Fraction(int(match["over"]), int(match["under"]))
        else:
            value = Fraction(match["top"]) / Fraction(match["bottom"] or 1)
    except ZeroDivisionError:
        return None
    return (-value if match["minus"] else value) / (100 if match["percent"] else 1)


def for_numbers(text: str) -> str:
    """Rewrite the numbers in normalized text to the notations that NUMBER matches."""
    for pattern, by in FOR_NUMBERS:
        text = pattern.sub(by, text)
    return text


def bare(text: str) -> str:
    """Normalized text without whitespace and final punctuation, to compare answers that are not numbers."""
    return re.sub(r"\s", "", text).rstrip("。.!?,;:、")


def read_answer(answer: str) -> Fraction | str:
    """The expected answer: a number if all of it is one (20, -3, 3/4, ((3)/(4)), 1(1/2), 10%), else bare text."""
    text = normalize(answer)
    match = NUMBER.fullmatch(for_numbers(text).strip("() \t\r\n").rstrip("。."))
    value = to_fraction(match) if match else None
    return bare(text) if value is None else value


def answer_of(reply: str) -> str:
    """The part of a reply to search for the answer, normalized: its last <answer>, else all of it except <think>."""
    blocks = ANSWER.findall(reply)
    return normalize(blocks[-1] if blocks else THOUGHT.sub("", reply))


def read_choice(reply: str, choices: list[str]) -> str | None:
    """The one of `choices` that the reply's answer contains; None if it contains none or several."""
    text = answer_of(reply)
    named = [choice for choice in choices if normalize(choice) in text]
    return named[0] if len(named) == 1 else None


def read_reply(reply: str, is_number: bool) -> Fraction | str | None:
    """The answer of a reply; None if `is_number` and the reply contains no number.

    The text searched is the last <answer>, else the reply without its <think>. After a marker ("答案：", "答案是" or
    "答案为"), only the rest of the line after the last marker is searched. Its first number counts, or the first one
    after the last = sign. Without a marker the last number counts. 3/4, 0.75 and 75% are equal. If not `is_number`, the
    answer is all the text searched, without whitespace and final punctuation.
    """
    text = answer_of(reply)
    *before, last = MARKER.split(text)
    if before:
        text = last.strip().partition("\n")[0]
    if not is_number:
        return bare(text)
    text = for_numbers(text)
    matches = NUMBER.finditer(text.rpartition("=")[2] if before else text)
    values = [value for match in matches if (value := to_fraction(match)) is not None]
    return values[0 if before else -1] if values else None


def is_well_formed(reply: str) -> bool:
    """True if the reply is one <think>…</think>, then one nonempty <answer>…</answer>, and only whitespace besides."""
    return len(TAG.findall(reply)) == 4 and WELL_FORMED.fullmatch(reply) is not None


def wilson(correct: int, n: int, z: float = 1.959964) -> list[float]:
    """The 95 % confidence interval of a proportion (Wilson 1927); unlike p ± 2σ, valid near 0 and 1 and for small n."""
    share, shrink = correct / n, 1 / (1 + z * z / n)
    middle = (share + z * z / (2 * n)) * shrink
    reach = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) * shrink
    return [max(0.0, middle - reach), min(1.0, middle + reach)]
