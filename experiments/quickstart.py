"""Helpers of quickstart.sh: a time estimate before the run, a report and its thresholds after it.

    python experiments/quickstart.py estimate
    python experiments/quickstart.py report --out_dir out/quickstart --seed 1
    python experiments/quickstart.py compare docs/results/quickstart/seed_*.json

`report` reads the output of evaluate.py in <out_dir>/eval and writes report.json, report.md and two charts. It exits
with 1 if one of THRESHOLDS is missed. `compare` prints the thresholds of several reports in one table (runs/seeds.sh).
"""

import argparse
import json
import math
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.answers import wilson
from common.exits import run
from common.files import write_lines
from common.runtime import describe_machine, pick_device
from Config import LLMConfig, OneLineParser, UserError

STAGES = {"pretrain": "pretrain", "SFT": "SFT", "SFT_long": "SFT_long", "control": "control: no thoughts",
          "distill": "distill: thinks first"}
QUESTIONS = {"facts/asked": "facts asked in other words", "facts/never_asked": "facts never asked",
             "one_step": "one-step problems", "multi_step": "multi-step problems"}
THRESHOLDS = (  # name, smallest value, and how to compute it from the scores of all stages
    ("SFT_long answers one-step problems", 0.90, lambda s: s["SFT_long"]["one_step"]["accuracy"]),
    ("SFT_long answers facts asked in other words", 0.90, lambda s: s["SFT_long"]["facts/asked"]["accuracy"]),
    ("SFT_long answers facts never asked", 0.70, lambda s: s["SFT_long"]["facts/never_asked"]["accuracy"]),
    ("distill is well-formed", 0.95, lambda s: s["distill"]["well_formed"]["accuracy"]),
    ("distill above SFT_long on multi-step problems", 0.20, lambda s: gain(s, "SFT_long")[0]),
    ("distill above the control on multi-step problems", 0.15, lambda s: gain(s, "control")[0]),
)
SECONDS_HERE = 405  # training and scoring, on the two AVX512-BF16 cores on which PROBE_SECONDS was measured
PROBE_SECONDS = 0.16


# ---------------------------------------------------------------------------------------------
# before the run


def estimate() -> int:
    """Print how long the quickstart should take, estimated from a few training steps of its model."""
    import torch

    from common import runtime
    from common.optim import make_optimizers
    from fastpath import accelerate
    from model import WeakWater

    device, _ = runtime.pick_device("auto")
    dtype, reason = runtime.pick_dtype("auto", device)
    runtime.prepare(device, 0, False)
    model = WeakWater(LLMConfig.preset("demo", vocab_size=2048)).to(device)
    accelerate(model, device, dtype)
    optimizers = make_optimizers(model, "muon", 1e-3, 0.1)
    lengths = [64] * 64
    tokens = torch.randint(0, 2048, (1, sum(lengths)), device=device)
    batch = dict(tokens=tokens, lengths=lengths, target_index=torch.arange(tokens.numel(), device=device),
                 targets=tokens[0], weights=torch.ones(tokens.numel(), device=device))
    seconds = []
    for _ in range(6):
        begin = time.perf_counter()
        with runtime.autocast(device, dtype):
            loss = model(**batch) / tokens.numel()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - begin)
    step = sorted(seconds[1:])[2]
    print(f"{describe_machine(device)}; {dtype}: {reason}; a training step takes {step:.2f} s: "
          f"about {math.ceil(SECONDS_HERE * step / PROBE_SECONDS / 60)} minutes in all")
    return 0


# ---------------------------------------------------------------------------------------------
# after the run


def share(hits: list[bool], what: str) -> dict:
    """The share of True in `hits` with its 95 % interval. Raises UserError if there are none."""
    if not hits:
        raise UserError(f"no reply to a question of {what}: run quickstart.sh")
    return {"n": len(hits), "correct": sum(hits), "accuracy": sum(hits) / len(hits),
            "interval95": wilson(sum(hits), len(hits))}


def thought_lines(reply: str) -> list[str]:
    """The lines inside a reply's <think>."""
    match = re.search(r"<think>(.*?)</think>", reply, re.DOTALL)
    return [line.strip() for line in match.group(1).strip().split("\n")] if match else []


def last_line(path: Path) -> dict:
    """The JSON object on the last line of a command's output."""
    return json.loads(path.read_text(encoding="utf-8").splitlines()[-1])


