"""The report of a run of prepare_data.py: data_report.md and charts, made from its manifest alone.

Equal manifests give equal bytes, and so do manifests that differ only under "run": no times, no names of the machine.
"""

import re
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

from common.files import write_lines, write_whole

REPORT, CHARTS = "data_report.md", "charts"
STAGES = {"pretrain": "pretrain.py", "sft_512": "SFT.py", "sft_1024": "SFT_long.py", "r1_1024": "distill.py"}
SAMPLES = {"sft_mini_512": "sft_512"}  # holds records that are in the other output too
MOST_MALFORMED = 0.01  # of the records of a file: more is a warning
MOST_DROPPED = 0.3  # of a source by one step: more is a warning
MOST_LEAKS = 0.02  # of all records: more is a warning
MOST_EXAMPLES = 5  # malformed records shown of the files of one name
MOST_ROWS, MOST_BARS, MOST_COLORS = 100, 30, 9  # sources by name: in a table, as bars, as colors of one bar
MOST_WARNINGS = 20  # about files, and about sources
MARKUP = re.compile(r"[\\`*{}\[\]<>|~$&]|(?<![^\W_])_|_(?![^\W_])")  # an underscore inside a word is none


def write_report(folder: Path, manifest: dict) -> None:
    """Write charts/{lengths,sources,steps}.png, where there are categories also categories.png, and then data_report.md
    in `folder`, each atomically.

    Raises UserError when a file cannot be written.
    """
    _draw_charts(Path(folder) / CHARTS, manifest, Account(manifest))
    write_lines(Path(folder) / REPORT, report_lines(manifest))


def report_lines(manifest: dict) -> list[str]:
    """The lines of data_report.md."""
    account = Account(manifest)
    sections = [
        ["# Data report"], _summary(manifest, account), ["## Warnings"], _warnings(manifest, account),
        ["## What came in"], _inputs(manifest), ["## What the steps did"], _steps(manifest),
        ["## What came out"], _outputs(manifest, account),
        *([["## Categories"], _categories(manifest)] if manifest.get("categories") else []),
        ["## The account"], _account(manifest, account),
        ["## Where to look"], _where_to_look(manifest), ["## What to run next"], _next_commands(manifest, account),
        ["## The rules"], _rules(manifest), ["## Settings"], _settings(manifest)]
    return [line for section in sections for line in [*section, ""]][:-1]


class Account:
    """Where the records of each source of training data went.

    A record's source is its own field "source", or the name of its file (prepare/inputs.py).
    sources: names, in the order of the input, from 1 in the tables and charts · read: source → records read whole ·
    dropped: source → step → records · written: source → records, without those of SAMPLES ·
    waiting: source → chats that wait for a tokenizer (the manifest's "waiting", if it has that).
    """

    def __init__(self, manifest: dict):
        self.read, self.written, self.dropped = Counter(), Counter(), defaultdict(Counter)
        for item in _of_role(manifest, "train"):
            self.read.update(item.get("by_source", {item["source"]: item["records"]}))
        self.waiting = Counter(manifest.get("waiting") or {})
        for output in manifest["outputs"]:
            if output["name"] not in SAMPLES:
                self.written.update(output["by_source"])
        for step in manifest["steps"]:
            for source, number in step["by_source"].items():
                self.dropped[source][step["name"]] += number
        others = {*self.dropped, *self.written, *self.waiting}
        self.sources = [*self.read, *sorted(others - set(self.read))]

    def missing_of(self, source: str) -> int:
        """Records read that were neither dropped nor written nor wait: 0, unless the manifest is wrong."""
        return self.read[source] - self.dropped[source].total() - self.written[source] - self.waiting[source]

    def groups(self, most: int) -> list[tuple[str, str, list[str]]]:
        """(number, name, sources): each of the sources with the most records by itself, and the others as one."""
        largest = sorted(self.sources, key=lambda source: -self.read[source])
        alone = set(largest if len(largest) <= most else largest[:most - 1])
        groups = [(str(number), source, [source]) for number, source in enumerate(self.sources, 1) if source in alone]
        others = [source for source in self.sources if source not in alone]
        return [*groups, ("", f"{len(others)} others", others)] if others else groups


