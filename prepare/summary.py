"""What a run met and did, for the manifest and the terminal."""

from collections import Counter

from Config import UserError
from prepare.step import Step
from prepare.work import Tally

SHOWN = 12  # files whose line is printed


def say_inputs(inputs: list[dict], max_bad_ratio: float) -> None:
    """Print what the files hold. Raises UserError where too much of the training or validation files is malformed."""
    for item in inputs[:SHOWN]:
        what = ", ".join(filter(None, (item["form"], item["shape"])))
        malformed = f", {item['malformed']:,} malformed" if item["malformed"] else ""
        print(f"{item['path']}: {what or 'not read'}: {item['records']:,} records{malformed}")
    if len(inputs) > SHOWN:
        print(f"… and {len(inputs) - SHOWN:,} files more")
    for item in inputs[:SHOWN]:
        for example in item["examples"][:2]:
            print(f"malformed: {example}")
        for note, n in item["notes"].items():
            print(f"{item['path']}: {n:,} {note}")
    for role, flag in (("train", "--data_path"), ("val", "--val_path")):
        items = [item for item in inputs if item["role"] == role]
        malformed, records = (sum(item[key] for item in items) for key in ("malformed", "records"))
        if malformed > max_bad_ratio * (malformed + records):
            worst = max(items, key=lambda item: item["malformed"])
            example = (worst["examples"] or ["-"])[0]
            hint = "; if a field of these is the text: --rename_field FIELD=text" if "no known shape" in example else ""
            raise UserError(f"{flag}: {malformed:,} of {malformed + records:,} records are malformed, more than "
                            f"--max_bad_ratio {max_bad_ratio}; most of them in {worst['path']} (the first: "
                            f"{example}){hint}")
        if items and not records:
            raise UserError(f"{flag}: no record in {items[0]['path']}{' and the others' * (len(items) > 1)}")


def describe_step(step: Step, tally: Tally) -> dict:
    """A step for the manifest."""
    counts = {field: dict(sorted(counter.items())) for field, counter in tally.of(step.name).items()}
    return {"name": step.name, "rule": step.rule, "origin": step.origin, "on": step.on} | counts


def check_account(manifest: dict, is_whole: bool) -> None:
    """Add "waiting" to the manifest where chats wait for a tokenizer: how many of each source. Raises UserError where
    the records that were read are not those that were dropped, written or wait, or those in the files: a file of the
    work folder is missing."""
    left = Counter()
    for item in manifest["inputs"]:
        if item["role"] == "train":
            left.update(item["by_source"])
    for step in manifest["steps"]:
        left.subtract(step["by_source"])
    for output in manifest["outputs"]:
        if output["name"] != "sft_mini_512":
            left.subtract(output["by_source"])
    wrong = {source: n for source, n in left.items() if n < 0 or n and is_whole}
    in_files = {output["name"]: (output["records"], sum(file["records"] for file in output["files"]))
                for output in manifest["outputs"]}
    dropped = {file["file"]: file["records"] for file in manifest["dropped"]}
    in_files |= {step["name"]: (sum(step["dropped"].values()), dropped.get(f"dropped/{step['name']}.jsonl.zst", 0))
                 for step in manifest["steps"]}
    wrong |= {name: counts for name, counts in in_files.items() if counts[0] != counts[1]}
    if wrong:
        raise UserError(f"the counts of records do not add up ({wrong}): files of the work folder .prepare are "
                        "missing; remove it, and run the recipe anew")
    if not is_whole:
        manifest["waiting"] = {source: n for source, n in sorted(left.items()) if n}


def say_steps(manifest: dict) -> None:
    """Print what each step did, and what came out."""
    print(f"{'step':16}{'records':>12}{'changed':>12}{'dropped':>12}{'share':>9}")
    for step in manifest["steps"]:
        met, changed, dropped = (sum(step[field].values()) for field in ("in", "changed", "dropped"))
        if met:
            print(f"{step['name']:16}{met:12,}{changed:12,}{dropped:12,}{dropped / met:9.2%}")
            for what, n in sorted((step["reasons"] | step["counts"]).items(), key=lambda item: -item[1])[:6]:
                if n:
                    print(f"    {n:,} {what}")
    for output in manifest["outputs"]:
        tokens = f", {output['tokens']:,} tokens" if output["tokens"] else ""
        print(f"{output['name']}: {output['records']:,} records, {output['characters']:,} characters{tokens}")