def scores_of(out: Path, stage: str) -> dict:
    """The scores of one stage, from the last line of evaluate.py and its generations."""
    result = last_line(out / "eval" / f"{stage}.json")
    replies = [json.loads(line) for line in (out / "eval" / f"{stage}.jsonl").read_text(encoding="utf-8").splitlines()]
    scores = {"bpb": {Path(f["file"]).name.split(".")[0]: f["bpb"] for f in result["files"]}}
    for source in ("facts/asked", "facts/never_asked", "one_step"):
        scores[source] = share([r["correct"] for r in replies if r["source"] == source], source)
    longer = [r for r in replies if r["source"].startswith("multi_step/")]
    scores["multi_step"] = share([r["correct"] for r in longer], "multi_step")
    scores["right_lines"] = sorted(r["line"] for r in longer if r["correct"])
    steps = sorted({int(r["source"].split("/")[1]) for r in longer})
    scores["by_steps"] = {n: share([r["correct"] for r in longer if r["source"] == f"multi_step/{n}"], f"{n} steps")
                          for n in steps}
    scores["well_formed"] = share([r["well_formed"] for r in longer], "multi_step")
    asked = (out / "data" / "eval" / "multi_step.jsonl").read_text(encoding="utf-8").splitlines()
    right = [thought_lines(r["reply"]) == json.loads(asked[r["line"] - 1])["thought"] for r in longer]
    scores["thoughts_right"] = share(right, "multi_step")
    return scores


def gain(scores: dict, other: str) -> tuple[float, float, float]:
    """(difference, low, high): distill's multi-step accuracy minus that of another stage, with its 95 % interval.

    Both answer the same questions, so only the questions that exactly one of them answers count (Bonett & Price 2012,
    adjusted Wald interval for paired proportions). The interval does not cover the variation between training seeds.
    """
    n, ours, theirs = (scores["distill"]["multi_step"]["n"], set(scores["distill"]["right_lines"]),
                       set(scores[other]["right_lines"]))
    only_ours, only_theirs = ((len(one) + 1) / (n + 2) for one in (ours - theirs, theirs - ours))
    middle = only_ours - only_theirs
    reach = 1.959964 * math.sqrt((only_ours + only_theirs - middle**2) / (n + 2))
    return (len(ours) - len(theirs)) / n, middle - reach, middle + reach


def percent(score: dict) -> str:
    """ "93 % (90–95)". """
    low, high = score["interval95"]
    return f"{score['accuracy']:.0%} ({100 * low:.0f}–{100 * high:.0f})"


