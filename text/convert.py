"""Other people's data: says what a file is, and converts it to our forms.

    python -m text.convert FILE --out data/NAME.jsonl

`describe` names a file that the project cannot read as it is, and the command that converts it. What a record becomes
is in text/shapes.py. Text is taken as it stands; what our forms cannot express is left out and counted.
"""

import argparse
import codecs
import contextlib
import csv
import io
import itertools
import json
import os
import re
import shlex
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from common import exits
from common.files import write_lines
from Config import OneLineParser, UserError
from text.records import MalformedRecord, parse_record, unpack
from text.shapes import DECODER, NO_ANSWER, OWN, convert_record, is_message, parse_value, shape_of

HEAD = 1_000_000  # bytes that `describe` reads
SAMPLE = 100  # records that `describe` looks at
MOST_EXAMPLES = 5
AROUND = 'one object around its records ("{}")'
ARRAY_BLOCK = 1 << 20  # characters of an array that are read at a time
LONGEST_ELEMENT = 1 << 26  # characters
BEFORE_ARRAY = re.compile(r"\ufeff?\s*(\[\s*)?")
BETWEEN_VALUES = re.compile(r"[\s,\]]*")

# ---------------------------------------------------------------------------------------------
# files: readers, each (text stream) → (where, value); what cannot be read is a MalformedRecord in place of the value


