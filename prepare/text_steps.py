"""The steps of the recipe for texts, in their order. Each is made for Chinese; its module says more.

characters.py: encoding, unicode, controls · markup.py: html, markdown · personal.py · template_lines.py ·
text_filters.py: those that judge.
"""

import functools
from collections import Counter

from Config import UserError
from prepare.characters import normalize_unicode, remove_controls, repair_encoding
from prepare.markup import clean_markdown, remove_html
from prepare.personal import mask_personal
from prepare.step import Options, Step
from prepare.template_lines import remove_template_lines
from prepare.text_filters import FILTERS

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
# the steps


CLEANING = (
    Step("encoding", "repair UTF-8 that was read as Latin-1, cp1252 or GBK where the bytes come out whole; remove "
         "U+FFFD and 锟斤拷; drop a text of which over 1% is lost",
         "the idea of ftfy, with GBK added, the usual mojibake of Chinese files", "message", repair_encoding),
    Step("unicode", "NFKC of full-width letters, digits and ＋－＝％＆／＠, half-width kana, radicals, ligatures and "
         "the letters of formulas; NFC of the rest; plain spaces; Chinese punctuation and ① x² ½ ㎡ Ⅱ stay",
         "Unicode Standard Annex 15, without the mappings that lose a meaning", "message", normalize_unicode),
    Step("controls", "remove control, zero-width, bidi and private-use characters (joiners inside of emojis stay), "
         "spaces at the ends of lines, more than two blank lines; drop a text with over 5% of control and "
         "private-use characters",
         "the default-ignorable characters of the Unicode Character Database", "message", remove_controls),
    Step("html", "outside of code: remove scripts, styles, comments and tags of known names, <pre> becomes a fence, "
         "<sup>2</sup> becomes ²; unescape entities once",
         "the names of the HTML standard; <think> and List<String> are none", "text", remove_html),
    Step("markdown", "outside of code: remove images, link targets, reference definitions, footnote marks, front "
         "matter and attributes; headings, lists, emphasis, code and tables stay, rulers become short",
         "CommonMark and the dialects of Jekyll, Hugo and VuePress", "text", clean_markdown),
    Step("simplify", "traditional characters become simplified ones", "OpenCC, t2s", "message", simplify,
         lambda options: options.simplify),
    Step("personal", "mask mail addresses, mobile numbers (1[3-9] and nine digits, with no unit behind and no 编号 "
         "beside it) and identity numbers whose birth date and check digit are right",
         "GB 11643-1999 for the check digit; the Chinese numbering plan", "message", mask_personal),
    Step("template_lines", "remove whole lines of up to 120 characters that are advertising, navigation, rights, share "
         "bars or cookie notices; drop a text of which over half goes",
         "a list of such lines of Chinese pages, made for this recipe", "text", remove_template_lines),
)
TEXT_STEPS: tuple[Step, ...] = CLEANING + FILTERS
