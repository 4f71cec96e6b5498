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
_NAMES += "|" + _NAMES.upper() + "|(?:o|w|v|m|st1|mc|wp):[A-Za-z][A-Za-z0-9]{0,40}"  # these of Word
# attributes with values in quotes, which may have a > in them; else what comes up to the next >
_VALUE = r"(?:\"[^\"\n]{0,1000}\"|'[^'\n]{0,1000}'|[^\s\"'<>=]{1,1000})"
_ATTRIBUTES = (rf"(?>((?:\s+[\w:@.-]{{1,60}}(?:\s?=\s?{_VALUE})?){{1,60}}+)\s{{0,9}}/?>"
               r"|(\s[^<>]{0,3000})?/?>)")
# a tag, but not in prose about it
TAG = re.compile(rf"<(/?)({_NAMES}){_ATTRIBUTES}(?!\s?(?:标签|元素|标记|节点|tag|element))")
# a script with hanzi right behind it is none: the text speaks of it
HIDDEN = re.compile(r"(<!--)|(-->)|<(?:(/)|(?=[^<>]{3,3000}>(?!\s?[\u4e00-\u9fff、，。；）”])))(script|style|svg)"
                    r"(?:\s[^<>]*)?>", re.I)
SCRIPT = re.compile(r"[=({;]")
DECLARATION = re.compile(r"<!DOCTYPE[^<>]*>|<\?xml[^<>]*>|<!\[CDATA\[|\]\]>", re.I)
PRE = re.compile(r"<pre(?:\s[^<>]*)?>(?:\s*<code(?:\s[^<>]*)?>)?((?:[^<]|<(?!/?pre\b))*)</pre>", re.I)
INLINE_CODE = re.compile(r"<code(?:\s[^<>]*)?>([^<>`\n]+)</code>", re.I)
RAISED = re.compile(r"<(su[pb])>([^<>\n]{1,20})</\1>", re.I)
ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
CITATION = re.compile(r"\[\d{1,3}(?:[-,]\d{1,3})*\]")
# tags that a Chinese sentence names are told by what stands before and behind them; one of these alone says little
NEVER_CLOSED = set("br p hr li img td tr th dt dd input option wbr nobr".split())
WORD_BEFORE = re.compile(r"(?:[写用由把删漏缺加]|使用|添加|忘记) ?\Z")
VERB_BEFORE = re.compile(r"(?<![不作使利运费信引采应专])用\Z|(?<![书描抄填编])写\Z")  # 用<br>换行
LINK_BEFORE = re.compile(r"(?:[在的个和或与及到成是叫、]) ?\Z")
QUOTE_BEFORE = re.compile(r"[“‘「『（] ?\Z")
QUOTE_AFTER = re.compile(r" ?[”’」』）]")
_ABOUT = (r"表示|代表|用来|用于|可以|可用|组成|定义|里(?!程|面有)|等(?=[，。、；\s])"
          r"|中(?=[，。、；\s的写加使添定插放])|是(?!的|啊|否|不是|谁)")
SIGN_AFTER = re.compile(r" ?[、，。；：）]")
NAMED_AFTER = re.compile(rf" ?(?:{_ABOUT}|(?:和|或|与|及|以及|或者)(?= ?[<A-Za-z]| ))")
LISTED = re.compile(r" ?(?:[、/]|和|或|与|及|以及|或者|[，,]) ?")
PLACE_OF_CONTENT = re.compile(r" ?(?:…+|\.{3}|和|与|以及) ?")  # <b>…</b>, <b> 和 </b>
HANZI_BEFORE = re.compile(r"[\u4e00-\u9fff、，] \Z")
HANZI_AFTER = re.compile(r" (?=[\u4e00-\u9fff])|[、，。；]|\Z|\n")
HAN_AFTER = re.compile(r"\s?[\u4e00-\u9fff、，。；）”]")
STRING_BEFORE = re.compile(r"[\w\])]\s?(?:\+?=|[(+,])\s?([\"'])(?:(?!\1)[^\n])*\Z", re.A)  # p = "<b>
NAMED_ENTITY = re.compile(
    r"(?:(?:^|[，、。；：（“ ]|[写用把是])(?=&(?:lt|gt|amp|quot|apos|copy|reg);)|[写用由把打] ?(?=&)"
    r"|^(?=&nbsp; (?:[表显]示|代表)))"
    r"&[A-Za-z]{2,8};(?= ?(?:[表显]示|代表|可以|会显示|是(?!的)|转义|来|、 ?&|[和与或] ?&))", re.M)
