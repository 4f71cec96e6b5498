"""Which data files a flag names, and what kind of records they hold."""

import glob
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from Config import UserError
from text.records import read_lines

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst")
DATA_FOLDER = Path("data")  # where a bare name is looked up
PUBLISHING = ".prepare_data.publishing"  # a file beside the others while prepare_data.py gives them their names
KINDS = {"question": ({"question", "answer"}, {"question", "decline"}),  # the keys of each form
         "chat": ({"conversations"},), "text": ({"text"},)}


@dataclass(frozen=True)
class Source:
    """Files that are read together as one source. `share` is its part of the tokens, or None without shares."""

    name: str
    share: float | None
    files: list[Path]


def find_sources(arguments: list[str], flag: str = "--data_path") -> list[Source]:
    """The sources that the arguments of --data_path name: each PATH=SHARE is one, scaled so that the shares sum to 1;
    arguments without shares are one source together.

    An argument has a share if what follows its last "=" is a positive number and no file or folder bears the whole
    name. A file is read once, however often it is named. Raises UserError when a file is missing, when it is there
    twice, plain and packed, or in two sources, and when only some arguments have shares.
    """
    split = [_split_share(argument) for argument in arguments]
    if all(share is None for _, share in split):
        files = {file.resolve(): file for path, _ in split for file in find_files(path, flag)}
        _refuse_packed_copies(list(files), flag)
        return [Source(" ".join(arguments), None, list(files.values()))]
    if any(share is None for _, share in split):
        bare = next(path for path, share in split if share is None)
        raise UserError(f"{flag} {bare}: all sources or none have a share, a positive number, as in "
                        f"{bare.partition('=')[0]}=0.5")
    if repeated := sorted({path for path, _ in split if [p for p, _ in split].count(path) > 1}):
        raise UserError(f"{flag} {repeated[0]}: named twice; add its shares up")
    total = math.fsum(share for _, share in split)
    sources = [Source(path, share / total, find_files(path, flag)) for path, share in split]
    owner: dict[Path, str] = {}
    for source in sources:
        for file in source.files:
            if (other := owner.setdefault(file.resolve(), source.name)) != source.name:
                raise UserError(f"{flag}: {file} is in two sources, {other} and {source.name}")
    _refuse_packed_copies(list(owner), flag)
    return sources


def find_mixture(arguments: list[str], by_default: bool) -> tuple[list[Source], list[str]]:
    """The sources of a stage's --data_path, and lines for the log. All that the user names must be there; of a stage's
    own mixture (`by_default`) only the first, and those of the others that are in data/ are taken with it, at shares
    scaled to 1. The first alone is one source without shares."""
    if not by_default:
        return find_sources(arguments), []
    first, *others = arguments
    there = [argument for argument in others if _is_in_data(_split_share(argument)[0])]
    taken = [first, *there] if there else [_split_share(first)[0]]
    line = f"default data: {' '.join(taken)}"
    if missing := [argument for argument in others if argument not in there]:
        line += f"; not in {DATA_FOLDER}/: {' '.join(missing)}, without which earlier skills fade"
    return find_sources(taken), [line]


def _is_in_data(name: str) -> bool:
    return bool(_find_by_name(name, "--data_path")) or (DATA_FOLDER / name).is_dir()


def _split_share(argument: str) -> tuple[str, float | None]:
    path, _, share = argument.rpartition("=")
    is_share = re.fullmatch(r"(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", share) and 0 < float(share) < math.inf
    return (path, float(share)) if path and is_share and not os.path.exists(argument) else (argument, None)


