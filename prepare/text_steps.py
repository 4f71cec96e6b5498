"""Steps that clean a text: encoding, characters, markup, personal data, template lines. text_filters.py judges texts.

All rules are made for Chinese: the punctuation stays full-width, and what has a meaning of its own (x², ①, ½, ㎡) stays.
"""

import datetime
import functools
import html
import re
import unicodedata
from collections import Counter

from Config import UserError
from prepare.step import Drop, Options, Step
from prepare.text_filters import FILTERS
from text.content import CONTROL_STRING, TAG_PATTERN

# ---------------------------------------------------------------------------------------------
# code: cleaning of markup leaves it alone

# a fence that is closed · a fence with the name of a language, open to the end · `code`
CODE = re.compile(r"^[ \t]*(`{3,}|~{3,})[^\n`]*\n(?:.*?\n)??[ \t]*\1[`~]*[ \t]*$"
                  r"|^[ \t]*```[A-Za-z][A-Za-z+#]{0,14}[ \t]*\n.*|``[^\n]+?``|`[^`\n]+`", re.M | re.S)


def outside_code(text: str, clean, *rest) -> str:
    """The text with clean(part, *rest) in place of each part that is no code."""
    if "`" not in text and "~~~" not in text:
        return clean(text, *rest)
    parts, end = [], 0
    for match in CODE.finditer(text):
        parts += [clean(text[end:match.start()], *rest), match.group()]
        end = match.end()
    return "".join([*parts, clean(text[end:], *rest)])


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
MOST_LOST = 0.01  # share of the characters that may be lost; more, and the text cannot be read


def _latin_as_utf8(match: re.Match) -> str:
    try:
        return bytes(_BYTE_OF[char] for char in match.group()).decode("utf-8")
    except UnicodeDecodeError:
        return match.group()


def _gbk_as_utf8(text: str) -> str | None:
    """The text that was read as GBK, or None if it was not, or if it is not plainly Chinese afterwards."""
    try:
        read = text.encode("gb18030").decode("utf-8")
    except UnicodeError:
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
    """Undo a wrong decoding where the bytes come out whole, and remove U+FFFD and 锟斤拷; a text with many is dropped."""
    if LATIN_SURE.search(text):
        sure = LATIN_RUN.sub(_latin_as_utf8, text)
        counts["texts read as Latin-1 repaired"] += sure != text
        text = sure
    marks = GBK_MARK.findall(text, 0, 5000)
    if len(marks) > 1 and len(marks) * 100 > min(len(text), 5000):
        text = _repair_gbk(text, counts)
        if len(GBK_MARK.findall(text)) > 0.05 * len(text):
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


_EMOJI = r"[\u203c-\u3299\xa9\xae\U0001f000-\U0001faff]"
BREAKS = re.compile(r"\r\n?|[\x0b\x0c\x85\u2028\u2029]")
INVISIBLE = re.compile(
    r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200c\u200e"
    r"\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0d\ufeff\uffa0\ufff0-\ufffc\ufffe\uffff\ud800-\udfff"
    r"\U000e0001\U000e0100-\U000e01ef]+"
    rf"|(?<!{_EMOJI})(?<![#*0-9])[\ufe0e\ufe0f]|(?<=[\ufe0e\ufe0f])[\ufe0e\ufe0f]+"  # of an emoji they stay
    rf"|(?<!{_EMOJI})(?<!\ufe0f)\u200d|\u200d(?!{_EMOJI})"  # joins two emojis, or nothing
    r"|(?<![\U0001f3f4\U000e0020-\U000e007f])[\U000e0020-\U000e007f]+")  # flags of regions
PRIVATE_USE = re.compile(r"[\ue000-\uf8ff\U000f0000-\U0010ffff]+")
BLANK_LINES = re.compile(r"\n{4,}")
MOST_CONTROLS = 0.05


def tidy_lines(text: str) -> str:
    """The text without spaces at the ends of lines and of the text, and without more than two blank lines in a row."""
    if " \n" in text or "\t\n" in text:
        text = "\n".join([line.rstrip(" \t") for line in text.split("\n")])
    return BLANK_LINES.sub("\n\n", text).strip()