# ---------------------------------------------------------------------------------------------
# Markdown


def plain(text) -> str:
    """`text` so that Markdown shows it as it is, also inside a table: markup is escaped, and what would not be seen
    (a line feed in a file name, say) is written as Python writes it."""
    text = str(text).encode("utf-8", "backslashreplace").decode("utf-8")  # a file name that is not UTF-8
    text = MARKUP.sub(r"\\\g<0>", text)
    return "".join(c if c.isprintable() else "\\" + c.encode("unicode_escape").decode("ascii") for c in text)


def _table(titles: list[str], rows: list[list[str]], right: int) -> list[str]:
    """A table; all columns but the first len(titles) - right are of numbers. Cells are Markdown already."""
    lines = ["---"] * (len(titles) - right) + ["---:"] * right
    return [f"| {' | '.join(cells)} |" for cells in [titles, lines, *rows]]


def _share(part: int, whole: int) -> str:
    if not whole:
        return "–"
    return "< 0.1 %" if 0 < part < whole / 2000 else f"{100 * part / whole:.1f} %"


def _size(n: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n} bytes"


def _count(n: int, singular: str, plural: str = "") -> str:
    return f"{n:,} {singular if n == 1 else plural or singular + 's'}"


def _ranked(counts: dict) -> list[tuple[str, int]]:
    """The counts that are not 0, the greatest first; the order in the manifest does not matter."""
    return sorted(((name, n) for name, n in counts.items() if n), key=lambda item: (-item[1], item[0]))


def _listed(counts: dict) -> str:
    return " · ".join(f"{plain(name)} {n:,}" for name, n in _ranked(counts))


