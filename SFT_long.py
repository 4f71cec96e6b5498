"""Stage 3: supervised fine-tuning on dialogues of 513 to 1,024 tokens. It is SFT.py with other defaults.

one GPU      python SFT_long.py --data_path data/sft_1024.jsonl
two cores    python SFT_long.py --data_path data/sft_1024.jsonl --batch_size 4
go on        the same command with --resume

Starts from out/SFT.pth and writes out/SFT_long.pth, which distill.py starts from.
"""

import sys

import SFT
from common import runtime


def main(argv: list[str] | None = None) -> None:
    SFT.main(argv, stage="SFT_long", description=__doc__, previous="SFT",
             original=dict(batch_size=21, accumulation_steps=8),
             max_seq_len=1024, min_tokens=513, max_tokens=1024, batch_size=16, learning_rate=1e-3)


if __name__ == "__main__":
    sys.exit(runtime.run(main))