def _remove_controls(text: str) -> tuple[str, int, int]:
    """The text without invisible and private characters, and how many of either it had."""
    before = len(text)
    while True:  # what one removal brings together (a joiner behind a joiner) may be another
        text, n = INVISIBLE.subn("", text)
        if not n:
            break
    invisible = before - len(text)
    text = PRIVATE_USE.sub("", text)
    return text, invisible, before - invisible - len(text)


def remove_controls(text: str, options: Options, counts: Counter) -> str | Drop:
    """Line feeds alone end lines; controls, invisible and private characters go; lines are tidied."""
    if BREAKS.search(text):
        text = BREAKS.sub("\n", text)
    before = len(text)
    text, invisible, private = _remove_controls(text)
    if invisible + private > MOST_CONTROLS * before and before > 20:
        return Drop("control characters")
    counts["invisible characters removed"] += invisible
    counts["private-use characters removed"] += private
    return tidy_lines(text)


# ---------------------------------------------------------------------------------------------
# HTML


BLOCK = set("p div br hr li ul ol dl dt dd tr table thead tbody tfoot caption section article header footer main nav "
            "aside blockquote h1 h2 h3 h4 h5 h6 pre form fieldset figure figcaption center address details summary "
            "html head body title option".split())
INLINE = set("a abbr acronym b big cite code col colgroup del dfn em embed font i iframe img input ins kbd label link "
             "map mark meta nobr noscript object param picture q rp rt ruby s samp script select small source span "
             "strike strong style sub sup svg td textarea th time tt u var video audio wbr button area base".split())
# names that are no word of a command line or a program: their tag needs no closing tag
SURE = set("p div br hr li ul ol dl dt dd tr td th table thead tbody html head body h1 h2 h3 h4 h5 h6 blockquote strong "
           "em font center span img wbr nobr sup sub pre".split())