def _and(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _of_role(manifest: dict, role: str) -> list[dict]:
    return [item for item in manifest["inputs"] if item["role"] == role]


def _total(step: dict, key: str) -> int:
    return sum(step[key].values())


# ---------------------------------------------------------------------------------------------
# sections


def _summary(manifest: dict, account: Account) -> list[str]:
    train = _of_role(manifest, "train")
    read, dropped = account.read.total(), sum(steps.total() for steps in account.dropped.values())
    outputs = ", ".join(f"{output['name']} {output['records']:,}" for output in manifest["outputs"]
                        if output["name"] not in SAMPLES)
    outputs += "".join(f"; {output['name']} repeats {output['records']:,} of {SAMPLES[output['name']]}"
                       for output in manifest["outputs"] if output["name"] in SAMPLES)
    lines = [f"**{read:,}** records were read from {_count(len(train), 'file')} of "
             f"{_count(len(account.read), 'source')} ({_size(sum(item['bytes'] for item in train))}), "
             f"**{dropped:,}** dropped ({_share(dropped, read)}) and **{account.written.total():,}** written"
             f"{f' ({outputs})' if outputs else ''}."]
    if waiting := account.waiting.total():
        lines.append(f"{_count(waiting, 'chat waits', 'chats wait')} for a tokenizer.")
    return lines


def _warnings(manifest: dict, account: Account) -> list[str]:
    lines = []
    if not _of_role(manifest, "train"):
        lines.append("No training data were given.")
    if not _of_role(manifest, "val"):
        lines.append("No validation files were given (`--val_path`): nothing keeps their text out of the training "
                     "files.")
    if waiting := account.waiting.total():
        lines.append(f"{_count(waiting, 'chat waits', 'chats wait')} for a tokenizer, to be split by length: see "
                     "[What to run next](#what-to-run-next).")
    written = {output["name"] for output in manifest["outputs"] if output["records"]}
    if without := [f"`{stage}` ({name})" for name, stage in STAGES.items() if name not in written]:
        lines.append(f"Nothing was written for {_and(without)}.")
        if "sft_1024" not in written and "r1_1024" in written:
            lines[-1] += " Leave out `SFT_long.py`, and run `python distill.py --init_from out/SFT.pth`."
    leaks = sum(steps["leak"] for steps in account.dropped.values())
    if leaks > MOST_LEAKS * account.read.total():
        lines.append(f"leak dropped {leaks:,} of {_count(account.read.total(), 'record')} "
                     f"({_share(leaks, account.read.total())}): they share much with a validation record. Look at "
                     "dropped/leak.jsonl.zst; if it is set phrases alone, raise `--contained`.")
    for more in (_warnings_about_files(manifest), _warnings_about_sources(account)):
        lines += more[:MOST_WARNINGS]
        if len(more) > MOST_WARNINGS:
            lines.append(f"{len(more) - MOST_WARNINGS:,} more like these: see manifest.json.")
    return [f"- {line}" for line in lines] or ["None."]


def _warnings_about_files(manifest: dict) -> list[str]:
    lines = [f"{plain(item['path'])} could not be read to its end: {plain(item['unreadable'])}. "
             f"{_count(item['records'], 'record')} before that are used." for item in manifest["inputs"]
             if item["unreadable"]]
    for role, name, items in _groups(manifest):
        records, malformed = (sum(item[key] for item in items) for key in ("records", "malformed"))
        shown = f"{plain(name)}{' (validation)' * (role == 'val')}"
        if malformed > MOST_MALFORMED * (records + malformed):
            lines.append(f"{shown}: {malformed:,} of {_count(records + malformed, 'record')} "
                         f"({_share(malformed, records + malformed)}) are malformed and were left out.")
        if not records:
            lines.append(f"{shown}: no record could be read.")
    return lines


def _warnings_about_sources(account: Account) -> list[str]:
    """What is unusual about single sources, those with the most records first."""
    lines = []
    for source in sorted(account.sources, key=lambda source: -account.read[source]):
        read, shown = account.read[source], plain(source)
        if missing := account.missing_of(source):
            lines.append(f"{shown}: the account does not add up, {missing:+,} records.")
        if read and not account.written[source] and not account.waiting[source]:
            lines.append(f"{shown} vanished: none of its {_count(read, 'record')} is left.")
        for step, number in _ranked(account.dropped[source]):
            if number > MOST_DROPPED * read:
                lines.append(f"{plain(step)} dropped {_share(number, read)} of {shown} ({number:,} of {read:,}).")
    return lines


def _groups(manifest: dict, most: int | None = None) -> list[tuple[str, str, list[dict]]]:
    """(role, name of files, the files of that name), those for training first; with `most`, so many names of each role
    at most, and the others as one."""
    found = []
    for role in ("train", "val"):
        groups = defaultdict(list)
        for item in _of_role(manifest, role):
            groups[item["source"]].append(item)
        alone = set(groups)
        if most and len(groups) > most:
            alone = set(sorted(groups, key=lambda name: -sum(item["records"] for item in groups[name]))[:most - 1])
        found += [(role, name, items) for name, items in groups.items() if name in alone]
        if others := [items for name, items in groups.items() if name not in alone]:
            found.append((role, f"{len(others):,} others", [item for items in others for item in items]))
    return found


def _inputs(manifest: dict) -> list[str]:
    rows, details = [], []
    for role, name, items in _groups(manifest, MOST_ROWS):
        records, malformed, size = (sum(item[key] for item in items) for key in ("records", "malformed", "bytes"))
        what = [", ".join(sorted({str(item[key]) for item in items if item[key]})) for key in ("form", "shape")]
        rows.append([plain(name), "training" if role == "train" else "validation", *map(plain, what), f"{len(items):,}",
                     _size(size), f"{records:,}", f"{malformed:,}", _share(malformed, records + malformed)])
        if malformed:
            reasons = sum((Counter(item["reasons"]) for item in items), Counter())
            details.append(f"- {plain(name)}, malformed: {_listed(reasons) or f'{malformed:,}'}")
            examples = [example for item in items for example in item["examples"]][:MOST_EXAMPLES]
            details += [f"  - {plain(_shortened(example))}" for example in examples]
        if notes := sum((Counter(item.get("notes", {})) for item in items), Counter()):
            details.append(f"- {plain(name)}, in conversion: {_listed(notes)}")
    if not rows:
        return ["Nothing."]
    titles = ["name", "for", "form", "shape", "files", "size", "records", "malformed", "malformed, share"]
    return [*_table(titles, rows, right=5), *(["", *details] if details else [])]


def _shortened(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]}…"