def draw(out: Path, scores: dict) -> None:
    """Draw thinking.png, accuracy by number of steps, and stages.png, accuracy of each stage by kind of question."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def error_bars(parts: list[dict]) -> list[list[float]]:
        return [[abs(p["accuracy"] - p["interval95"][end]) for p in parts] for end in (0, 1)]

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for stage, colour in (("SFT_long", "tab:gray"), ("control", "tab:orange"), ("distill", "tab:blue")):
        parts = scores[stage]["by_steps"]
        axes.errorbar(list(parts), [p["accuracy"] for p in parts.values()], error_bars(list(parts.values())),
                      marker="o", capsize=3, label=STAGES[stage], color=colour)
    axes.set(title="Held-out problems answered, by number of steps", xlabel="steps", ylabel="share right",
             ylim=(0, 1.02))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(out / "thinking.png", dpi=110)
    plt.close(figure)

    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    width = 0.8 / len(STAGES)
    for i, stage in enumerate(STAGES):
        parts = [scores[stage][question] for question in QUESTIONS]
        axes.bar([x + (i - 2) * width for x in range(len(parts))], [p["accuracy"] for p in parts], width,
                 yerr=error_bars(parts), capsize=2, label=STAGES[stage])
    axes.set_xticks(range(len(QUESTIONS)), list(QUESTIONS.values()))
    axes.set(title="What each stage answers (held out, greedy, 95 % intervals)", ylabel="share right", ylim=(0, 1.02))
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3, axis="y")
    figure.savefig(out / "stages.png", dpi=110)
    plt.close(figure)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def write_report(args) -> int:
    """Compute the scores, write the report and return the exit code. Raises UserError if a run is incomplete."""
    out = Path(args.out_dir)
    try:
        scores = {stage: scores_of(out, stage) for stage in STAGES}
        seconds = {name: int(n) for name, n in (line.split() for line in (out / "seconds").read_text().splitlines())}
        control = {key: last_line(out / "control.json")[key]
                   for key in ("targets", "control_targets", "conversations", "control_conversations")}
        if not seconds:
            raise UserError("no times")
    except (OSError, ValueError, KeyError, IndexError) as error:
        mistake = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(f"--out_dir {out} holds no whole run of quickstart.sh ({mistake})") from None
    verdicts = [{"what": what, "least": least, "value": value(scores), "met": value(scores) >= least}
                for what, least, value in THRESHOLDS]
    machine = describe_machine(pick_device("auto")[0])
    report = {"seed": args.seed, "smoke": args.smoke, "machine": machine, "seconds": seconds, "targets": control,
              "stages": scores, "gains": {other: gain(scores, other) for other in ("SFT_long", "control")},
              "thresholds": verdicts}
    write_lines(out / "report.json", [json.dumps(report, ensure_ascii=False, indent=1)])
    draw(out, scores)
    def judged(met: bool) -> str:
        return "not judged" if args.smoke else "met" if met else "**missed**"

    files = list(scores["pretrain"]["bpb"])
    steps = list(scores["distill"]["by_steps"])
    lines = [
        "# Quickstart" + (" (smoke test: too short to learn anything)" if args.smoke else ""), "",
        f"`bash quickstart.sh --seed {args.seed}{' --smoke' if args.smoke else ''}` on {machine}: "
        f"{sum(seconds.values()) / 60:.1f} minutes ({', '.join(f'{k} {v} s' for k, v in seconds.items())}).", "",
        "Every stage is asked in chat form, the pretrained model too, which has never seen a chat. Replies are greedy, "
        "questions held out; in brackets the 95 % interval (Wilson).", "",
        "## What each stage can do", "",
        table(["stage", *(f"bits per byte, {f}" for f in files), *QUESTIONS.values()],
              [[label, *(f"{scores[s]['bpb'][f]:.3f}" for f in files), *(percent(scores[s][q]) for q in QUESTIONS)]
               for s, label in STAGES.items()]), "",
        "![what each stage answers](stages.png)", "",
        "## Does thinking help?", "",
        f"`control` starts from the same SFT_long weights and trains on the same file with the thoughts taken out, for "
        f"as many target tokens ({control['control_targets']:,}; distill: {control['targets']:,}). Without thoughts "
        f"replies are short, so it sees {control['control_conversations']:,} conversations where distill sees "
        f"{control['conversations']:,}.", "",
        table(["multi-step problems of", *(f"{n} steps" for n in steps), "all", "well-formed", "thoughts all right"],
              [[STAGES[s], *(percent(scores[s]["by_steps"][n]) for n in steps), percent(scores[s]["multi_step"]),
                *([percent(scores[s][k]) for k in ("well_formed", "thoughts_right")] if s == "distill" else ["", ""])]
               for s in ("SFT_long", "control", "distill")]), "",
        *(f"Thinking is {100 * d:.0f} points ({100 * low:.0f} to {100 * high:.0f}) above {STAGES[other].split(':')[0]}."
          for other, (d, low, high) in report["gains"].items()), "",
        "![accuracy by number of steps](thinking.png)", "",
        "## Thresholds", "",
        table(["what", "at least", "is", ""], [[v["what"], f"{v['least']:.0%}", f"{v['value']:.1%}",
                                               judged(v["met"])] for v in verdicts]), "",
    ]
    write_lines(out / "report.md", lines[:-1])  # the last is empty
    print("\n".join(line for line in lines if not line.startswith("![")))
    print(f"report: {out / 'report.md'}, report.json, thinking.png, stages.png")
    missed = [v["what"] for v in verdicts if not v["met"]]
    if missed and not args.smoke:
        print("missed: " + "; ".join(missed), file=sys.stderr)
        return 1
    return 0


def compare(paths: list[str]) -> int:
    """Print each threshold's value in several reports and the smallest. Returns 1 if one is missed."""
    try:
        reports = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]
        reports.sort(key=lambda report: report["seed"])
        if len({tuple(v["what"] for v in report["thresholds"]) for report in reports}) > 1:
            raise UserError("the reports have other thresholds: they come from different versions of this script")
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"not a report.json of quickstart.sh: {type(error).__name__}: {error}") from None
    rows, missed = [], False
    for verdicts in zip(*(report["thresholds"] for report in reports), strict=True):
        smallest = min(verdict["value"] for verdict in verdicts)
        missed |= smallest < verdicts[0]["least"]
        rows.append([verdicts[0]["what"], f"{verdicts[0]['least']:.0%}", *(f"{v['value']:.1%}" for v in verdicts),
                     f"**{smallest:.1%}**"])
    rows.append(["minutes", "", *(f"{sum(report['seconds'].values()) / 60:.1f}" for report in reports), ""])
    print(table(["what", "at least", *(f"seed {report['seed']}" for report in reports), "smallest"], rows))
    for machine in sorted({report["machine"] for report in reports}):
        print(f"\n{machine}")
    return int(missed)


def main() -> int:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("estimate", help="how long quickstart.sh will take here")
    reporting = commands.add_parser("report", help="write the report and check the thresholds")
    reporting.add_argument("--out_dir", default="out/quickstart")
    reporting.add_argument("--seed", type=int, default=1)
    reporting.add_argument("--smoke", action="store_true", help="do not check the thresholds")
    comparing = commands.add_parser("compare", help="compare several reports")
    comparing.add_argument("reports", nargs="+", metavar="report.json")
    args = parser.parse_args()
    if args.command == "estimate":
        return estimate()
    return write_report(args) if args.command == "report" else compare(args.reports)


if __name__ == "__main__":
    sys.exit(run(main))
