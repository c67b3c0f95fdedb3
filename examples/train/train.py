"""Trains the demonstration model: first its VQ-VAE, then its VAR on the VQ-VAE's tokens.

    python examples/train/data.py packages close.safetensors --held-out held_out
    python examples/train/data.py packages wide.safetensors --zooms 1 1.5
    python examples/train/train.py vae close.safetensors run --steps 1150
    python examples/train/train.py tokens wide.safetensors run
    python examples/train/train.py var run --steps 2400
    python examples/train/train.py measure run
    python examples/train/train.py export run demo.safetensors

The VQ-VAE learns from crops at three zooms, the VAR from the two wider ones, which show motifs.

`run` is a folder. A stopped run resumes from the checkpoint in it, written about once a minute.
On a GPU convolutions and matrix products run in bfloat16; on a CPU only with `--bf16`, which is
faster where the processor has instructions for it.
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
    names = ("vae", "tokens", "var", "measure", "export")
    vae, tokens, var, measure, export = (verbs.add_parser(name) for name in names)
    for verb in (vae, tokens):
        verb.add_argument("set", type=Path, help="what data.py wrote")
    for verb in (vae, tokens, var, measure, export):
        verb.add_argument("run", type=Path, help="folder of the checkpoints")
    for verb in (vae, var):
        verb.add_argument("--steps", type=int, required=True, help="steps in all")
        verb.add_argument("--bf16", action="store_true", help="bfloat16 on a CPU, too")
    export.add_argument("out", type=Path, help="safetensors file to write")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.verb == "vae":
        train_vae.train(args.set, args.run, args.steps, device, bf16=args.bf16 or device == "cuda")
    elif args.verb == "tokens":
        train_var.tokenize(args.set, args.run)
    elif args.verb == "var":
        train_var.train(args.run, args.steps, device, bf16=args.bf16 or device == "cuda")
    elif args.verb == "measure":
        train_var.measure(args.run)
    else:
        train_var.export(args.run, args.out)


if __name__ == "__main__":
    main()