def _steps(manifest: dict) -> list[str]:
    steps = manifest["steps"]
    kinds = [(kind, title) for kind, title in (("text", "documents"), ("chat", "chats"))
             if any(step["in"].get(kind) for step in steps)]
    titles, rows, details = ["step"], [], []
    for _, title in kinds:
        titles += [f"{title} in", "changed", "dropped"]
    titles.append("dropped, share")
    for step in steps:
        numbers = [step[key].get(kind, 0) for kind, _ in kinds for key in ("in", "changed", "dropped")]
        rows.append([plain(step["name"]), *(f"{n:,}" for n in numbers), _share(_total(step, "dropped"),
                                                                              _total(step, "in"))])
        for title, counts in (("dropped", step["reasons"]), ("counted", step["counts"])):
            if any(counts.values()):
                details.append(f"- {plain(step['name'])}, {title}: {_listed(counts)}")
    lines = _table(titles, rows, right=len(titles) - 1) if rows else ["No step ran."]
    if skipped := manifest["settings"].get("skip"):
        lines += ["", f"Skipped on request: {_and([plain(name) for name in skipped])}."]
    if details:
        lines += ["", "Why, and what was counted:", "", *details]
    if near := manifest.get("near"):
        lines += ["", f"Near duplicates: {_count(near['pairs_compared'], 'pair')} compared, "
                      f"{_count(near['groups'], 'group')} found, the largest of {_count(near['largest'], 'record')}."]
    lines += _quality(manifest)
    return [*lines, "", f"![What each step dropped, by source]({CHARTS}/steps.png)"]


def _quality(manifest: dict) -> list[str]:
    """The scores of the documents, where there are any."""
    quality = manifest.get("quality")
    if not quality:
        return []
    lines = ["", f"Scores: {_count(quality['scored'], 'document')}, of which {quality['kept']:,} were kept."]
    if learned := quality.get("learned"):
        lines.append(f"What is good was learned from {learned['good']:,} texts of `--good` and {learned['rest']:,} "
                     "others; of the tenth that was held out it puts a good one before another in "
                     f"{_share(round(1000 * learned['auc']), 1000)} of all pairs.")
    names = {"bpb": "bits per byte, less is better", "good": "log-odds of good, more is better"}
    rows = [[names[score], which, *(f"{value:.4g}" for value in quality[score][which])]
            for score in names if score in quality for which in ("all", "kept")]
    titles = ["score", "documents", "least", "a quarter below", "half below", "three quarters below", "most"]
    return [*lines, *(["", *_table(titles, rows, right=5)] if rows else [])]


def _outputs(manifest: dict, account: Account) -> list[str]:
    outputs = manifest["outputs"]
    if not outputs:
        return ["Nothing."]
    rows = []
    for output in outputs:
        tokens = "not counted" if output["tokens"] is None else f"{output['tokens']:,}"
        rows.append([plain(output["name"]), f"{output['records']:,}", f"{output['characters']:,}",
                     _size(output["bytes"]), tokens, f"{len(output['files']):,}",
                     _size(sum(file["bytes"] for file in output["files"]))])
    lines = _table(["output", "records", "characters", "UTF-8", "tokens", "files", "size of files"], rows, right=6)
    for name, whole in SAMPLES.items():
        if any(output["name"] == name for output in outputs):
            lines += ["", f"{name} is a sample: its records are in {whole} too."]
    by_source = []
    for number, name, sources in account.groups(MOST_ROWS):
        records = [sum(output["by_source"].get(source, 0) for source in sources) for output in outputs]
        by_source.append([number, plain(name), *(f"{n:,}" for n in records)])
    lines += ["", "Records by source:", "",
              *_table(["#", "source", *(plain(output["name"]) for output in outputs)], by_source, right=len(outputs))]
    return [*lines, "", f"![Lengths of the records of each output]({CHARTS}/lengths.png)"]