SUPERSCRIPT = dict(zip("0123456789+-=()n", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿ", strict=True))
SUBSCRIPT = dict(zip("0123456789+-=()", "₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎", strict=True))


def _without_hidden(text: str, counts: Counter) -> str:
    """The text without comments, scripts, style sheets and pictures of <svg>, in one pass: `.*?` would take quadratic
    time on many. A script that is not closed ends with its line."""
    parts, end, start, until = [], 0, 0, None
    lower, line_end = text.lower(), -1
    last = {name: lower.rfind(f"</{name}") for name in ("script", "style", "svg")}
    for match in HIDDEN.finditer(text):
        comment, closes, slash, name = match.groups()
        if until is None and (comment or name and not slash):
            if name and last[name.lower()] < match.end():
                if line_end < match.end():
                    line_end = text.find("\n", match.end())
                    line_end = len(text) if line_end < 0 else line_end
                if match.start() >= end and name.lower() != "svg" and SCRIPT.search(
                        text, match.end(), min(line_end, match.end() + 300)):
                    parts.append(text[end:match.start()])
                    end = line_end
                    counts["scripts, style sheets and comments removed"] += 1
                continue
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


class _Tag:
    """A tag with what stands around it on its line."""

    def __init__(self, text: str, match: re.Match):
        self.start, self.end = match.start(), match.end()
        self.closes, self.name = bool(match.group(1)), match.group(2).lower()
        self.attributes = (match.group(3) or match.group(4) or "").strip(" /\n\t")
        self.before = text[max(0, self.start - 4):self.start].rpartition("\n")[2]
        self.after = text[self.end:self.end + 8].partition("\n")[0]


def _is_named(before: str, after: str, tag: _Tag, loose: bool) -> bool:
    """Whether what stands before and behind a tag without a partner shows that a sentence names it. A loose tag, whose
    partner is on another line or need not be, must have spaces around it."""
    if QUOTE_BEFORE.search(before) and QUOTE_AFTER.match(after):
        return True
    apart = before.endswith(" ")
    if loose and tag.name in ("img", "input") and tag.attributes:
        return False
    word, link = WORD_BEFORE.search(before), LINK_BEFORE.search(before)
    said, sign = NAMED_AFTER.match(after), SIGN_AFTER.match(after)
    if tag.closes:
        return bool(apart and (word or said or sign))
    if not loose:
        return bool(word or link or said or sign or HANZI_BEFORE.search(before) and HANZI_AFTER.match(after))
    if word and apart and (after or tag.name not in NEVER_CLOSED) or said and after.startswith(" "):
        return True
    return bool(apart and (sign or link and after.startswith(" ")) or after and VERB_BEFORE.search(before))


def _named_tags(text: str, closed: set[str]) -> set[int]:
    """Where the tags start that a sentence names, or that stand in a string of a program."""
    lines: list[list[_Tag]] = []
    end = -1
    for match in TAG.finditer(text):
        if end < 0 or text.find("\n", end, match.start()) >= 0:
            lines.append([])
        lines[-1].append(_Tag(text, match))
        end = match.end()
    named = set()
    for tags in lines:
        begin = text.rfind("\n", 0, tags[0].start) + 1
        for tag in tags:
            string = STRING_BEFORE.search(text[max(begin, tag.start - 200):tag.start])
            if string and string.group(1) in text[tag.end:tag.end + 200].partition("\n")[0]:
                named.add(tag.start)
        for one, other in zip(tags, tags[1:], strict=False):
            between = text[one.end:other.start]
            if one.closes == other.closes and len(between) < 6 and LISTED.fullmatch(between) and (
                    one.name != other.name) and not (one.closes and one.start not in named):
                named.update((one.start, other.start))
        alone, opened = [], []
        for tag in tags:
            if tag.start in named:
                continue
            if not tag.closes:
                if tag.name in ("script", "style") and HAN_AFTER.match(tag.after):
                    named.add(tag.start)
                opened.append(tag)
                continue
            place = next((i for i in range(len(opened) - 1, max(-1, len(opened) - 30), -1)
                          if opened[i].name == tag.name), None)
            if place is None:
                alone.append(tag)
                continue
            partner = opened[place]
            alone += opened[place + 1:]
            del opened[place:]
            content = text[partner.end:tag.start]
            if partner.start in named or PLACE_OF_CONTENT.fullmatch(content) or not content and (
                    not partner.attributes and _is_named(partner.before, tag.after, partner, True)):
                named.update((partner.start, tag.start))
        for tag in alone + opened:
            loose = tag.name in NEVER_CLOSED or tag.name in closed
            if _is_named(tag.before, tag.after, tag, loose):
                named.add(tag.start)
    return named


def _clean_html(text: str, closed: set[str], counts: Counter) -> str:
    def tag(match: re.Match) -> str:
        slash, name, quoted, attributes = match.groups()
        attributes = quoted or attributes
        name = name.lower()
        if match.start() in named:
            return match.group()
        if attributes and attributes.strip(" /\n\t") and "=" not in attributes:
            return match.group()  # a<b && c>d
        sure = name in SURE and (name in ("br", "hr", "img") or not text[match.start() - 1:match.start()].isalnum())
        if not slash and not attributes and name not in closed and not sure and ":" not in name:
            return match.group()  # List<Object>, cp <source> <target>
        counts["tags removed"] += 1
        if name == "li":
            return "" if slash else "\n- "
        return "\n" if name in BLOCK else " " if name in ("td", "th") else ""

    if "<" in text:
        text = DECLARATION.sub("", _without_hidden(text, counts))
        text = INLINE_CODE.sub(r"`\1`", RAISED.sub(_raised, text))
        named = _named_tags(text, closed)
        text = TAG.sub(tag, text)
    if "&" in text:
        spoken = {match.end() for match in NAMED_ENTITY.finditer(text)}
        plain, n = ENTITY.subn(lambda match: match.group() if match.end() in spoken else _unescape(match), text)
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
