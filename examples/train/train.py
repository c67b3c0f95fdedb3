"""Trains the demonstration model: first its VQ-VAE, then its VAR on the VQ-VAE's tokens.

    python examples/train/train.py vae run --steps 2400 --pictures 2048
    python examples/train/train.py tokens run --pictures 24576
    python examples/train/train.py var run --steps 9000
    python examples/train/train.py measure run
    python examples/train/train.py export run demo.safetensors

The pictures are rendered by `fastvar_fx.models.scenes`; a seed makes a picture.

To train exported weights further, put them into a new folder first:

    python examples/train/train.py start demo.safetensors run

`run` is a folder. A stopped run resumes from the checkpoint in it, written about once a minute.
On a GPU convolutions and matrix products run in bfloat16; on a CPU only with `--bf16`, which is
several times faster where the processor has instructions for it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import train_vae
import train_var


def main() -> None:
    """Runs one part of the training from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    names = ("vae", "tokens", "var", "measure", "export", "start")
    vae, tokens, var, measure, export, start = (verbs.add_parser(name) for name in names)
    start.add_argument("weights", type=Path, help="safetensors file that export wrote")
    for verb in (vae, tokens, var, measure, export, start):
        verb.add_argument("run", type=Path, help="folder of the checkpoints")
    for verb in (vae, tokens):
        verb.add_argument("--pictures", type=int, required=True, help="number of pictures")
    for verb in (vae, var):
        verb.add_argument("--steps", type=int, required=True, help="steps in all")
        verb.add_argument("--bf16", action="store_true", help="bfloat16 on a CPU, too")
    var.add_argument("--compile", action="store_true", help="compile the blocks")
    export.add_argument("out", type=Path, help="safetensors file to write")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.verb == "vae":
        bf16 = args.bf16 or device == "cuda"
        train_vae.train(args.run, args.steps, args.pictures, device, bf16=bf16)
    elif args.verb == "tokens":
        train_var.tokenize(args.run, args.pictures)
    elif args.verb == "var":
        bf16 = args.bf16 or device == "cuda"
        train_var.train(args.run, args.steps, device, bf16=bf16, compiled=args.compile)
    elif args.verb == "measure":
        train_var.measure(args.run)
    elif args.verb == "start":
        train_var.start(args.weights, args.run)
    else:
        train_var.export(args.run, args.out)


if __name__ == "__main__":
    main()
