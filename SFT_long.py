"""Stage 3: supervised fine-tuning on dialogues of 513 to 1,024 tokens. It is SFT.py with other defaults.

one GPU      python SFT_long.py
two cores    python SFT_long.py --batch_size 4
resume       the same command with --resume

Reads 0.9 of its tokens from dialogues and 0.1 from pretraining text. Starts from out/SFT.pth and writes
out/SFT_long.pth, which distill.py starts from.
"""

import sys

import SFT
from common import exits


def main(argv: list[str] | None = None) -> None:
    SFT.main(argv, stage="SFT_long", description=__doc__, previous="SFT",
             data_path="sft_1024=0.9 pretrain=0.1", max_seq_len=1024, min_tokens=513, max_tokens=1024, batch_size=16,
             learning_rate=1e-3)


if __name__ == "__main__":
    sys.exit(exits.run(main))
