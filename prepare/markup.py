"""The steps that clean markup: HTML and markdown. Code in fences and in backticks stays as it is."""

import html
import re
from collections import Counter

from prepare.characters import INVISIBLE, PRIVATE_USE, SPACES, tidy_lines
from prepare.step import Options
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
# HTML


BLOCK = set("p div br hr li ul ol dl dt dd tr table thead tbody tfoot caption section article header footer main nav "
            "aside blockquote h1 h2 h3 h4 h5 h6 pre form fieldset figure figcaption center address details summary "
            "html head body title option".split())
INLINE = set("a abbr acronym b big cite code col colgroup del dfn em embed font i iframe img input ins kbd label link "
             "map mark meta nobr noscript object param picture q rp rt ruby s samp script select small source span "
             "strike strong style sub sup svg td textarea th time tt u var video audio wbr button area base".split())
# names that are no word of a command line or a program: their tag needs no closing tag
SURE = set("p div br hr li ul ol dl dt dd tr td th table thead tbody html head body h1 h2 h3 h4 h5 h6 blockquote "
           "strong "
           "em font center span img wbr nobr sup sub pre".split())
_NAMES = "|".join(sorted(BLOCK | INLINE, key=len, reverse=True))
_NAMES += "|" + _NAMES.upper()
# a tag, but not in prose about it
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
        behind_word = text[match.start() - 1:match.start()].isalnum() and name not in ("br", "hr", "img")
        if not slash and not attributes and name not in closed and (name not in SURE or behind_word):
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
