"""The steps that clean characters: encoding, unicode, controls.

Made for Chinese: its punctuation stays full-width, and what has a meaning of its own (x², ①, ½, ㎡) stays.
"""

import re
import unicodedata
from collections import Counter

from prepare.step import Drop, Options

# ---------------------------------------------------------------------------------------------
# encoding


_BYTE_OF = {chr(byte): byte for byte in range(0x80, 0x100)}  # Latin-1, and what cp1252 has in its place
for _byte in range(0x80, 0xA0):
    if _char := bytes([_byte]).decode("cp1252", "ignore"):
        _BYTE_OF[_char] = _byte
_NEXT = "[" + "".join(re.escape(char) for char, byte in _BYTE_OF.items() if byte < 0xC0) + "]"
_LATIN_3 = f"[\xe0-\xef]{_NEXT}{{2}}|[\xf0-\xf4]{_NEXT}{{3}}"
LATIN_RUN = re.compile(f"(?:[\xc2-\xdf]{_NEXT}|{_LATIN_3})+")  # UTF-8 read as Latin-1 or cp1252
LATIN_SURE = re.compile(f"(?:{_LATIN_3}){{2}}|\xe2\u20ac{_NEXT}|[\xc2\xc3][\x80-\xbf]")
# characters that frequent UTF-8 characters (，。的一在人是我这不大) begin with when they are read as GBK
GBK_MARK = re.compile("[锛銆鐨涓鍦浜鏄鎴杩澶鍙绗]")
GBK_RUN = re.compile(r"[^\x00-\x7f]{2,}")
RESIDUE = re.compile(r"(?:锟斤拷)+(?:锟斤?)?|烫{4,}|屯{4,}")
ABOUT_ENCODING = re.compile(r"乱码|编码|Unicode|UTF-?8|GBK|GB2312|锟斤拷[”」』\"]", re.I)
SAYS_GARBLED = re.compile("乱码|编码")  # in hanzi: the text itself can be read, and shows an example
MOST_LOST = 0.01  # share of the characters that may be lost; more, and the text cannot be read


def _latin_as_utf8(match: re.Match) -> str:
    try:
        return bytes(_BYTE_OF[char] for char in match.group()).decode("utf-8")
    except UnicodeDecodeError:
        return match.group()


def _gbk_as_utf8(text: str) -> str | None:
    """The text that was read as GBK, or None if it was not, or if it is not plainly Chinese afterwards."""
    for euro in ("€".encode("gb18030"), b"\x80"):  # Windows reads the byte 80 as €
        try:
            read = euro.join([part.encode("gb18030") for part in text.split("€")]).decode("utf-8")
            break
        except UnicodeError:
            continue
    else:
        return None
    foreign = [char for char in read if char > "\x7f"]
    chinese = sum("\u4e00" <= char <= "\u9fff" or "\u2010" <= char <= "\u2030" or "\u3000" <= char <= "\u303f"
                  or "\uff00" <= char <= "\uffef" for char in foreign)
    return read if len(foreign) >= 2 and chinese >= 0.9 * len(foreign) else None


def _repair_gbk(text: str, counts: Counter) -> str:
    read = _gbk_as_utf8(text)
    if read is None:  # a part of it, then: a byte lost in one line spoils only this line
        def run(match: re.Match) -> str:
            found = _gbk_as_utf8(match.group()) if GBK_MARK.search(match.group()) else None
            return match.group() if found is None else found

        lines = text.split("\n")
        for index, line in enumerate(lines):
            if GBK_MARK.search(line):
                found = _gbk_as_utf8(line)
                lines[index] = GBK_RUN.sub(run, line) if found is None else found
        read = "\n".join(lines)
    counts["texts read as GBK repaired"] += read != text
    return read


def repair_encoding(text: str, options: Options, counts: Counter) -> str | Drop:
    """Undo a wrong decoding where the bytes come out whole, and remove U+FFFD and 锟斤拷; a text with many is "
    "dropped."""
    if LATIN_SURE.search(text) and not SAYS_GARBLED.search(text):
        sure = LATIN_RUN.sub(_latin_as_utf8, text)
        counts["texts read as Latin-1 repaired"] += sure != text
        text = sure
    if GBK_MARK.search(text):
        text = _repair_gbk(text, counts)
        marks = GBK_MARK.findall(text)
        if len(marks) > 0.05 * len(text) and len(set(marks)) > 3:  # not 涓涓
            return Drop("wrong encoding")
    lost = text.count("\ufffd")
    residue = RESIDUE.findall(text) if ("锟斤拷" in text or "烫烫烫烫" in text or "屯屯屯屯" in text) else []
    if residue and ABOUT_ENCODING.search(text):
        residue = []
    if lost or residue:
        if lost + sum(map(len, residue)) > MOST_LOST * len(text):
            return Drop("lost characters")
        counts["lost characters removed"] += lost + len(residue)
        text = text.replace("\ufffd", "")
        text = RESIDUE.sub("", text) if residue else text
    return text


# ---------------------------------------------------------------------------------------------
# characters


