"""Draws a picture with Infinity-2B, dense and pruned, from an unchanged checkout of its code.

    python examples/infinity.py --checkout Infinity --checkpoint infinity_2b_reg.pth \
        --vae infinity_vae_d32reg.pth --text-encoder flan-t5-xl --prompt "a red fox in the snow"

Needs a CUDA device and the packages that the checkout requires. The model's sizes are read from
its checkpoint; all other settings are those of the checkout's scripts/infer.sh.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from checkouts import check_device, check_path, compare, load, read_weights, stop
from torch import Tensor

import fastvar_fx

TextFeatures = tuple[Tensor, list[int], Tensor, int]
"""Features (length, C) of the prompts one after the other, their lengths, starts, the longest."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkout", type=Path, required=True, help="clone of Infinity's code")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the transformer's .pth")
    parser.add_argument("--vae", type=Path, required=True, help="the visual tokenizer's .pth")
    parser.add_argument("--text-encoder", type=Path, required=True, help="folder of flan-t5-xl")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--picture", type=Path, default=Path("infinity.png"))
    args = parser.parse_args()
    source = "infinity/models/infinity.py"
    check_path("--checkout", args.checkout, "a clone of Infinity's code", holds=source)
    check_path("--checkpoint", args.checkpoint, "the transformer's weights, a .pth file")
    check_path("--vae", args.vae, "the visual tokenizer's weights, a .pth file")
    encoder = "a folder with a T5 encoder and its tokenizer"
    check_path("--text-encoder", args.text_encoder, encoder, holds="config.json")
    args.checkout = args.checkout.resolve()
    return args


def load_vae(args: argparse.Namespace, bits: int) -> Any:
    weights = read_weights("--vae", args.vae, "the visual tokenizer", "vae")
    source = load(args.checkout, "infinity.models.bsq_vae.vae")
    try:
        return source.vae_model(weights, "dynamic", bits, 2**bits)
    except RuntimeError as error:
        to_do = "give the tokenizer that the transformer was trained on"
        stop(f"--vae {args.vae} with {bits} bits a token, as the transformer", f"{error}", to_do)


def load_transformer(args: argparse.Namespace, weights: dict[str, Tensor], vae: Any) -> Any:
    per_block = [name for name in weights if name.endswith(".sa.scale_mul_1H11")]
    chunks = {name.split(".module.")[0] for name in per_block}
    model = load(args.checkout, "infinity.models.infinity").Infinity(
        vae_local=vae,
        depth=len(per_block),
        block_chunks=len(chunks),
        embed_dim=weights["pos_start"].shape[-1],
        num_heads=weights[per_block[0]].numel(),
        text_channels=weights["cfg_uncond"].shape[1],
        text_maxlen=weights["cfg_uncond"].shape[0],
        shared_aln=True,
        fused_norm=True,
        pad_to_multiplier=128,
        rope2d_each_sa_layer=1,
        rope2d_normalized_by_hw=2,
        inference_mode=True,
        pn="1M",
    )
    missing = model.load_state_dict(weights).missing_keys
    if missing:
        to_do = "give the checkpoint of an Infinity model, as downloaded"
        stop(f"--checkpoint {args.checkpoint}", f"no weights for {missing[:5]}", to_do)
    for block in model.unregistered_blocks:
        block.bfloat16()
    return model


def encode(args: argparse.Namespace, device: torch.device, longest: int) -> TextFeatures:
    transformers = load(args.checkout, "transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.text_encoder)
    encoder = transformers.T5EncoderModel.from_pretrained(args.text_encoder)
    encoder = encoder.to(device, torch.float16).eval()
    tokens = tokenizer([args.prompt], return_tensors="pt").to(device)
    length = tokens.input_ids.shape[1]
    if length > longest:
        stop(f"a prompt of {length} tokens", f"a model for up to {longest}", "shorten the prompt")
    features = encoder(tokens.input_ids).last_hidden_state[0].float()
    return features, [length], torch.tensor([0, length], dtype=torch.int32, device=device), length


def main() -> None:
    args = arguments()
    device = check_device()
    weights = read_weights("--checkpoint", args.checkpoint, "the transformer", "pos_start")
    bits = weights["word_embed.weight"].shape[1]
    vae = load_vae(args, bits).to(device)
    model = load_transformer(args, weights, vae).to(device).eval()
    model.rng = torch.Generator(device)  # made for the CPU, which a CUDA device cannot sample with
    text = encode(args, device, model.text_maxlen)
    schedule = fastvar_fx.Schedule.preset("infinity-1024")
    fast = fastvar_fx.transform(model, schedule)

    def draw(each: Any) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            _, _, images = each.autoregressive_infer_cfg(
                vae=vae,
                vae_type=bits,
                scale_schedule=[(1, h, w) for h, w in schedule.scales],
                label_B_or_BLT=text,
                g_seed=args.seed,
                cfg_list=[args.guidance] * schedule.steps,
                tau_list=[0.5] * schedule.steps,
                top_k=900,
                top_p=0.97,
                cfg_insertion_layer=[0],
                returns_vemb=1,
                ret_img=True,
                inference_mode=True,
            )
        bgr: Tensor = images[0]
        return bgr.flip(-1)

    torch._dynamo.config.recompile_limit = 64  # its compiled norms run on every step's shape
    compare(draw, model, fast, args.picture)


if __name__ == "__main__":
    with torch.no_grad():
        main()