def find_files(path: str, flag: str = "--data_path") -> list[Path]:
    """The data files behind a file, a folder (its *.jsonl, .gz, .xz, .zst), a glob, or the name of files in data/,
    sorted. Raises UserError, naming the `flag`, when there are none, when a name is ambiguous, or when a file is there
    twice, plain and packed."""
    is_name = re.fullmatch(r"[\w-]+", path) is not None
    if is_name and (found := _find_by_name(path, flag)):
        _refuse_half_published([DATA_FOLDER], flag)
        return found
    if is_name and not os.path.exists(path) and (DATA_FOLDER / path).is_dir():
        path = str(DATA_FOLDER / path)
    if os.path.isdir(path):
        found = _files_in(Path(path))
        reason = "" if found else f"the folder holds no *.jsonl, *.jsonl.gz, *.jsonl.xz or *.jsonl.zst{_others(path)}"
    elif os.path.isfile(path):
        found, reason = [Path(path)], ""
    else:
        found = [Path(p) for p in glob.glob(path, recursive=True) if os.path.isfile(p)]
        reason = "no such file, folder or match"
        if is_name:
            reason = (f"there is no {DATA_FOLDER / path}.jsonl (or .jsonl.gz, .xz, .zst, or shards "
                      f"{DATA_FOLDER / path}-*.jsonl). Make the built-in corpus, python make_demo_data.py --out_dir "
                      f"{DATA_FOLDER}, or download real data (pip install modelscope), modelscope download --dataset "
                      f"Harris/pretrain --local_dir {DATA_FOLDER}, or name a file of your own: {flag} FILE")
        elif re.search(r"=[-+.\d]+$", path):
            reason += " (a share is a positive number, as in PATH=0.5)"
    _refuse_half_published([file.parent for file in found] or [DATA_FOLDER if is_name else Path(path)], flag)
    if not found:
        raise UserError(f"{flag} {path}: {reason}")
    _refuse_packed_copies(found, flag)
    return sorted(found)


def _files_in(folder: Path) -> list[Path]:
    """The data files of a folder; hidden ones (a half-written file, macOS's ._copies) are none."""
    return sorted(p for p in folder.iterdir() if p.name.endswith(SUFFIXES) and p.name[0] != "." and p.is_file())


def _others(folder: str) -> str:
    """What a folder holds that is no *.jsonl, for a message."""
    files = sorted(p for p in Path(folder).iterdir() if p.name[0] != "." and p.is_file())
    if not files:
        return f" (subfolders are read when named: '{os.path.join(folder, '**', '*.jsonl')}')"
    return explain(files[:20]) or f"; name one of its files: {files[0]}"


def _refuse_packed_copies(files: list[Path], flag: str) -> None:
    """Raises UserError where x.jsonl and x.jsonl.gz, say, are both among the files: everything would be read twice."""
    seen: dict[tuple[Path, str], Path] = {}
    for file in files:
        name = re.sub(r"\.(gz|xz|zst)$", "", file.name)
        if (other := seen.setdefault((file.parent, name), file)).name != file.name:
            raise UserError(f"{flag}: {min(other, file)} and {max(other, file)} are there, the same data twice: remove "
                            "one, or name the files to read")


def _refuse_half_published(folders: list[Path], flag: str) -> None:
    """Raises UserError where prepare_data.py was stopped while it gave its files their names: some may be missing."""
    for folder in sorted(set(folders)):
        if (folder / PUBLISHING).exists():
            raise UserError(f"{flag} {folder}: prepare_data.py was stopped while it named its files there: repeat its "
                            "command with --resume")


def _find_by_name(name: str, flag: str) -> list[Path]:
    """NAME.jsonl, NAME.jsonl.{gz,xz,zst} or the shards NAME-*.jsonl[.gz|.xz|.zst] in data/, or none of them. Raises
    UserError where two of these forms are there."""
    if not DATA_FOLDER.is_dir():
        return []
    whole = [DATA_FOLDER / f"{name}{suffix}" for suffix in SUFFIXES if (DATA_FOLDER / f"{name}{suffix}").is_file()]
    shards = [file for file in _files_in(DATA_FOLDER) if file.name.startswith(f"{name}-")]
    forms = whole + ([DATA_FOLDER / f"{name}-*.jsonl"] if shards else [])
    if len(forms) > 1:
        raise UserError(f"{flag} {name}: {forms[0]} and {forms[1]} are there: remove one, or name the file")
    _refuse_packed_copies(shards, f"{flag} {name}")
    return whole or shards


# ---------------------------------------------------------------------------------------------
# what the files hold


def kind_of(files: list[Path], among: tuple[str, ...] = tuple(KINDS)) -> str:
    """The first of the kinds `among` whose keys the first record has that has any of them. Raises UserError, which says
    what the file is instead where that can be told."""
    for file in files:
        for _, line in read_lines(file):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            keys = set(record) if isinstance(record, dict) else set()
            for kind in among:
                if any(form <= keys for form in KINDS[kind]):
                    return kind
    keys = " or ".join(" and ".join(f'"{key}"' for key in sorted(form)) for kind in among for form in KINDS[kind])
    raise UserError(f"{files[0]}: no record with {keys}{explain(files)}")


def explain(files: list[Path]) -> str:
    """"; FILE is …" for the first of the files that is in another form than ours, or "" where none is."""
    from text.convert import describe  # here: only an error needs it

    return next((f"; {file} is {what}" for file in files if (what := describe(file))), "")
