"""Draws a picture with HART-0.7B, dense and pruned, from an unchanged checkout of its code.

    python examples/hart.py --checkout hart --checkpoint hart-0.7b-1024px/llm \
        --text-encoder Qwen2-VL-1.5B-Instruct --prompt "a red fox in the snow"

Needs a CUDA device, the packages that the checkout requires and its compiled kernels. Settings are
those of the checkout's sample.py, except for its check of unsafe prompts, which is omitted.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from checkouts import check_device, check_path, compare, load, read_weights, stop
from torch import Tensor

import fastvar_fx


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkout", type=Path, required=True, help="clone of HART's code")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the `llm` folder")
    parser.add_argument("--vae", type=Path, help="default: `tokenizer` beside the checkpoint")
    parser.add_argument("--text-encoder", type=Path, required=True, help="folder of Qwen2")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--guidance", type=float, default=4.5)
    parser.add_argument("--picture", type=Path, default=Path("hart.png"))
    args = parser.parse_args()
    source = "hart/modules/models/transformer/hart_transformer_t2i.py"
    check_path("--checkout", args.checkout, "a clone of HART's code", holds=source)
    llm = "the folder of HART's transformer, named llm in the download"
    check_path("--checkpoint", args.checkpoint, llm, holds="ema_model.bin")
    args.vae = args.vae or args.checkpoint.resolve().parent / "tokenizer"
    check_path("--vae", args.vae, "the folder of HART's tokenizer", holds="config.json")
    encoder = "a folder with a Qwen2 model and its tokenizer"
    check_path("--text-encoder", args.text_encoder, encoder, holds="config.json")
    args.checkout = args.checkout.resolve()
    return args


def open_norm_kernel(checkout: Path) -> None:
    """Registers HART's fused norm, a compiled function that cannot be traced, as an op.

    The kernel writes into an output tensor; the op returns a new tensor instead.
    """
    kernels = load(checkout, "hart_backend.fused_kernels")
    kernel = kernels.rms_norm

    def rms_norm(x: Tensor, weight: Tensor, eps: float, quantize: bool) -> Tensor:
        out = torch.empty_like(x)
        kernel(out, x, weight, eps, quantize)
        return out

    op = fastvar_fx.register_opaque(
        rms_norm,
        fake=lambda x, weight, eps, quantize: torch.empty_like(x),
        axes="tokenwise",
        schema="(Tensor x, Tensor weight, float eps, bool quantize) -> Tensor",
    )
    kernels.rms_norm = lambda out, *inputs: out.copy_(op(*inputs))


def load_transformer(args: argparse.Namespace) -> Any:
    weights = args.checkpoint / "ema_model.bin"
    weights = read_weights(
        "--checkpoint", weights, "the transformer's averaged weights", "head.weight"
    )
    source = load(args.checkout, "hart.modules.models.transformer")
    config = source.HARTForT2IConfig.from_pretrained(args.checkpoint)
    config.vae_path = str(args.vae)
    model = source.HARTForT2I(config)
    model.load_state_dict(weights)
    return model


def encode(args: argparse.Namespace, device: torch.device, model: Any) -> dict[str, Tensor]:
    transformers = load(args.checkout, "transformers")
    utils = load(args.checkout, "hart.utils")
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.text_encoder)
    encoder = transformers.AutoModel.from_pretrained(args.text_encoder).to(device).eval()
    length = len(tokenizer(args.prompt).input_ids)
    if length > model.context_token:
        found = f"a model for up to {model.context_token}"
        stop(f"a prompt of {length} tokens", found, "shorten the prompt")
    if encoder.config.hidden_size != model.context_dim:
        asked = f"--text-encoder {args.text_encoder} with {model.context_dim} features a token"
        stop(asked, f"{encoder.config.hidden_size}", "give the encoder that HART was trained with")
    template = utils.llm_system_prompt
    inputs = ([args.prompt], encoder, tokenizer, model.context_token, template, True)
    _, mask, positions, features = utils.encode_prompts(*inputs)
    return {"label_B": features, "context_mask": mask, "context_position_ids": positions}


def main() -> None:
    args = arguments()
    device = check_device()
    open_norm_kernel(args.checkout)
    model = load_transformer(args).to(device).eval()
    text = encode(args, device, model)
    fast = fastvar_fx.transform(model, fastvar_fx.Schedule.preset("hart-1024"))

    def draw(each: Any) -> Tensor:
        torch.manual_seed(args.seed)  # its diffusion head draws noise from the global generator
        with torch.autocast(device.type, torch.float16):
            images = each.autoregressive_infer_cfg(
                B=1, cfg=args.guidance, g_seed=args.seed, more_smooth=True, **text
            )
        picture: Tensor = (images[0].float().clamp(0, 1) * 255).byte()
        return picture.movedim(0, -1)

    compare(draw, model, fast, args.picture)


if __name__ == "__main__":
    with torch.no_grad():
        main()