def _categories(manifest: dict) -> list[str]:
    outputs = manifest["outputs"]
    rows = [[str(item["category"]), " · ".join(map(plain, item["keywords"])) or "–",
             *(f"{_in_category(output, item):,}" for output in outputs)] for item in manifest["categories"]]
    return ["Clusters of the records by their words; each record has the number of its own as `category`. The largest "
            "in the sample that they were made from is first.", "",
            *_table(["#", "keywords", *(plain(output["name"]) for output in outputs)], rows, right=len(outputs)),
            "", f"![Records of each category]({CHARTS}/categories.png)"]


def _in_category(output: dict, item: dict) -> int:
    return output.get("by_category", {}).get(str(item["category"]), 0)


def _account(manifest: dict, account: Account) -> list[str]:
    rows, waits = [], account.waiting.total() > 0
    for number, name, sources in account.groups(MOST_ROWS):
        dropped = sum((account.dropped[source] for source in sources), Counter())
        most = " · ".join(f"{plain(step)} {n:,}" for step, n in _ranked(dropped)[:3])
        read, written, waiting = (sum(counts[source] for source in sources)
                                  for counts in (account.read, account.written, account.waiting))
        rows.append([number, plain(name), most or "–", f"{read:,}", f"{dropped.total():,}", f"{written:,}",
                     *([f"{waiting:,}"] if waits else []), _share(written, read)])
    by_step = Counter({step["name"]: sum(step["by_source"].values()) for step in manifest["steps"]})
    terms = [f"{plain(step)} {n:,}" for step, n in by_step.items() if n]
    read, dropped, written = account.read.total(), by_step.total(), account.written.total()
    waiting = f" + {account.waiting.total():,} waiting for a tokenizer" if waits else ""
    right = dropped + written + account.waiting.total()
    difference = "" if read == right else f" **The difference is {read - right:+,}.**"
    lines = [f"{read:,} read {'=' if read == right else '≠'} {dropped:,} dropped + {written:,} written{waiting}."
             f"{difference} {'Dropped: ' + ' + '.join(terms) + '.' if terms else 'Nothing was dropped.'} "
             "Malformed records are not among those read."]
    if rows:
        numbers = ["read", "dropped", "written", *(["waiting"] if waits else []), "kept"]
        lines += ["", *_table(["#", "source", "dropped most by", *numbers], rows, right=len(numbers))]
    return [*lines, "", f"![Records of each source, read and written]({CHARTS}/sources.png)"]


def _where_to_look(manifest: dict) -> list[str]:
    files = [(kind, item) for kind in ("dropped", "listed") for item in manifest[kind]]
    if not files:
        return ["No file of dropped records was written."]
    notes = {"dropped": "left out of the output", "listed": "chats to have a look at"}
    rows = [[plain(item["file"]), notes[kind], f"{item['records']:,}", _size(item["bytes"])] for kind, item in files]
    most = max((item for _, item in files), key=lambda item: item["records"])
    return [*_table(["file", "its records are", "records", "size"], rows, right=2), "",
            *_commands([f"zstd -dc data/{most['file']} | head -n 3"])]


def _commands(commands: list[str]) -> list[str]:
    return ["```bash", *commands, "```"]


