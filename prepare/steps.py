"""All steps of the recipe, in their order."""

from prepare import chat_steps, text_steps
from prepare.step import Step

ORDER = ("encoding", "unicode", "controls", "html", "markdown", "simplify", "personal", "template_lines", "roles",
         "thoughts", "assistants", "refusals", "blocklist", "length", "chat_length", "language", "symbols",
         "repetition")
# those that look at one record alone
STEPS = tuple(sorted((*text_steps.TEXT_STEPS, *chat_steps.CHAT_STEPS), key=lambda step: ORDER.index(step.name)))
STEP_OF = {step.name: step for step in STEPS}
# those that look at several records, or at tokens: duplicates.py and outputs.py
LAST_STEPS = (
    Step("exact", "of records whose normalized text is the same (NFKC, lower case, no white space and punctuation) "
         "keep the longest, then the first", "ours; like CCNet's, on whole records", "whole", None),
    Step("leak", "drop a record that shares at least --contained of the five-character shingles of the shorter one "
         "with a record of --val_path, or asks a question of it", "ours; containment as in Broder 1997", "whole", None),
    Step("near", "drop a record whose shingles overlap by at least --near (Jaccard) with those of a longer one that "
         "stays; candidates by MinHash, every overlap computed; chats with other numbers are never duplicates",
         "MinHash as in Broder 1997; 20 bands of 5, in two arrangements", "whole", None),
    Step("quality", "keep the share --keep of the documents: those with the best mean of their places by --score_with "
         "(bits per byte of the first 128 tokens) and by --good (likeness to good texts)",
         "perplexity as in CCNet 2020, a linear model as in GPT-3", "text", None, lambda options: options.keep < 1),
    Step("too_long", "set chats of more than 1,024 tokens aside", "the longest row of the stages", "chat", None),
)