# ＜ ＞ ｜ stay: <｜User｜> in ASCII would be a control string; so do （）［］｛｝，：；！？．～＃＊ and the rest
_SIGNS = "＋－＝％＆／＠"
SAFE_NFKC = re.compile(
    rf"[０-９Ａ-Ｚａ-ｚ{_SIGNS}\u2e9f\u2ef3\u2f00-\u2fd5\ufb00-\ufb06\U0001d400-\U0001d7ff]+"
    r"|[\uff61-\uff9f\uffa1-\uffdc]+|(?<=[0-9０-９A-Za-zａ-ｚ])．(?=[0-9０-９A-Za-zａ-ｚ])")
SMALL_FORM = re.compile(r"[\ufe10-\ufe16\ufe35-\ufe44\ufe47\ufe48\ufe50-\ufe52\ufe54-\ufe57\ufe59-\ufe5e]")
TO_FULL_WIDTH = str.maketrans(",:;!?()[]{}.", "，：；！？（）［］｛｝．")
SPACES = re.compile(r"[\u3000\xa0\u1680\u2000-\u200a\u202f\u205f]")
INDENT = re.compile(r"^[\u3000\xa0]+", re.M)
NOT_COMPOSED = re.compile(r"[\u0300-\u036f\u0591-\u0dff\u0e4d-\u0fff\u1100-\u11ff\u2126\u212a\u212b\u2329\u232a"
                          r"\u3099\u309a\uf900-\ufaff\U0002f800-\U0002fa1f]")


def _nfkc(match: re.Match) -> str:
    return unicodedata.normalize("NFKC", match.group())


def _small_form(match: re.Match) -> str:
    return unicodedata.normalize("NFKC", match.group()).translate(TO_FULL_WIDTH)


def normalize_unicode(text: str, options: Options, counts: Counter) -> str:
    """NFKC of the characters where it loses nothing, NFC of the others, and plain spaces. See SAFE_NFKC."""
    if text.isascii():
        return text
    text, n = SAFE_NFKC.subn(_nfkc, text)
    text, more = SMALL_FORM.subn(_small_form, text)
    counts["runs of full-width or compatibility characters"] += n + more
    if NOT_COMPOSED.search(text):
        text = unicodedata.normalize("NFC", text)
    if SPACES.search(text):
        text = SPACES.sub(" ", INDENT.sub("", text))  # the indent of Chinese paragraphs is layout
        counts["texts with other spaces"] += 1
    return text


_EMOJI = r"[\u203c-\u2bff\u3030\u303d\u3297\u3299\xa9\xae\U0001f000-\U0001faff]"
BREAKS = re.compile(r"\r\n?|[\x0b\x0c\x85\u2028\u2029]")
INVISIBLE = re.compile(
    r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200c\u200e"
    r"\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0d\ufeff\uffa0\ufff0-\ufffc\ufffe\uffff\ud800-\udfff"
    r"\U000e0001\U000e0100-\U000e01ef]+"
    rf"|(?<!{_EMOJI})(?<![#*0-9])[\ufe0e\ufe0f]|(?<=[\ufe0e\ufe0f])[\ufe0e\ufe0f]+"  # of an emoji they stay
    rf"|(?<!{_EMOJI})(?<!\ufe0f)\u200d|\u200d(?!{_EMOJI})"  # joins two emojis, or nothing
    r"|(?<![\U0001f3f4\U000e0020-\U000e007f])[\U000e0020-\U000e007f]+")  # flags of regions
PRIVATE_USE = re.compile(r"[\ue000-\uf8ff\U000f0000-\U0010ffff]+")
CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")  # only these tell of a broken file: the others
# are put in on purpose, as against copying
BLANK_LINES = re.compile(r"\n{4,}")
MOST_CONTROLS = 0.05


def tidy_lines(text: str) -> str:
    """The text without spaces at the ends of lines and of the text, and without more than two blank lines in a row."""
    if " \n" in text or "\t\n" in text:
        text = "\n".join([line.rstrip(" \t") for line in text.split("\n")])
    return BLANK_LINES.sub("\n\n", text).strip()


def _remove_invisible(text: str) -> str:
    while True:  # what one removal brings together (a joiner behind a joiner) may be another
        text, n = INVISIBLE.subn("", text)
        if not n:
            return text


def remove_controls(text: str, options: Options, counts: Counter) -> str | Drop:
    """Line feeds alone end lines; controls, invisible and private characters go; lines are tidied. A text with many
    controls or private characters is dropped."""
    if BREAKS.search(text):
        text = BREAKS.sub("\n", text)
    seen = _remove_invisible(text)
    plain = PRIVATE_USE.sub("", seen)
    private = len(seen) - len(plain)
    controls = len(CONTROLS.findall(text)) if len(seen) < len(text) else 0
    length = len(seen) + controls
    if controls + private > MOST_CONTROLS * length and length > 20:
        return Drop("control characters")
    counts["invisible characters removed"] += len(text) - len(seen)
    counts["private-use characters removed"] += private
    return tidy_lines(plain)
