"""Train with open_clip's own trainer on the shards of a run, by the command that `curate score` prints.

    python examples/open_clip_training.py OUT
    python examples/open_clip_training.py OUT --model ViT-B-32 -- --device cuda --precision amp_bf16 --epochs 32

Whatever follows `--` goes to the trainer. Prints the command and the path of the checkpoint it wrote.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

import open_clip
from open_clip_train import main as trainer

from curate.formats import openclip

ON_A_LAPTOP = "--device cpu --precision fp32 --epochs 1 --warmup 1 --lr 5e-4 --beta2 0.95 --workers 0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="output directory of `curate score`")
    parser.add_argument("--model", default="tiny", help="an open_clip architecture, or the tiny one beside this file")
    parser.add_argument("--logs", type=Path, default=Path("logs"))
    parser.add_argument("more", nargs="*", help="further arguments of the trainer, after --")
    args = parser.parse_args()

    sizes = json.loads((args.out / "sizes.json").read_text())
    command = openclip.train_command(args.out.resolve(), sorted(sizes), sum(sizes.values()), args.model)
    print(command)
    open_clip.add_model_config(Path(__file__).with_name("tiny.json"))
    words = shlex.split(command)
    options = words[words.index("open_clip_train.main") + 1 :]
    run = ["--logs", str(args.logs), "--name", args.out.resolve().name]
    with openclip.end_of_shard_fix():  # open_clip's loader stumbles over webdataset >= 0.2.96 (its issue 935)
        failed = trainer.main([*options, *run, *(args.more or shlex.split(ON_A_LAPTOP))])
    if failed:
        raise SystemExit(f"{args.logs} already holds a run of this name; give another --logs")
    checkpoints = (args.logs / args.out.resolve().name / "checkpoints").glob("*.pt")
    print(f"checkpoint: {max(checkpoints, key=lambda path: path.stat().st_mtime)}")


if __name__ == "__main__":
    main()