_NAMES = "|".join(sorted(BLOCK | INLINE, key=len, reverse=True))
_NAMES += "|" + _NAMES.upper()
# not in prose about a tag
TAG = re.compile(rf"<(/?)({_NAMES})(\s[^<>]{{0,3000}})?\s?/?>(?!\s?(?:标签|元素|标记|节点|tag|element))")
HIDDEN = re.compile(r"(<!--)|(-->)|<(/?)(script|style|SCRIPT|STYLE)(?:\s[^<>]*)?>")
DECLARATION = re.compile(r"<!DOCTYPE[^<>]*>|<\?xml[^<>]*\?>|<!\[CDATA\[|\]\]>", re.I)
PRE = re.compile(r"<pre(?:\s[^<>]*)?>(?:\s*<code(?:\s[^<>]*)?>)?((?:[^<]|<(?!/?pre\b))*)</pre>", re.I)
INLINE_CODE = re.compile(r"<code(?:\s[^<>]*)?>([^<>`\n]+)</code>", re.I)
RAISED = re.compile(r"<(su[pb])>([^<>\n]{1,20})</\1>", re.I)
ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
CITATION = re.compile(r"\[\d{1,3}(?:[-,]\d{1,3})*\]")
SUPERSCRIPT = dict(zip("0123456789+-=()n", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿ", strict=True))
SUBSCRIPT = dict(zip("0123456789+-=()", "₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎", strict=True))


def _without_hidden(text: str, counts: Counter) -> str:
    """The text without comments, scripts and style sheets, in one pass: `.*?` would take quadratic time on many."""
    parts, end, start, until = [], 0, 0, None
    for match in HIDDEN.finditer(text):
        comment, closes, slash, name = match.groups()
        if until is None and (comment or name and not slash):
            start, until = match.start(), "-->" if comment else name.lower()
        elif until is not None and (closes == until or slash and name.lower() == until):
            parts.append(text[end:start])
            end, until = match.end(), None
            counts["scripts, style sheets and comments removed"] += 1
    return "".join([*parts, text[end:]])


def _unescape(match: re.Match) -> str:
    char = html.unescape(match.group())
    if SPACES.fullmatch(char):
        return " "
    return "" if INVISIBLE.search(char) and char != "\u200d" or PRIVATE_USE.search(char) else char


def _code_of_pre(match: re.Match) -> str:
    code = ENTITY.sub(_unescape, TAG.sub("", match.group(1))).strip("\n")
    fence = "````" if "```" in code else "```"
    return f"\n{fence}\n{code}\n{fence}\n"


def _raised(match: re.Match) -> str:
    """x<sup>2</sup> is x², not x2."""
    kind, content = match.group(1).lower(), match.group(2).strip()
    if CITATION.fullmatch(content):
        return ""
    table = SUPERSCRIPT if kind == "sup" else SUBSCRIPT
    if content and all(char in table for char in content):
        return "".join(table[char] for char in content)
    if not content.isascii():
        return content
    return ("^" if kind == "sup" else "_") + (content if len(content) == 1 else f"({content})")


def _clean_html(text: str, closed: set[str], counts: Counter) -> str:
    def tag(match: re.Match) -> str:
        slash, name, attributes = match.groups()
        name = name.lower()
        if attributes and attributes.strip(" /\n\t") and "=" not in attributes:
            return match.group()  # a<b && c>d
        if not slash and not attributes and name not in closed and (
                name not in SURE or text[match.start() - 1:match.start()].isalnum() and name not in ("br", "hr", "img")):
            return match.group()  # List<Object>, cp <source> <target>
        counts["tags removed"] += 1
        if name == "li":
            return "" if slash else "\n- "
        return "\n" if name in BLOCK else " " if name in ("td", "th") else ""

    if "<" in text:
        text = DECLARATION.sub("", _without_hidden(text, counts))
        text = INLINE_CODE.sub(r"`\1`", RAISED.sub(_raised, text))
        text = TAG.sub(tag, text)
    if "&" in text:
        plain, n = ENTITY.subn(_unescape, text)
        if (CONTROL_STRING.search(plain) or TAG_PATTERN.search(plain)) and not (
                CONTROL_STRING.search(text) or TAG_PATTERN.search(text)):
            return text  # an escaped <|im_end|> must not become one
        counts["entities unescaped"] += n
        text = plain
    return text


def remove_html(text: str, options: Options, counts: Counter) -> str:
    """Tags of HTML go, <pre> and <code> become fences, entities are unescaped once; code and other <…> stay."""
    if "<" not in text and "&" not in text:
        return text
    clean = text
    if "</pre>" in text.lower():
        clean = outside_code(clean, lambda part: PRE.sub(_code_of_pre, part))
    closed = {name.lower() for name in re.findall(r"</([A-Za-z][A-Za-z0-9]*)\s?>", clean)}
    clean = outside_code(clean, _clean_html, closed, counts)
    return text if clean == text else tidy_lines(clean)


# ---------------------------------------------------------------------------------------------
# markdown


FRONT_MATTER = re.compile(r"\A(---|\+\+\+)[ \t]*\n(?:[\w-]+[ \t]*[:=].*\n|[ \t]+.*\n|- .*\n|\n)+\1[ \t]*(?:\n|\Z)")
IMAGE = re.compile(r"!\[[^\[\]\n]{0,300}\](?:\((?:[^()\n]|\([^()\n]*\)){0,2000}\)|\[[^\[\]\n]{0,100}\])")
_TARGET = r"(?:[a-z][a-z+.-]*:|//|/|#|\.{1,2}/|www\.|[\w%./-]+\.(?:html?|md|png|jpe?g|gif|svg|pdf|php|aspx?|zip)\b)"
LINK = re.compile(rf"\[([^\[\]\n]{{0,500}})\]\(\s?<?{_TARGET}(?:[^()\s]|\([^()\s]*\)){{0,2000}}"
                  r"(?:\s+[\"'“][^\n()]{0,300})?\s?\)", re.I)
REFERENCE = re.compile(rf"^ {{0,3}}\[([^\[\]^\n]{{1,100}})\]:[ \t]*<?{_TARGET}\S*[^\n]{{0,300}}$\n?", re.M | re.I)
REFERRED = re.compile(r"\[([^\[\]\n]{1,500})\] ?\[([^\[\]\n]{0,100})\]")
NOTE_DEFINED = re.compile(r"^ {0,3}\[\^([^\[\]\s]{1,60})\]:[ \t]*", re.M)
NOTE = re.compile(r"\[\^([^\[\]\s]{1,60})\]")
PLAIN_NOTE = re.compile(r"\d{1,3}|(?:ref|note|fn|注)[\w-]*")  # else [^abc] is a class of a regular expression
ATTRIBUTES = re.compile(r"\{:[^{}\n]{1,200}\}|(?<=[^\s{])[ \t]*\{[#.][A-Za-z][\w .#=\"-]*\}$", re.M)
TEMPLATE = re.compile(r"\{%[^\n]{1,300}?%\}|\{\{[<%][^\n]{1,300}?[%>]\}\}")
CONTAINER = re.compile(r"^ {0,3}:::[^\n]{0,100}$\n?", re.M)
AUTOLINK = re.compile(r"<((?:https?|ftp)://[^\s<>]{1,500})>")
RULER = re.compile(r"^[ \t]*(?:\|?[ \t]*:?-{3,}:?[ \t]*(?:\|[ \t]*:?-{3,}:?[ \t]*)*\|?|={4,}|\*{4,}|_{4,})$", re.M)
LONG_RULE = re.compile(r"([-=*_])\1{3,}")
MARKDOWN_SIGNS = re.compile(r"[\[{:<]|---|===|\*\*\*\*|____")


def _clean_markdown(text: str, notes: set[str], references: set[str], counts: Counter) -> str:
    def note(match: re.Match) -> str:
        return "" if match.group(1) in notes or PLAIN_NOTE.fullmatch(match.group(1)) else match.group()

    def referred(match: re.Match) -> str:
        return match.group(1) if (match.group(2) or match.group(1)).lower() in references else match.group()

    if "[" in text:
        text, images = IMAGE.subn("", text)
        text, links = LINK.subn(r"\1", text)
        text = REFERENCE.sub("", text)
        text = REFERRED.sub(referred, text) if references else text
        text = NOTE.sub(note, NOTE_DEFINED.sub("", text))
        counts["images removed"] += images
        counts["link targets removed"] += links
    if "{" in text:
        text = ATTRIBUTES.sub("", TEMPLATE.sub("", text))
    if ":::" in text:
        text = CONTAINER.sub("", text)
    if "<" in text:
        text = AUTOLINK.sub(r"\1", text)
    return RULER.sub(lambda match: LONG_RULE.sub(r"\1\1\1", match.group()), text)


def clean_markdown(text: str, options: Options, counts: Counter) -> str:
    """Pointers to what is not there go: images, link targets, notes, front matter. What a chat model writes stays:
    headings, lists, emphasis, code, tables (their rulers with three dashes a column)."""
    if not MARKDOWN_SIGNS.search(text):
        return text
    clean, n = FRONT_MATTER.subn("", text)
    counts["front matter removed"] += n
    notes = set(NOTE_DEFINED.findall(clean)) if "[^" in clean else set()
    references = {name.lower() for name in REFERENCE.findall(clean)} if "]:" in clean else set()
    clean = outside_code(clean, _clean_markdown, notes, references, counts)
    return text if clean == text else tidy_lines(clean)


# ---------------------------------------------------------------------------------------------
# traditional characters


@functools.lru_cache
def _converter():
    """OpenCC's converter, made once a process. Raises UserError if the package is missing."""
    try:
        from opencc import OpenCC
    except ImportError as error:
        raise UserError("--simplify needs OpenCC: pip install opencc") from error
    return OpenCC("t2s")


def simplify(text: str, options: Options, counts: Counter) -> str:
    """Traditional characters become simplified ones, words stay (t2s). Raises UserError if OpenCC is missing."""
    if text.isascii():
        return text
    simple = _converter().convert(text)
    counts["texts simplified"] += simple != text
    return simple


# ---------------------------------------------------------------------------------------------
# personal data


MAIL = re.compile(r"(?<![\w.%+-])[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}@((?:[A-Za-z0-9-]{1,63}\.){1,5}[A-Za-z]{2,18})"
                  r"(?![\w-]*@)(?![A-Za-z0-9-])", re.A)
NO_MAIL = re.compile(r"(?:.*\.)?example\.(?:com|org|net|cn)|.*\.(?:png|jpe?g|gif|svg|webp|js|css|py|java|html?)", re.I)
_PROVINCES = "1[1-5]|2[1-3]|3[1-7]|4[1-6]|5[0-4]|6[1-5]|71|8[1-3]"
IDENTITY = re.compile(rf"(?<![0-9A-Za-z_])((?:{_PROVINCES})[0-9]{{4}})([ -]?)((?:18|19|20)[0-9]{{6}})\2([0-9]{{3}}[0-9Xx])"
                      r"(?![0-9A-Za-z_])")
MOBILE = re.compile(r"(?<![0-9_])(?:(?:\+|00)?86[- ]?|[（(]\+?86[)）][- ]?)?1[3-9][0-9](?:[0-9]{8}|([- ])[0-9]{4}\1[0-9]{4})"
                    r"(?![0-9_]|\.[0-9]|\1[0-9])")
# what is counted with such a number: then it is a quantity
UNITS = re.compile(
    r" ?(?:[美欧日英港台韩泰]?元|万|亿|千(?!里)|百(?!度)|[块角亩顷吨斤克米尺寸丈升磅度秒岁倍次名个(?!人)只头匹条件艘座栋册页篇字颗粒枚株棵瓶桶袋箱碗杯层]"
    r"|人(?!工|事)|分(?!机)|年|月(?!亮)|天(?!天)|日|小时|分钟|毫|厘|公[里斤顷吨升]|千[米克瓦]|平方|立方|台(?!湾)|根(?!据)|支(?!付|持)|里(?!面)"
    r"|种|项|户|股|票|位(?!于)|本(?!人)|字节|比特|像素|[℃%‰°²³])"
    r"|(?:[kcmnμ]?[mglsWVA]|[KMGT]i?B|[kMG]?Hz|[kM]?Pa|k?J|px|bits?|bytes?)(?![A-Za-z])")
ARITHMETIC_AFTER = re.compile(r" ?[+×÷*=^<>≈≤≥]")
ARITHMETIC_BEFORE = re.compile(r"[×÷*^≈≤≥] ?\Z|[0-9)] ?[+=] ?\Z|[0-9)] - \Z|(?<![\n0-9])[0-9]\.\Z|[0-9]{2}\.\Z")
TOKEN_BEFORE = re.compile(r"[A-Za-z]+\Z")
CALLS = re.compile(r"(?:tel|telephone|phone|mobile|mob|cell|qq|vx|wx|v|whatsapp|wechat|fax|t|m)", re.I)
WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
MAIL_MASK, MOBILE_MASK, IDENTITY_MASK = "［邮箱］", "［手机号］", "［身份证号］"


def identity_is_valid(number: str) -> bool:
    """Whether 18 characters are an identity number: the birth date is a date and the check digit is right.

    The check digit is that of GB 11643-1999 (ISO 7064, MOD 11-2). The older numbers of 15 digits, which have none, are
    not looked for: they have not been valid since 2013, and many other numbers look like them.
    """
    try:
        datetime.date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
    except ValueError:
        return False
    total = sum(int(digit) * weight for digit, weight in zip(number, WEIGHTS, strict=False))
    return "10X98765432"[total % 11] == number[17].upper()


def mask_personal(text: str, options: Options, counts: Counter) -> str:
    """Mail addresses, mobile and identity numbers become placeholders, in code and addresses of pages too."""
    def mail(match: re.Match) -> str:
        after = text[match.end():match.end() + 2]
        if NO_MAIL.fullmatch(match.group(1)) or match.group().startswith("git@") or after[:1] == ":" and (
                after[1:2].isalnum() and after.isascii()):  # git@host:path
            return match.group()
        counts["mail addresses masked"] += 1
        return MAIL_MASK

    def identity(match: re.Match) -> str:
        if not identity_is_valid(match.group(1) + match.group(3) + match.group(4)):
            return match.group()
        counts["identity numbers masked"] += 1
        return IDENTITY_MASK

    def mobile(match: re.Match) -> str:
        before = text[max(0, match.start() - 12):match.start()]
        word = TOKEN_BEFORE.search(before)
        if (word and not CALLS.fullmatch(word.group()) or UNITS.match(text, match.end())
                or ARITHMETIC_AFTER.match(text, match.end()) or ARITHMETIC_BEFORE.search(before)):
            return match.group()
        counts["mobile numbers masked"] += 1
        return MOBILE_MASK

    if "@" in text:
        text = MAIL.sub(mail, text)
    text = IDENTITY.sub(identity, text)
    return MOBILE.sub(mobile, text)


# ---------------------------------------------------------------------------------------------
# template lines


_SITES = "微信|朋友圈|微博|新浪微博|QQ空间|QQ好友|QQ|空间|豆瓣|知乎|贴吧|人人网|腾讯微博|复制链接|更多"
_MENU = ("首页|主页|网站首页|关于我们|联系我们|网站地图|加入我们|友情链接|广告服务|法律声明|隐私政策|意见反馈|帮助中心|客服中心|"
         "设为首页|加入收藏|版权声明|免责声明|人才招聘|诚聘英才|联系方式|用户协议|登录|注册|手机版|电脑版|返回顶部|上一页|下一页|尾页|末页")
_SEPARATOR = r"[ \t|丨｜/·•›»>,，、]+"
_END = r"[。.!！~…>》）)\]】]*"
_ASK = r"(?:请|欢迎(?:大家)?|记得|更多\S{0,12}[，,]?\s?(?:请|欢迎)?|想\S{0,16}[，,]\s?(?:请|就)?|如果\S{0,16}[，,]\s?(?:请|欢迎)?)"
TEMPLATES = {name: re.compile(pattern, re.I) for name, pattern in {
    "calls to follow or scan": (
        rf"{_ASK}?(?:扫码|长按|搜索|点击)?(?:并)?(?:关注|订阅)(?:我们的?|本站的?|官方|下方|上方|我的?)*(?:微信)?(?:官方)?(?:公众号|公众平台|公号|订阅号|视频号|服务号|微信号)"
        r".{0,30}"
        rf"|{_ASK}?(?:微信)?(?:扫码|扫一扫|扫描|长按|识别)+(?:上方|下方|上图|下图|上面|下面|图中|左侧|右侧|文末|微信|的|或|以下)*(?:二维码|小程序码).{{0,30}}"
        rf"|{_ASK}?(?:微信)?(?:扫码|扫一扫)(?:关注|加入|进群|下载|添加|领取|报名|阅读|查看|咨询).{{0,20}}"
        r"|(?:微信)?公众(?:号|平台)[:：] ?[\w\-（）()]{2,30}"
        rf"|{_ASK}?(?:添加|加)(?:我的?|小编的?|客服的?|老师的?|作者的?)?(?:个人)?(?:微信号?|V信|QQ|QQ群|微信群)[:： ]*[\w\-［］]{{4,30}}.{{0,20}}"
        r"|(?:微信号|联系QQ|QQ群号?|微信/QQ|客服微信|咨询微信)[:： ]+[\w\-［］]{4,30}"
        r"|(?:如果)?(?:喜欢|觉得).{0,20}(?:点赞|点个赞|在看|一键三连|转发|素质三连).{0,20}"
        r"|(?:求|欢迎|记得|别忘了)?(?:点赞|关注|收藏|转发|评论|投币|分享|在看|三连|[、，+＋和 ])+(?:支持一下|哦|吧)?"),
    "calls to read on": (
        r"(?:请|直接)?(?:点击|戳|猛戳|单击|点)(?:这里|此处|下方|左下角|文末|页面|底部|下面|上方|[“\"「『])*的?"
        r"(?:阅读原文|阅读全文|查看全文|查看原文|原文链接|阅读更多|查看更多|展开全文|了解更多|蓝字|进入)[”\"」』]?.{0,20}"
        r"|(?:阅读|查看|展开|显示|浏览)(?:原文|全文|更多|全部|剩余\S{1,6})|收起(?:全文)?|加载中[.…]*|加载更多|正在加载[.…]*|点击加载更多|全文完|未完待续"),
    "rights and sources": (
        r"(?:©|\(c\)|（c）|copyright|版权所有).{0,80}|.{0,30}(?:版权所有|all rights reserved)[^，；]{0,30}"
        r"|.{0,40}[京津沪渝冀豫云辽黑湘皖鲁新苏浙赣鄂桂甘晋蒙陕吉闽贵粤青藏川宁琼港]ICP(?:备|证).{0,40}|.{0,20}公网安备 ?[0-9]{6,}号?.{0,20}"
        r"|[（(【\[]?(?:责任编辑|责编|本文编辑|值班编辑|实习编辑|编辑|文章编辑|网络编辑|见习编辑)[:：]\s?[^，。]{1,20}[）)】\]]?"
        r"|(?:原标题|原题|文章来源|稿件来源|信息来源|图片来源|素材来源|本文来源|原文出处|原文链接|原文地址|本文链接|本文地址|转载地址|文章链接|转自)[:：].{1,100}"
        r"|(?:[（(【]\s?)?本文(?:转载自|转自|来自|来源于|首发于|首发|由.{1,20}(?:授权|投稿|供稿)|系.{1,20}(?:原创|授权)).{0,60}"
        r"|.{0,20}转载(?:请|须|需|时请|必须)(?:务必|保留|注明|联系|标明|获得).{0,50}|.{0,12}未经.{0,10}(?:授权|许可|允许|同意|书面).{0,20}(?:转载|复制|使用|摘编).{0,40}"
        r"|(?:免责声明|版权声明|特别声明|郑重声明|风险提示|法律声明)[:：].{0,100}|(?:免责声明|版权声明)"
        r"|(?:以上|本文|文中|文章)(?:内容|观点|图片|所述)*(?:仅代表|只代表|均来自|来源于?|不代表).{0,50}"
        r"|(?:如有|若有|如).{0,10}侵权.{0,10}(?:联系|告知|删除).{0,30}|声明[:：].{0,20}(?:转载|版权|侵权|网友).{0,80}"),
    "navigation": (
        r"(?:您?(?:当前|现在|目前)?(?:所在)?的?位置(?:是)?[:： ]+|当前位置[:： ]*)?(?:首页|主页|网站首页|官网首页)(?:\s?(?:>|›|»|＞|→|/|\\|&gt;|-)+\s?[^>›»＞\n]{1,24}){1,7}"
        r"|(?:您?(?:当前|现在|目前)?(?:所在)?的?位置(?:是)?[:： ]+)[^，。]{1,50}"
        rf"|[\[【|]?(?:{_MENU})(?:{_SEPARATOR}\S{{1,8}}){{2,30}}|(?:\S{{1,8}}{_SEPARATOR}){{2,30}}(?:{_MENU})[|\]】]?"
        rf"|(?:{_MENU})(?:{_SEPARATOR}(?:{_MENU})){{0,30}}"
        r"|(?:上一篇|下一篇|上一章|下一章|前一篇|后一篇|上一条|下一条)[:： ]{1,2}.{1,60}|(?:上|下|前|后)一(?:篇|章|页)(?:[ |/]*(?:上|下|后)一(?:篇|章|页)|[ |/]*目录)*"
        r"|(?:相关|推荐|热门|延伸|精彩|更多|猜你|往期|最新|为您)+(?:阅读|推荐|文章|链接|新闻|内容|标签|喜欢|回顾|资讯)+[:：]?"
        r"|(?:打印|关闭)(?:本页|窗口|页面|此页|文章)?(?:[ |]*(?:打印|关闭|收藏|返回)(?:本页|窗口|页面|首页|顶部)?)*|返回(?:首页|顶部|列表|目录|上页|上一页)"),
    "share bars and counters": (
        rf"(?:一键)?分享(?:到|至|给好友|给朋友)?[:：]?(?:[ 、|/]*(?:{_SITES}))*|(?:{_SITES})(?:[ 、|/]+(?:{_SITES})){{2,20}}"
        r"|(?:(?:阅读|浏览|点击|评论|点赞|收藏|转发|回复|热度|人气|查看)(?:量|数|次数|人数)?[:： ]?[(（]?[0-9,.]{1,9}万?\+?[)）]?次?人?[ |·,，]*){1,6}"
        r"|(?:发布|发表|更新|创建)(?:时间|日期|于)[:： ]{1,2}[0-9]{4}[-年/.][0-9]{1,2}[-月/.][0-9]{1,2}日?[ 0-9:：]{0,9}.{0,40}"
        r"|字(?:体|号)[:：]?\s?[\[【]?[大中小 |]{2,9}[\]】]?|【?(?:大 中 小|字体:大中小)】?|暂无(?:评论|内容|数据)|(?:我要|发表|网友|最新)评论(?:\s?[(（]\d+[)）])?"
        r"|(?:登录|登陆)后(?:才)?(?:可以|可|能|即可)?(?:发表)?(?:评论|查看|回复|下载).{0,20}|广告|赞助商?广告|举报|纠错"),
    "cookie notices": (
        r"(?:本网站|本站|我们|网站|该网站)(?:会|将)?(?:使用|采用|利用).{0,10}cookies?.{0,100}|.{0,30}(?:接受|同意|允许)(?:所有|全部)?\s?cookies?.{0,40}"
        r"|.{0,20}cookies?(?:政策|设置|声明|策略)"),
}.items()}
TEMPLATE_MARK = re.compile(
    r"公众|关注|订阅号|视频号|服务号|扫码|扫一扫|二维码|小程序码|微信|QQ|V信|点赞|在看|收藏|转发|评论|原文|全文|更多|收起|加载|展开|显示|蓝字|未完待续|©|\(c\)|（c）"
    r"|copyright|rights reserved|版权|ICP|公网安备|编辑[:：]|责编|标题[:：]|原题|来源|出处|链接|地址[:：]|转自|首发|转载|声明|授权|侵权|风险提示"
    r"|首页|主页|位置|关于我们|联系我们|上一|下一|前一篇|后一篇|推荐|相关|阅读|猜你|打印|关闭|返回|分享|浏览|点击|字体|字号|发[布表][于时日]|更新[于时日]|暂无|登录|登陆|广告|举报"
    r"|纠错|cookie|仅代表|不代表|来自", re.I)
DECORATION = " \t*#>＞-—=_~|·•◆■●★☆▼▲↓↑【】[]"
LONGEST_TEMPLATE = 120
MOST_TEMPLATES = 0.5


def template_kind(line: str) -> str | None:
    """The kind of template that a line is, or None."""
    if not 2 <= len(line) <= LONGEST_TEMPLATE:
        return None
    for stripped in {line.strip(), line.strip(DECORATION)}:
        for name, pattern in TEMPLATES.items():
            if stripped and pattern.fullmatch(stripped):
                return name
    return None


def remove_template_lines(text: str, options: Options, counts: Counter) -> str | Drop:
    """Advertising and template lines of Chinese web pages go, whole lines alone; a text of mostly such is dropped."""
    if not TEMPLATE_MARK.search(text):
        return text

    def clean(part: str) -> str:
        kept = []
        for line in part.split("\n"):
            kind = template_kind(line) if len(line) <= LONGEST_TEMPLATE and TEMPLATE_MARK.search(line) else None
            if kind:
                counts[kind] += 1
            else:
                kept.append(line)
        return "\n".join(kept)

    clean_text = outside_code(text, clean)
    if clean_text == text:
        return text
    if len(text) - len(clean_text) > MOST_TEMPLATES * len(text):
        return Drop("mostly template lines")
    return tidy_lines(clean_text)


# ---------------------------------------------------------------------------------------------
# the steps


CLEANING = (
    Step("encoding", "repair UTF-8 that was read as Latin-1, cp1252 or GBK where the bytes come out whole; remove U+FFFD "
         "and 锟斤拷; drop a text of which over 1% is lost",
         "the idea of ftfy, with GBK added, whose mojibake Chinese files have", "message", repair_encoding),
    Step("unicode", "NFKC of full-width letters, digits and ＋－＝％＆／＠, half-width kana, radicals, ligatures and letters "
         "for formulas; NFC of the rest; plain spaces; Chinese punctuation, ① x² ½ ㎡ Ⅱ stay",
         "Unicode Standard Annex 15, without the mappings that lose a meaning", "message", normalize_unicode),
    Step("controls", "remove control, zero-width, bidi and private-use characters (joiners inside of emojis stay), spaces "
         "at the ends of lines, more than two blank lines; drop a text with over 5% of them",
         "the default-ignorable characters of the Unicode Character Database", "message", remove_controls),
    Step("html", "remove scripts, styles, comments and tags of known names outside of code, <pre> becomes a fence, "
         "<sup>2</sup> becomes ²; unescape entities once",
         "the names of the HTML standard; <think> and List<String> are none", "text", remove_html),
    Step("markdown", "outside of code: remove images, link targets, reference definitions, footnote marks, front matter, "
         "attributes; headings, lists, emphasis, code and tables stay, rulers become short",
         "CommonMark and the dialects of Jekyll, Hugo and VuePress", "text", clean_markdown),
    Step("simplify", "traditional characters become simplified ones", "OpenCC, t2s", "message", simplify,
         lambda options: options.simplify),
    Step("personal", "mask mail addresses, mobile numbers (1[3-9] and nine digits, with no unit or sum behind) and identity "
         "numbers whose birth date and check digit are right",
         "GB 11643-1999 for the check digit; the numbering plan of YD/T mobile numbers", "message", mask_personal),
    Step("template_lines", "remove whole lines of up to 120 characters that are advertising, navigation, rights, share "
         "bars or cookie notices; drop a text of which over half goes",
         "lists of such lines of Chinese pages, our own", "text", remove_template_lines),
)
TEXT_STEPS: tuple[Step, ...] = CLEANING + FILTERS
