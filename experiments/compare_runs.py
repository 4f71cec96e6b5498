"""Compare finished runs of one stage: steps, tokens, minutes of training and validation scores, beside one of them.

    python experiments/compare_runs.py --stage pretrain out/a out/b
    python experiments/compare_runs.py --stage SFT out/a out/b out/c --beside b --jsonl curves.jsonl

Each argument is the --out_dir of a run. The numbers come from log/<stage>.jsonl, the settings from <stage>.pth. Runs
that differ in tokenizer, validation data or --max_seq_len are refused: their validation scores do not compare
(evaluate.py scores any weights on the same files). Minutes count training steps, without validation and saving.
--jsonl appends one line per run with its settings and its curve. The last line on stdout is one JSON object.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import print_table
from common import exits
from common.runlog import RunLog
from common.weights import STAGES, load_weights
from Config import OneLineParser, UserError


def read_run(folder: Path, stage: str) -> dict:
    """The end, curve and settings of one run. Raises UserError where it is not finished or not complete."""
    weights = folder / f"{stage}.pth"
    _, _, meta = load_weights(weights, f"python {stage}.py makes it")
    rows = RunLog(str(folder), stage, is_main=False).read_metrics()
    curve = [{key: row[key] for key in ("step", "tokens", "val_loss", "val_bpb")} for row in rows if "val_bpb" in row]
    missing = {"step", "settings", "tokenizer_sha256", "val"} - set(meta)
    if missing or not {"targets", "bytes"} <= set(meta["val"]):
        raise UserError(f"{weights}: lacks {', '.join(sorted(missing)) or 'validation scores'}: written by another "
                        "version, or before the first validation")
    if not curve or not curve[-1]["step"] == rows[-1]["step"] == meta["step"]:
        raise UserError(f"{folder}: the {stage} run is not finished (weights of step {meta['step']}, last validation "
                        f"at step {curve[-1]['step'] if curve else 0}): resume it first")
    tokens, minutes = 0, 0.0
    for row in rows:  # each line holds the speed since the line before it
        minutes += (row["tokens"] - tokens) / max(row["tokens_per_second"], 1e-9) / 60
        tokens = row["tokens"]
    settings = meta["settings"]
    return {"run": folder.name, "stage": stage, "seed": settings.get("seed"), "steps": meta["step"], "tokens": tokens,
            "minutes": minutes, "val_loss": curve[-1]["val_loss"], "val_bpb": curve[-1]["val_bpb"],
            "settings": settings, "curve": curve,
            "must_be_equal": {"the tokenizer": meta["tokenizer_sha256"], "--max_seq_len": settings.get("max_seq_len"),
                              "the validation data": meta.get("val_sha256")}}


def check_comparable(first: dict, other: dict) -> None:
    """Raises UserError, naming what differs, where the validation scores of two runs do not compare."""
    for name, value in first["must_be_equal"].items():
        if value != other["must_be_equal"][name]:
            raise UserError(f"{first['run']} and {other['run']} do not compare: {name} differs "
                            f"({value} and {other['must_be_equal'][name]})")


def beside(first: dict, run: dict) -> dict:
    """A run's numbers relative to those of `first`, and the settings in which it differs: {name: [first's, its]}."""
    before, now = first["settings"], run["settings"]
    return {"tokens_ratio": run["tokens"] / first["tokens"],
            "minutes_ratio": run["minutes"] / first["minutes"] if first["minutes"] else None,
            "val_bpb_difference": run["val_bpb"] - first["val_bpb"],
            "differs": {name: [before.get(name), now.get(name)] for name in sorted(before.keys() | now.keys())
                        if before.get(name) != now.get(name)}}


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="OUT_DIR", help="the --out_dir of a run")
    parser.add_argument("--stage", required=True, choices=tuple(STAGES.values()))
    parser.add_argument("--beside", metavar="NAME", help="the run that the others are compared to (default: the first)")
    parser.add_argument("--jsonl", type=Path, metavar="FILE", help="append settings and curve of each run")
    args = parser.parse_args(argv)
    runs = [read_run(folder, args.stage) for folder in args.folders]
    names = [run["run"] for run in runs]
    if len(set(names)) < len(names):  # folders of the same name in different places
        for run, folder in zip(runs, args.folders, strict=True):
            run["run"] = str(folder)
        names = [run["run"] for run in runs]
    if args.beside not in (None, *names):
        raise UserError(f"--beside {args.beside}: not one of {', '.join(names)}")
    first = runs[names.index(args.beside) if args.beside else 0]
    for run in runs:
        check_comparable(first, run)
    for run in runs:
        del run["must_be_equal"]
    if args.jsonl:
        try:
            args.jsonl.parent.mkdir(parents=True, exist_ok=True)
            with open(args.jsonl, "a", encoding="utf-8", errors="backslashreplace") as stream:
                stream.writelines(json.dumps(run, ensure_ascii=False) + "\n" for run in runs)
        except OSError as error:
            raise UserError(f"--jsonl {args.jsonl}: {error}") from None
    relative = [beside(first, run) for run in runs]

    rows = []
    for run, numbers in zip(runs, relative, strict=True):
        minutes_ratio = numbers["minutes_ratio"]
        rows.append([run["run"], f"{run['steps']:,}", f"{run['tokens']:,}", f"{run['minutes']:.2f}",
                     f"{run['val_loss']:.4f}", f"{run['val_bpb']:.4f}", f"{numbers['tokens_ratio']:.1%}",
                     "" if minutes_ratio is None else f"{minutes_ratio:.1%}", f"{numbers['val_bpb_difference']:+.4f}"])
    print_table(["run", "steps", "tokens", "minutes", "val_loss", "val_bpb", f"tokens, of {first['run']}'s",
                 "minutes, of its", "val_bpb - its"], rows)
    for run, numbers in zip(runs, relative, strict=True):
        if run is not first:
            print(f"{run['run']} differs from {first['run']} in " + (", ".join(
                f"{name} ({old} → {new})" if not name.startswith("the ") else name
                for name, (old, new) in numbers["differs"].items()) or "nothing"))
    ends = [{key: value for key, value in run.items() if key not in ("settings", "curve", "stage")} | numbers
            for run, numbers in zip(runs, relative, strict=True)]
    print(json.dumps({"stage": args.stage, "beside": first["run"], "runs": ends}, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(exits.run(main))