def _next_commands(manifest: dict, account: Account) -> list[str]:
    """Commands for a folder called data/, where the stages find their files by name. The real name is not in the
    report, which is the same wherever it is written."""
    written = {output["name"] for output in manifest["outputs"] if output["records"]}
    waiting = account.waiting.total()
    commands = ["python train_tokenizer.py"] if waiting or "pretrain" in written else []
    for name, stage in STAGES.items() if not waiting else ():
        if name not in written:
            continue
        commands.append(f"python {stage}")
        if stage == "distill.py" and "sft_1024" not in written:
            commands[-1] += " --init_from out/SFT.pth"  # there are no weights of SFT_long
        if manifest["settings"].get("balance"):
            text = " pretrain=0.1" if name != "pretrain" and "pretrain" in written else ""  # against forgetting
            commands[-1] += f" --data_path $(cat data/shares/{name}.txt){text}"
        sorted_by = manifest["settings"].get("sort_by")
        if sorted_by == "length" or sorted_by and name == "pretrain":  # chats have no score
            commands[-1] += " --order file"
    if not commands:
        return ["Nothing was written, so there is nothing to train on."]
    if not waiting:
        text = ["The stages find these files by their names, where this folder is `data/` (elsewhere: `--data_path "
                "FOLDER/NAME-*.jsonl.zst`). A tokenizer that is there already need not be trained again."]
    elif "pretrain" in written:
        text = ["Then the command that wrote this, with `--resume`: the chats are split by their number of tokens."]
    else:
        text = ["with `--data_path` and the files that hold the chats; then the command that wrote this, with "
                "`--resume`: the chats are split by their number of tokens."]
    return [*_commands(commands), "", *text]


def _rules(manifest: dict) -> list[str]:
    on = {"text": "documents", "message": "documents, messages", "whole": "documents, whole chats", "chat": "chats"}
    rows = [[plain(step["name"]), on.get(step["on"], plain(step["on"])), plain(step["rule"]), plain(step["origin"])]
            for step in manifest["steps"]]
    return _table(["step", "on", "rule", "origin"], rows, right=0) if rows else ["No step ran."]


def _settings(manifest: dict) -> list[str]:
    def shown(value) -> str:
        return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)

    rows = [[plain(flag), "–" if value in (None, [], ()) else plain(shown(value))]
            for flag, value in sorted(manifest["settings"].items())]
    return _table(["flag", "value"], rows, right=0)


# ---------------------------------------------------------------------------------------------
# charts


def _draw_charts(folder: Path, manifest: dict, account: Account) -> None:
    import matplotlib  # half a second: only when a chart is drawn

    # a font that comes with matplotlib, and no formulas in the names of files: the same bytes on every machine
    with matplotlib.rc_context({"font.family": ["DejaVu Sans"], "text.parse_math": False, "text.usetex": False}):
        charts = {"sources": _draw_sources, "steps": _draw_steps, "lengths": _draw_lengths}
        if manifest.get("categories"):
            charts["categories"] = _draw_categories
        for name, draw in charts.items():
            figure = draw(manifest, account)
            write_whole(folder / f"{name}.png", partial(figure.savefig, format="png", dpi=110,
                                                        metadata={"Software": None}))


def _label(number: str, name: str) -> str:
    """A source's number in the tables, and what of its name the font can show: it has no hanzi."""
    name = "".join(c for c in name if " " <= c <= "~").strip()
    return f"{number} {name if len(name) <= 24 else name[:23] + '…'}".strip()


def _figure(height: float, title: str):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")
    figure.suptitle(title)
    return figure


def _bars(axes, labels: list[str], xlabel: str) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()  # the first is on top
    axes.set_xlabel(xlabel)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _nothing(axes, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)
    axes.set_axis_off()