def is_list_of_records(value) -> bool:
    """True for a list of objects that are no messages of one conversation."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and not is_message(value[0])


def _wrapped(value) -> tuple[str, list] | None:
    """(name, records) of an object that is around a list of records, by its key, or that holds the columns or the
    numbered rows of a table, as pandas writes them; None for any other value."""
    if not isinstance(value, dict) or not value:
        return None
    with contextlib.suppress(MalformedRecord):  # a record itself
        convert_record(value)
        return None
    parts = [*value.values()]
    if all(isinstance(part, dict) and part.keys() == parts[0].keys() for part in parts):
        columns = [{key: part[row] for key, part in value.items()} for row in parts[0]]
        tables = {"columns": columns, "rows": parts}
        return next(((name, rows) for name, rows in tables.items() if rows and shape_of(rows[0])), None)
    lists = {key: part for key, part in value.items() if is_list_of_records(part) and shape_of(part[0])}
    if not lists:
        return None
    key, *others = lists  # training and test data are not mixed
    left_out = [MalformedRecord(f'in "{other}" beside "{key}"') for other in others for _ in lists[other]]
    return key, lists[key] + left_out


def read_json_lines(stream) -> Iterator[tuple[str, object]]:
    """(where, value) of JSON values, one a line, with or without a comma behind; brackets on a line of their own are
    left out. Python literals are read too."""
    for number, line in enumerate(stream, start=1):
        line = line.strip().removesuffix(",")
        if line not in ("", "[", "]"):
            value = parse_value(line)
            yield from ((f"line {number}", each) for each in (value if is_list_of_records(value) else [value]))


def _values(text: str, end: int) -> Iterator[tuple[object, int]]:
    """(value, where it ends) of JSON values that follow one another."""
    while (begin := BETWEEN_VALUES.match(text, end).end()) < len(text):
        try:
            value, end = DECODER.raw_decode(text, begin)
        except (ValueError, RecursionError) as error:
            value = error if isinstance(error, MalformedRecord) else MalformedRecord(f"not JSON: {error}")
            indent = text[text.rfind("\n", 0, begin) + 1:begin]  # of the next value too
            end = text.find(f"\n{indent}{{", begin) if not indent.strip() else -1
            end = len(text) if end < 0 else end
        yield value, end


def _read_array(stream) -> Iterator[tuple[str, object]]:
    """The elements of one array, not more than one of which, and ARRAY_BLOCK characters, are held at a time. Behind a
    malformed one it goes on where another object begins a line as deep as that one."""
    buffer, position, number, ended = "", 0, 0, False
    while True:
        begin = (BETWEEN_VALUES if number else BEFORE_ARRAY).match(buffer, position).end()
        value, end = None, -1
        if begin < len(buffer):
            try:
                value, end = DECODER.raw_decode(buffer, begin)
            except (ValueError, RecursionError) as error:
                value = error if isinstance(error, MalformedRecord) else MalformedRecord(f"not JSON: {error}")
                indent = buffer[buffer.rfind("\n", 0, begin) + 1:begin]
                if not indent.strip():
                    end = buffer.find(f"\n{indent}{{", begin)
                if end < 0 and (ended or len(buffer) - begin > LONGEST_ELEMENT):
                    yield f"record {number + 1}", MalformedRecord(f"{value}; the file is not read beyond it")
                    return
        if end >= 0:
            number, position = number + 1, end
            yield f"record {number}", value
        elif ended:
            return
        else:
            start = max(0, buffer.rfind("\n", 0, begin))  # the indent of the next element is needed
            block = stream.read(max(ARRAY_BLOCK, len(buffer) - start))  # twice as much: else a long one takes long
            buffer, position, ended = buffer[start:] + block, max(position, begin) - start, not block


def _read_whole(stream) -> Iterator[tuple[str, object]]:
    """JSON values over several lines, the elements of an array, the list inside an object, or a Python literal."""
    text = stream.read().strip()
    is_array = text[:1] == "[" and not is_message(next(_values(text, 1), (None, 0))[0])
    values = _values(text, int(is_array))
    first, end = next(values, (None, 0))
    if isinstance(first, MalformedRecord) and isinstance(literal := parse_value(text), (dict, list)):
        records = literal if isinstance(literal, list) and not is_message(literal[0]) else [literal]
    elif end == len(text) and (wrapped := _wrapped(first)):
        records = wrapped[1]
    else:
        records = itertools.chain([first], (value for value, _ in values))
    yield from ((f"record {number}", record) for number, record in enumerate(records, start=1))


def _csv_reader(delimiter: str):
    def read(stream) -> Iterator[tuple[str, object]]:
        rows = csv.reader(stream, delimiter=delimiter)
        header = next(rows, [])
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield f"line {rows.line_num}", MalformedRecord(f"not CSV: {error}")
                continue
            if len(row) > len(header):
                yield f"line {rows.line_num}", MalformedRecord(f"{len(row)} cells under {len(header)} column names")
            elif any(row):
                yield f"line {rows.line_num}", dict(itertools.zip_longest(map(str.strip, header), row))
    return read


def _text_reader(by_line: bool):
    def read(stream) -> Iterator[tuple[str, object]]:
        for is_blank, group in itertools.groupby(enumerate(stream, start=1), lambda each: not each[1].strip()):
            if not is_blank:
                for numbered in ([line] for line in group) if by_line else [list(group)]:
                    yield f"line {numbered[0][0]}", {"text": "\n".join(line.rstrip() for _, line in numbered)}
    return read


def layout_of(text: str, name: str) -> tuple[str, Callable] | None:
    """(what is unusual about how the records are laid out, their reader), or None where there are none. `text` is the
    beginning of the file called `name`; the reader takes a text stream and yields (where, value), a MalformedRecord in
    place of a value that cannot be read."""
    csv.field_size_limit(1 << 30)  # a cell may hold a long text
    lines = [match.group().rstrip() for match in itertools.islice(re.finditer(r"\S[^\n]*", text), 2)]
    first, second = [*lines, ""][:2]
    value, later = (parse_value(line.removesuffix(",")) for line in (first, second))
    if (isinstance(value, dict) and (second or not _wrapped(value)) or isinstance(later, dict) and first[0] != "["
            or isinstance(value, list) and (second or ".jsonl" in name and isinstance((value or [0])[0], str))):
        if not isinstance(value, (dict, list)):
            return "", read_json_lines
        try:
            DECODER.decode(first.removesuffix(","))
        except ValueError:
            return "Python literals, not JSON", read_json_lines
        return ("JSON lines that end in a comma" if first.endswith(",") else ""), read_json_lines
    if re.match(r"""\[\s*[\[{"'\]]|\{\s*["'}]""", text.lstrip()):
        if first[0] == "[":
            element = next(_values(text.lstrip(), 1), (None, 0))[0]
            streams = isinstance(element, dict) and not is_message(element)
            return "one array, not one object a line", _read_array if streams else _read_whole
        wrapped = _wrapped(next(_values(text, 0))[0])
        return AROUND.format(wrapped[0]) if wrapped else "JSON over several lines", _read_whole
    if re.search(r"[\x00-\x08\x0e-\x1f]", text):
        return None
    delimiter = max(",;\t", key=first.count)
    columns = next(csv.reader([first], delimiter=delimiter))
    if re.search(r"\.[ct]sv\b", name.lower()) or len(columns) > 1 and shape_of(dict.fromkeys(columns, "x")):
        return "CSV", _csv_reader(delimiter)
    by_line = re.search(r"\n[^\S\n]*\n", text.strip()) is None
    return f"plain text ({'each line' if by_line else 'what stands between blank lines'} becomes a document)", (
        _text_reader(by_line))


# ---------------------------------------------------------------------------------------------
# files: what they are


def _pandas(package: str, code: str) -> str:
    """The command that writes a table as JSON lines; "x" refuses a file that exists."""
    code += '.to_json(open(sys.argv[2], "x", encoding="utf-8"), orient="records", lines=True, force_ascii=False)'
    return f"pip install {package} && python -c {shlex.quote('import sys, ' + code)} {{file}} {{jsonl}}"


UNREADABLE = [(re.compile(pattern, re.DOTALL), *rest) for pattern, *rest in (  # of the first bytes of the file
    (rb"PAR1", "a Parquet file", _pandas("pandas pyarrow", "pandas; pandas.read_parquet(sys.argv[1])")),
    (rb"ARROW1", "an Arrow file", _pandas(
        "pandas pyarrow", "pyarrow; pyarrow.ipc.open_file(sys.argv[1]).read_pandas()")),
    (rb"\xff{4}..[\x00-\x0f]\x00", "an Arrow stream, as datasets saves it", _pandas(
        "pandas pyarrow", "pyarrow; pyarrow.ipc.open_stream(sys.argv[1]).read_pandas()")),
    (rb"SQLite format 3\x00", "an SQLite database (the command takes its first table)", _pandas("pandas", (
        'pandas, sqlite3; db = sqlite3.connect(sys.argv[1]); query = "select name from sqlite_master where type = ?"; '
        'name, = db.execute(query, ["table"]).fetchone(); pandas.read_sql("select * from [" + name + "]", db)'))),
    (rb"PK\x03\x04.*xl/", "an Excel table (.xlsx)", _pandas(
        "pandas openpyxl", "pandas; pandas.read_excel(sys.argv[1], dtype=str)")),
    (rb"PK\x03\x04", "a zip archive", "unzip -n {file} -d {folder}"),
    (rb"BZh[1-9]1AY&SY", "packed by bzip2", "bunzip2 -k {file}"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x -aos {file} -o{folder}"),
)]
AGAIN = "the download failed; download it again"
NOT_RECORDS = [(re.compile(pattern, re.DOTALL | re.IGNORECASE), *rest) for pattern, *rest in (  # of the unpacked bytes
    (rb"\s*\Z", "empty", "download it or make it again"),
    (rb".{257}ustar", "a tar archive", "mkdir -p {folder} && tar -xkf {file} -C {folder}"),
    (rb"version https://git-lfs", "a Git LFS pointer, not the data itself", "(cd {parent} && git lfs pull)"),
    (rb"\s*<mediawiki", "a Wikipedia dump", "pip install wikiextractor && wikiextractor --json {file} -o {folder}"),
    (rb"\s*<(!doctype html|html|head)", "an HTML page, not data", AGAIN),
    (rb"\s*<(\?xml|error\b|!doctype)", "an XML page, not data", AGAIN),
    (rb"(?!.*\"(text|conversations|question)\")\s*(\{\s*\"(error|detail|code|message|success)\""
     rb"|(404|entry|repository|file|page)\b[^\n]*\bnot found|invalid username|access denied|unauthorized|forbidden)"
     rb"[^\n]{0,500}\s*\Z", "the error message of a server", AGAIN),
)]
DESCRIPTIONS = ("readme.md", "dataset_infos.json", "dataset_info.json", "configuration.json", "state.json")
PACKINGS = {".gz": b"\x1f\x8b", ".xz": b"\xfd7zXZ\x00", ".zst": b"\x28\xb5\x2f\xfd"}
ENCODINGS = {"gb18030": "GBK text (ANSI of Chinese Windows), not UTF-8", "utf-16": "UTF-16 text, not UTF-8"}


class Examined(NamedTuple):
    """What a file is: `line` as `describe` returns it, how to read its records if that is possible, and their kind."""

    line: str | None
    read: Callable[[], Iterator[tuple[str, object]]] | None = None
    kind: str | None = None


class Sniffed(NamedTuple):
    """What the beginning of a file says. `problem`: what it is in place of records, and what to do · `packing`: one of
    PACKINGS or "" · `encoding`, `layout`, `reader`: as of `encoding_of` and `layout_of`, the reader None where none is
    known · `text`: the beginning, unpacked · `is_cut`: the file goes on."""

    problem: str | None = None
    packing: str = ""
    encoding: str = ""
    layout: str = ""
    reader: Callable | None = None
    text: str = ""
    is_cut: bool = False


def describe(file: Path) -> str | None:
    """One line that says what a data file is and how to convert it; None if it is in our form, or not recognized.

    Reads the first megabyte at most, and raises nothing: an explanation must not stop what it explains.
    """
    try:
        return _examine(Path(file)).line if Path(file).is_file() else None  # a pipe would lose what is read
    except Exception:
        return None


def _examine(file: Path) -> Examined:
    with open(file, "rb") as stream:
        sniffed = sniff(stream.read(HEAD), file)
    if sniffed.reader is None:
        return Examined(sniffed.problem)
    names, packing, encoding, what_layout, reader, text = _names(file), *sniffed[1:6]
    named = file.suffix if file.suffix in PACKINGS else ""
    if packing != named:
        what = f"not packed as {named}, though named so" if named else f"packed as {packing}, though not named so"
        return Examined(f"{what}: mv -n {names['file']} {_quote(str(file)[:len(str(file)) - len(named)] + packing)}")
    if sniffed.is_cut and reader is _read_whole and (
            opening := re.match(r'\s*\{\s*"([^"]+)"\s*:\s*(?=\[\s*\{)', text)):
        text, what_layout = text[opening.end():], AROUND.format(opening[1])
    elif sniffed.is_cut and "\n" in text:
        text = text[:text.rfind("\n") + 1]
    values = [value for _, value in itertools.islice(reader(io.StringIO(text)), SAMPLE)]
    shapes, kinds, reasons = Counter(), Counter(), []
    for value in values:
        try:
            record = as_record(value)
            shapes[shape_of(record)] += 1
            kinds[_kind(convert_record(record))] += 1
        except MalformedRecord as error:
            reasons.append(str(error))
    foreign = Counter({shape: n for shape, n in shapes.items() if shape and shape not in OWN})
    is_foreign = foreign.total() * 10 >= len(values) > 0  # less is for the stages to count
    what_encoding = next((what for name, what in ENCODINGS.items() if encoding.startswith(name)), "")
    what_records = foreign.most_common(1)[0][0] if is_foreign else ""
    what = _one_line(", ".join(filter(None, (what_encoding, what_layout, what_records))))
    line = None
    if what and kinds:
        line = f"{what}: python -m text.convert {names['file']} --out {names['converted']}"
    elif what and reasons and not sniffed.is_cut:
        line = f"{what}; its records cannot be converted ({_one_line(reasons[0])})"
    return Examined(line, lambda: _read(file, packing, encoding, reader), kinds.most_common(1)[0][0] if kinds else None)


def sniff(start: bytes, file: Path) -> Sniffed:
    """What the first HEAD bytes of a file say of it; `file` is named in the advice."""
    head = start = start.removeprefix(codecs.BOM_UTF8)
    names = _names(file)
    packing = next((suffix for suffix, magic in PACKINGS.items() if start.startswith(magic)), "")
    if packing:
        head, unpacked = b"", unpack(io.BytesIO(start), packing)
        with contextlib.suppress(Exception):  # each library has errors of its own for a file that ends or is damaged
            while len(head) < HEAD and (block := unpacked.read1(1 << 14)):
                head += block
        if not head and len(start) > 100:
            return Sniffed(f"damaged: {AGAIN}")
    for pattern, what, advice in [*(() if packing else UNREADABLE), *NOT_RECORDS]:
        if pattern.match(head):
            title = re.search(rb"(?i)<(?:title|code)>\s*([^<]{1,80})", head) if b"<" in head[:9] else None
            said = f' ("{title[1].decode("utf-8", "replace").strip()}")' if title else ""
            return Sniffed(f"{_one_line(what + said)}: {advice.format(**names)}")
    if file.name.lower() in DESCRIPTIONS or file.suffix == ".py" and b"GeneratorBasedBuilder" in head:
        return Sniffed("a description of a dataset, not its data: download its data files")
    encoding = encoding_of(head)
    text = codecs.getincrementaldecoder(encoding)("replace").decode(head) if encoding else ""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    layout, reader = layout_of(text, file.name) or ("", None) if text.strip() else ("", None)
    return Sniffed(None, packing, encoding or "", layout, reader, text, len(head) >= HEAD)


def _one_line(text: str) -> str:
    """At most 200 characters of what a file says, without those that would end the line or steer a terminal."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())[:200]


def _quote(path: Path | str) -> str:
    """A path as bash reads it, on one line."""
    name = f"./{path}" if str(path).startswith("-") else str(path)
    if name.isprintable():
        return shlex.quote(name)
    return "$'" + "".join(chr(byte) if re.match(rb"[\w./-]", bytes([byte])) else f"\\x{byte:02x}"
                          for byte in os.fsencode(name)) + "'"


def _names(file: Path) -> dict[str, str]:
    """The paths in a command: of the file, and of what is made of it."""
    stem = re.sub(r"(\.(jsonl?|ndjson|csv|tsv|txt|md|parquet|arrow|xlsx|db|sqlite3?|zip|tar|tgz|7z))?(\.(gz|xz|zst))?$",
                  "", file.name, flags=re.IGNORECASE) or file.name
    made = {"folder": f"{stem}.unpacked", "converted": f"{stem}.converted.jsonl",
            "jsonl": f"{stem}.jsonl" if file.name != f"{stem}.jsonl" else f"{stem}.table.jsonl"}
    return {"file": _quote(file), "parent": _quote(file.parent)} | {
        name: _quote(file.with_name(made[name])) for name in made}


def encoding_of(head: bytes) -> str | None:
    """The encoding of a file that begins with these bytes: UTF-16 by its byte order mark or its zeros; else UTF-8 or
    GB18030, if all but a few characters are in it; or None."""
    if (detected := json.detect_encoding(head)) not in ("utf-8", "utf-8-sig"):
        return detected
    for encoding in ("utf-8-sig", "gb18030"):
        text = codecs.getincrementaldecoder(encoding)("replace").decode(head)
        if text.count("\ufffd") * 20 <= len(text) - len(text.encode("ascii", "ignore")):
            return encoding
    return None


def _read(file: Path, packing: str, encoding: str, reader: Callable) -> Iterator[tuple[str, object]]:
    """What `reader` yields of the file. Raises UserError where the file cannot be read further."""
    where = "its beginning"
    errors = "strict" if encoding.startswith(("utf-16", "utf-32")) else "surrogateescape"  # then refused by record
    try:
        with open(file, "rb") as packed, unpack(packed, packing) as stream:
            for where, value in reader(io.TextIOWrapper(stream, encoding, errors)):
                yield where, value
    except (OSError, EOFError, zlib.error, UnicodeError) as error:
        raise UserError(f"{file}: cannot be read beyond {where}: {error}") from None


# ---------------------------------------------------------------------------------------------
# the command


def as_record(value) -> dict:
    """The record that a value of a file stands for: a list is a conversation, a string a text. Raises MalformedRecord
    for any other value but an object, and a MalformedRecord itself."""
    if isinstance(value, MalformedRecord):
        raise value
    record = {list: {"conversations": value}, str: {"text": value}, dict: value}.get(type(value))
    if record is None:
        raise MalformedRecord("not an object")
    return record


def _kind(record: dict) -> str:
    return next(kind for kind, key in zip(OWN, ("conversations", "question", "text"), strict=True) if key in record)


def _to_line(value, kind: str | None, notes: Counter) -> tuple[str, str]:
    """(line, kind) of a value. Raises MalformedRecord, also if the project could not read the line."""
    record = convert_record(as_record(value), notes)
    found = _kind(record)
    if found != (kind or found):
        raise MalformedRecord(f"a {found} record among {kind} records")
    try:
        line = json.dumps(record, ensure_ascii=False)
        encoded = line.encode("utf-8")
    except (TypeError, ValueError) as error:  # bytes in a Python literal; a lone surrogate
        raise MalformedRecord(str(error)) from None
    if found != "question":
        parse_record(encoded, found)
    elif not record["question"].strip():
        raise MalformedRecord("no question")
    elif "answer" in record and NO_ANSWER.fullmatch(str(record["answer"])):  # a question to decline has none
        raise MalformedRecord("no answer")
    return line, found


def main(argv: list[str] | None = None) -> None:
    """Convert one file. Raises UserError if --out exists, or nothing can be converted."""
    parser = OneLineParser(prog="python -m text.convert", description=__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON, JSON lines, CSV or text; plain, .gz, .xz or .zst")
    parser.add_argument("--out", type=Path, required=True, help="the file to make, *.jsonl")
    args = parser.parse_args(argv)
    if args.out.suffix != ".jsonl":
        raise UserError(f"--out {args.out}: its name must end in .jsonl")
    if os.path.lexists(args.out):
        raise UserError(f"--out {args.out} is there already: remove it or choose another name")
    try:
        examined = _examine(args.file)
    except OSError as error:
        raise UserError(f"{args.file} cannot be read: {error}") from None
    if examined.read is None:
        raise UserError(f"{args.file}: {examined.line or 'its form is not known'}")

    kind, n_read, written, reasons, notes, examples = examined.kind, 0, 0, Counter(), Counter(), []

    def lines() -> Iterator[str]:
        nonlocal kind, n_read, written
        for where, value in examined.read():
            n_read += 1
            try:
                line, kind = _to_line(value, kind, notes)
            except MalformedRecord as error:
                reasons[str(error)] += 1
                if len(examples) < MOST_EXAMPLES:
                    examples.append(f"left out: {where}: {error}")
                continue
            written += 1
            yield line
        if not written:
            raise UserError(f"{args.file}: none of {n_read:,} records can be converted ({'; '.join(examples[:1])})")

    write_lines(args.out, lines())
    print(f"{args.file}: {n_read:,} records read, {written:,} written to {args.out} ({kind}), "
          f"{n_read - written:,} left out")
    for reason, n in reasons.most_common(MOST_EXAMPLES):
        print(f"left out {n:,}: {reason}")
    for example in examples:
        print(example)
    for note, n in notes.items():
        print(f"{n:,} {note}")


if __name__ == "__main__":
    sys.exit(exits.run(main))