def _draw_sources(manifest: dict, account: Account):
    """Records of each source, read and written."""
    rows = [(_label(number, name), sum(account.read[source] for source in sources),
             sum(account.written[source] for source in sources)) for number, name, sources in account.groups(MOST_BARS)]
    figure = _figure(1.6 + 0.28 * max(len(rows), 3), "records of each source, read and written")
    axes = figure.subplots()
    if not any(read for _, read, _ in rows):
        _nothing(axes, "nothing was read")
        return figure
    axes.barh(range(len(rows)), [read for _, read, _ in rows], color="#c8d3df", label="read")
    axes.barh(range(len(rows)), [written for *_, written in rows], color="#2f6fab", height=0.5, label="written")
    for row, (_, read, written) in enumerate(rows):
        axes.annotate(f"{read:,} → {written:,}", (max(read, written), row), xytext=(3, 0), textcoords="offset points",
                      va="center", fontsize=7)
    axes.set_xlim(0, 1.25 * max(max(read, written) for _, read, written in rows))
    _bars(axes, [label for label, *_ in rows], "records")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _draw_steps(manifest: dict, account: Account):
    """Records that each step dropped, by source."""
    steps = [step["name"] for step in manifest["steps"] if any(step["by_source"].values())]
    figure = _figure(2.2 + 0.28 * max(len(steps), 3), "records that each step dropped, by source")
    axes = figure.subplots()
    if not steps:
        _nothing(axes, "nothing was dropped")
        return figure
    left = [0] * len(steps)
    for color, (number, name, sources) in enumerate(account.groups(MOST_COLORS)):
        widths = [sum(account.dropped[source][step] for source in sources) for step in steps]
        if any(widths):
            axes.barh(range(len(steps)), widths, left=left, color=f"C{color}", label=_label(number, name))
            left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, total in enumerate(left):
        axes.annotate(f"{total:,}", (total, row), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_xlim(0, 1.12 * max(left))
    _bars(axes, [_shown(step) for step in steps], "records")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def _shown(text: str) -> str:
    return "".join(c if " " <= c <= "~" else "?" for c in text)


def _draw_lengths(manifest: dict, account: Account):
    """Records of each output by length. A bar's labels are its edges; all bars have the same width."""
    outputs = manifest["outputs"]
    figure = _figure(0.6 + 2.2 * max(len(outputs), 1), "lengths of the records of each output")
    for axes, output in zip(figure.subplots(max(len(outputs), 1), squeeze=False)[:, 0], outputs or [None], strict=True):
        lengths = output and output["lengths"]
        if not lengths or not any(lengths["counts"]):
            _nothing(axes, f"{_shown(output['name'])}: no records" if output else "nothing was written")
            continue
        counts, edges = lengths["counts"], lengths["edges"]
        axes.bar(range(len(counts)), counts, width=0.96, align="edge", color="#2f6fab")
        every = -(-len(edges) // 16)  # labels that fit
        ticks = range(0, len(edges), every)
        axes.set_xticks(ticks, [_edge(edges[tick]) for tick in ticks], fontsize=8)
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.set(title=_shown(output["name"]), xlabel=_shown(lengths["unit"]), ylabel="records")
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    return figure


def _edge(edge: float | None) -> str:
    return "∞" if edge is None or edge == float("inf") else f"{edge:,.0f}"


def _draw_categories(manifest: dict, account: Account):
    """Records of each category, by output."""
    items = manifest["categories"][:MOST_ROWS]
    outputs = [output for output in manifest["outputs"] if output["name"] not in SAMPLES]
    figure = _figure(1.8 + 0.17 * max(len(items), 3), "records of each category, by output")
    axes = figure.subplots()
    left = [0] * len(items)
    for color, output in enumerate(outputs):
        widths = [_in_category(output, item) for item in items]
        if any(widths):
            axes.barh(range(len(items)), widths, left=left, color=f"C{color}", label=_shown(output["name"]))
            left = [start + width for start, width in zip(left, widths, strict=True)]
    if not any(left):
        _nothing(axes, "nothing was written")
        return figure
    for row, total in enumerate(left):
        axes.annotate(f"{total:,}", (total, row), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_xlim(0, 1.12 * max(left))
    _bars(axes, [str(item["category"]) for item in items], "records")
    axes.tick_params(axis="y", labelsize=7)
    axes.set_ylabel(f"category, the first {MOST_ROWS}" if len(manifest["categories"]) > MOST_ROWS else "category")
    axes.margins(y=0.01)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure
