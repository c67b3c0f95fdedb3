"""VAR: a transformer that draws an image scale by scale.

A step predicts a whole (h, w) token map at once. Its input is the image so far, area-averaged to
the size of the next map; its tokens attend to each other and, through the key/value cache, to every
token of the smaller maps:

    class embedding --> step 0 --> 1 token    --> f_hat
    f_hat at 2 x 2  --> step 1 --> 4 tokens   --> f_hat
    ...
    f_hat at 16x16  --> step 9 --> 256 tokens --> f_hat --> VQ-VAE decoder --> image

The class enters every block as scale, shift and gamma of its adaptive layer norms (AdaLN).

Letters in shapes: B batch, L tokens, C width, H heads, c = C / H, V codebook entries, Cvae code
vector width, K steps.

Source: VAR, arXiv 2404.02905, section 3.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvar_fx.errors import ArgumentError, ModelError
from fastvar_fx.models.cache import KVCache, kv_caching
from fastvar_fx.models.configs import check_heads, check_sizes, configured, with_random_weights
from fastvar_fx.models.layers import FFN, MAX_LOG_SCALE, AdaLNBeforeHead, SharedAdaLin
from fastvar_fx.models.sampling import CFG, sample_top_k_top_p
from fastvar_fx.models.vqvae import PUBLISHED, VQVAE, Pyramid, VQVAEDecoder
from fastvar_fx.schedule import VAR_256, VAR_512

OnStep = Callable[[int, Tensor], None]
"""Called after each step with its index and `f_hat` so far, (B, Cvae, H, W)."""

Choose = Callable[[int, Tensor], Tensor]
"""Picks a token map: (step, guided logits (B, l, V)) -> ids, int64 (B, l)."""


# --------------------------------------------------------------------------------------------------
# Transformer
# --------------------------------------------------------------------------------------------------


class SelfAttention(KVCache):
    """Multi-head self-attention with an optional cache of keys and values.

    While caching is on, each call appends its keys and values to those of the calls before, so
    the tokens of a step see all earlier scales without a mask.

    Args:
        width: Width C in and out.
        heads: Number of heads H, a divisor of `width`.
        l2_norm: Whether queries and keys are unit vectors with a learned scale per head.
    """

    zero_k_bias: Tensor

    def __init__(self, width: int, heads: int, *, l2_norm: bool) -> None:
        super().__init__()
        self.heads, self.head_dim, self.l2_norm = heads, width // heads, l2_norm
        if l2_norm:
            self.scale = 1.0
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), 4.0).log())
        else:
            self.scale = 0.25 / math.sqrt(self.head_dim)
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        # A key bias shifts all scores of a query alike and softmax drops it: hence fixed at zero.
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, attn_bias: Tensor | None = None) -> Tensor:
        """Returns (B, L, C) for `x` (B, L, C).

        Args:
            x: Tokens, (B, L, C).
            attn_bias: Added to the scores, 0 or -inf, (1, 1, L, L); None lets all see all.
        """
        B, L, C = x.shape
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv = F.linear(x, self.mat_qkv.weight, bias)  # (B, L, 3C)
        qkv = qkv.view(B, L, 3, self.heads, self.head_dim)  # (B, L, 3, H, c)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 of (B, H, L, c)
        if self.l2_norm:
            scale = self.scale_mul_1H11.clamp_max(MAX_LOG_SCALE).exp()
            q = F.normalize(q, dim=-1).mul(scale)
            k = F.normalize(k, dim=-1)
        k, v = self.with_cached(k, v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias, scale=self.scale)
        out = out.transpose(1, 2).reshape(B, L, C)  # (B, H, L, c) -> (B, L, C)
        projected: Tensor = self.proj(out)
        return projected


class Block(nn.Module):
    """A transformer block: attention and feed-forward branch, each with AdaLN and a residual add.

    Args:
        width: Width C.
        heads: Number of heads H.
        hidden: Inner width of the feed-forward branch.
        shared_aln: Whether the block takes ready AdaLN values and adds its own offset to them,
            instead of making them from the class embedding.
        attn_l2_norm: See `SelfAttention`.
        norm_eps: Epsilon of the layer norms.

    Source: VAR, arXiv 2404.02905, section 3 (AdaLN after DiT, arXiv 2212.09748).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        shared_aln: bool,
        attn_l2_norm: bool,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.width, self.shared_aln = width, shared_aln
        self.attn = SelfAttention(width, heads, l2_norm=attn_l2_norm)
        self.ffn = FFN(width, hidden)
        self.ln_wo_grad = nn.LayerNorm(width, eps=norm_eps, elementwise_affine=False)
        if shared_aln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, cond: Tensor, attn_bias: Tensor | None = None) -> Tensor:
        """Returns the residual stream after both branches, (B, L, C).

        Args:
            x: Residual stream, (B, L, C).
            cond: Class embedding, (B, C); with `shared_aln` the output of
                `SharedAdaLin`, (B, 1, 6, C).
            attn_bias: See `SelfAttention`.
        """
        if self.shared_aln:
            ada = self.ada_gss + cond  # (B, 1, 6, C)
        else:
            ada = self.ada_lin(cond).view(-1, 1, 6, self.width)  # (B, 6C) -> (B, 1, 6, C)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = ada.unbind(2)  # 6 of (B, 1, C)
        h = self.ln_wo_grad(x).mul(scale1.add(1)).add_(shift1)
        x = x + self.attn(h, attn_bias).mul_(gamma1)
        h = self.ln_wo_grad(x).mul(scale2.add(1)).add_(shift2)
        y: Tensor = x + self.ffn(h).mul(gamma2)
        return y


# --------------------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class VARConfig:
    """Sizes of a VAR and of its VQ-VAE.

    Attributes:
        depth: Number of blocks.
        width: Width C; None for 64 * `depth`.
        heads: Number of heads H; None for `depth`.
        shared_aln: Whether all blocks share one AdaLN layer (d36 at 512 x 512 does).
        attn_l2_norm: Whether attention works on unit queries and keys.
        mlp_ratio: Inner width of the feed-forward branch, in units of `width`.
        norm_eps: Epsilon of the layer norms.
        num_classes: Number of classes; the index after the last stands for "no class".
        scales: Sides of the K >= 2 square token maps, none smaller than the one before.
        vocab_size: See `VQVAEDecoder`.
        z_channels: See `VQVAEDecoder`.
        ch: See `VQVAEDecoder`.
        pyramid: See `VQVAEDecoder`.

    Raises:
        TypeError: If a size is not an int.
        ArgumentError: If a size is below 1, `heads` does not divide `width`, or `scales` are not
            the sides of such maps.
    """

    depth: int
    width: int | None = None
    heads: int | None = None
    shared_aln: bool = False
    attn_l2_norm: bool = True
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    num_classes: int = 1000
    scales: tuple[int, ...] = VAR_256
    vocab_size: int = 4096
    z_channels: int = 32
    ch: int = 160
    pyramid: Pyramid = PUBLISHED

    def __post_init__(self) -> None:
        width, heads = self.width_and_heads
        check_sizes(depth=self.depth, width=width, heads=heads, num_classes=self.num_classes)
        check_sizes(vocab_size=self.vocab_size, z_channels=self.z_channels, ch=self.ch)
        check_heads(width, heads)
        _check_scales(self.scales)

    @property
    def width_and_heads(self) -> tuple[int, int]:
        """C and H, with those that follow from the depth filled in."""
        width = 64 * self.depth if self.width is None else self.width
        return width, self.depth if self.heads is None else self.heads

    def new_vae(self) -> VQVAEDecoder:
        """Returns a VQ-VAE decoder side of these sizes with torch's default weights."""
        return VQVAEDecoder(**self._vae_sizes())

    def new_whole_vae(self) -> VQVAE:
        """Returns a VQ-VAE of these sizes, encoder included, with torch's default weights."""
        return VQVAE(**self._vae_sizes())

    def _vae_sizes(self) -> dict[str, Any]:
        names = ("vocab_size", "z_channels", "ch", "pyramid")
        return {name: getattr(self, name) for name in names}


class VAR(nn.Module):
    """Class-conditional next-scale image generator.

    Parameters and buffers have the names and shapes of the published `var_d*.pth`.

    The VQ-VAE is held, not owned: it is no submodule, so `state_dict()`, `parameters()`,
    `to()`, `half()` and `eval()` leave it alone. To move both:

        var.to(device)
        var.vae.to(device)

    Generation keeps keys and values on the attention modules: one call at a time per model.

    Args:
        vae: Decoder side of the VQ-VAE whose tokens are predicted.
        config: The sizes; those of the VQ-VAE are read from `vae`.

    Example:
        >>> var = build("tiny", scales=(1, 2, 4))
        >>> var.autoregressive_infer_cfg(2, 7, g_seed=0).shape
        torch.Size([2, 3, 64, 64])

    Source: VAR, arXiv 2404.02905, section 3.
    """

    lvl_1L: Tensor  # noqa: N815  (the published checkpoints' name)
    attn_bias_for_masking: Tensor

    def __init__(self, vae: VQVAEDecoder, config: VARConfig) -> None:
        super().__init__()
        width, heads = config.width_and_heads
        self._vae = (vae,)  # a tuple hides the module from nn.Module's registration
        self.num_classes, self.depth, self.width, self.heads = (
            config.num_classes,
            config.depth,
            width,
            heads,
        )
        self.shared_aln, self.attn_l2_norm = config.shared_aln, config.attn_l2_norm
        self.scales = tuple(config.scales)
        self.first_l = self.scales[0] ** 2
        self.L = sum(side**2 for side in self.scales)

        # Input: code vectors, class, place in the token map, scale.
        std = math.sqrt(1 / width / 3)
        self.word_embed = nn.Linear(vae.z_channels, width)
        self.class_emb = nn.Embedding(config.num_classes + 1, width)
        self.pos_start = nn.Parameter(nn.init.normal_(torch.empty(1, self.first_l, width), std=std))
        self.pos_1LC = nn.Parameter(nn.init.normal_(torch.empty(1, self.L, width), std=std))
        self.lvl_embed = nn.Embedding(len(self.scales), width)

        # Backbone.
        self.shared_ada_lin: nn.Module = (
            nn.Sequential(nn.SiLU(), SharedAdaLin(width)) if config.shared_aln else nn.Identity()
        )
        self.blocks = nn.ModuleList(
            [
                Block(
                    width,
                    heads,
                    round(width * config.mlp_ratio),
                    shared_aln=config.shared_aln,
                    attn_l2_norm=config.attn_l2_norm,
                    norm_eps=config.norm_eps,
                )
                for _ in range(config.depth)
            ]
        )

        # Only the teacher-forced pass needs the mask; it is part of the published checkpoints.
        level, mask = _levels_and_mask(self.scales)
        self.register_buffer("lvl_1L", level)
        self.register_buffer("attn_bias_for_masking", mask)

        # Output.
        self.head_nm = AdaLNBeforeHead(width, config.norm_eps)
        self.head = nn.Linear(width, vae.vocab_size)

    @property
    def vae(self) -> VQVAEDecoder:
        """The VQ-VAE decoder side; not moved, cast or saved with this module."""
        return self._vae[0]

    def kv_caching(self, enable: bool) -> None:
        """Switches the key/value caches of all blocks on or off, and empties them."""
        for module in self.modules():
            if isinstance(module, KVCache):
                module.kv_caching(enable)

    def get_logits(self, x: Tensor, cond: Tensor) -> Tensor:
        """Returns float32 logits, (B, L, V).

        Args:
            x: Residual stream after the last block, (B, L, C).
            cond: Class embedding, (B, C).
        """
        # The classifier runs at the precision of its weights even under autocast.
        dtype = self.head.weight.dtype
        logits: Tensor = self.head(self.head_nm(x.to(dtype), cond).to(dtype))
        return logits.float()

    def forward(
        self, label: Tensor, x_BLCv_wo_first_l: Tensor, only: Tensor | None = None
    ) -> Tensor:
        """Returns teacher-forced logits of all scales at once, float32 (B, L, V).

        A mask keeps each scale from seeing later ones, so the logits equal those of the K cached
        steps of generation on the same tokens. No class is dropped here: for classifier-free
        training, put `num_classes` in place of some labels.

        Args:
            label: int64 class indices in [0, `num_classes`], (B,); not checked for range.
            x_BLCv_wo_first_l: Inputs of steps 1 to K - 1 side by side, each `f_hat` of the step
                before averaged to the size of the step, (B, L - first_l, Cvae); the quantizer's
                `inputs` makes them.
            only: Which tokens to run, int64 (n,) in [0, L), rising; None for all. The others do
                not exist then: the result is (B, n, V), the same as without `only` if the tokens
                are those of the first scales.

        Raises:
            ArgumentError: If the shapes do not fit each other or the schedule.
        """
        B = label.shape[0] if label.ndim == 1 else -1
        asked = (B, self.L - self.first_l, self.word_embed.in_features)
        if B < 0 or tuple(x_BLCv_wo_first_l.shape) != asked:
            raise ArgumentError(
                f"scales {self.scales} take labels (B,) and inputs (B, {asked[1]}, {asked[2]}); "
                f"found labels {tuple(label.shape)} and inputs {tuple(x_BLCv_wo_first_l.shape)}. "
                f"Leave the first token map out of the inputs"
            )
        cond = self.class_emb(label)  # (B, C)
        start, rest = self._start(cond), x_BLCv_wo_first_l.to(self.word_embed.weight.dtype)
        positions, mask = self._positions(), self.attn_bias_for_masking
        if only is not None:
            first, later = only[only < self.first_l], only[only >= self.first_l] - self.first_l
            start, rest = start[:, first], rest[:, later]
            positions, mask = positions[:, only], mask[:, :, only[:, None], only]
        x = torch.cat((start, self.word_embed(rest)), dim=1) + positions  # (B, n, C)
        ada = self.shared_ada_lin(cond)
        for block in self.blocks:
            x = block(x, ada, mask)
        return self.get_logits(x, cond)

    def autoregressive_infer_cfg(
        self,
        B: int,
        label: int | Tensor | None,
        g_seed: int | None = None,
        cfg: float = CFG,
        top_k: int = 0,
        top_p: float = 0.0,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Returns generated images in [0, 1], (B, 3, r * H, r * H).

        This is `infer_fhat` followed by the VQ-VAE decoder. H is the side of the last map and
        r the decoder's factor, 16 as published.

        Args:
            B: Number of images, at least 1.
            label: Class of all images, or int64 classes (B,), or None to draw them; -1 stands for
                "no class". Classes on a GPU are not checked for range.
            g_seed: Seed of the draws; None uses torch's global generator of the device.
            cfg: Guidance strength at the last step, at least 0; it grows linearly from 0 at the
                first.
            top_k: Draw among the k likeliest tokens, 0 to V; 0 for all.
            top_p: Draw among the likeliest tokens that reach this probability, in [0, 1]; 0 for
                all.
            on_step: Called after each step with its index and `f_hat` so far.

        Raises:
            TypeError: If `B` is no int, or `label` is neither of the above.
            ArgumentError: If an argument is out of range, a label tensor has not length `B`, or the
                VQ-VAE is on another device.
        """
        f_hat = self.infer_fhat(B, label, g_seed, cfg, top_k, top_p, on_step)
        with torch.no_grad():
            return self.vae.decode(f_hat)

    @torch.no_grad()
    def infer_fhat(
        self,
        B: int,
        label: int | Tensor | None,
        g_seed: int | None = None,
        cfg: float = CFG,
        top_k: int = 0,
        top_p: float = 0.0,
        on_step: OnStep | None = None,
        choose: Choose | None = None,
    ) -> Tensor:
        """Returns the feature maps that the VQ-VAE decodes to images, (B, Cvae, H, W).

        Classifier-free guidance runs each image twice, with its class and without: the batch
        inside is 2B. With `cfg` 0 it is B: an image without its class would change nothing.

        Args:
            B: See `autoregressive_infer_cfg`.
            label: See there.
            g_seed: See there.
            cfg: See there.
            top_k: See there.
            top_p: See there.
            on_step: Called after each step with its index and `f_hat` so far, a tensor that
                later steps do not overwrite.
            choose: Picks the tokens of each step, in place of the draws of `top_k`, `top_p` and
                `g_seed`. If it returns the tokens of an image, the logits that it gets say how
                likely they are.

        Raises:
            TypeError: See there.
            ArgumentError: See there.

        Source: VAR, arXiv 2404.02905, algorithm 2; guidance as in the published code.
        """
        self._check_sampling(B, cfg, top_k, top_p)
        device = self.lvl_1L.device
        generator = None if g_seed is None else torch.Generator(device).manual_seed(g_seed)
        classes = self._classes(B, label, generator)  # (B,)
        copies = 2 if cfg > 0 else 1
        strengths = self.guidance_strengths(cfg)
        rows = torch.cat((classes, torch.full_like(classes, self.num_classes)))[: copies * B]
        cond = self.class_emb(rows)  # (copies B, C)
        ada = self.shared_ada_lin(cond)
        positions = self._positions()  # (1, L, C)
        quantize = self.vae.quantize
        side = self.scales[-1]
        f_hat = quantize.embedding.weight.new_zeros(B, self.vae.z_channels, side, side)
        last = len(self.scales) - 1
        x = self._start(cond) + positions[:, : self.first_l]  # (copies B, first_l, C)
        end = self.first_l

        with kv_caching(self):
            for step in range(len(self.scales)):
                for block in self.blocks:
                    x = block(x, ada)
                logits = self.get_logits(x, cond)  # (copies B, l, V)
                if copies > 1:
                    t = strengths[step]
                    logits = (1 + t) * logits[:B] - t * logits[B:]  # (B, l, V)
                if choose is None:
                    tokens = sample_top_k_top_p(logits, top_k, top_p, generator)  # (B, l)
                else:
                    tokens = choose(step, logits)
                f_hat, average = quantize.get_next_autoregressive_input(
                    step, len(self.scales), f_hat, tokens, self.scales
                )
                if step < last:
                    begin, end = end, end + self.scales[step + 1] ** 2
                    x = average.flatten(2).transpose(1, 2)  # (B, l, Cvae)
                    x = self.word_embed(x.to(self.word_embed.weight.dtype))
                    x = (x + positions[:, begin:end]).repeat(copies, 1, 1)  # (copies B, l, C)
                if on_step is not None:
                    on_step(step, f_hat)
        return f_hat

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Fills all parameters and buffers, parameters with random values that keep branches alive.

        Training starts with gammas near zero, which turns every block into the identity. Here
        each branch counts instead, and the residual stream is about as large at any depth. Standard
        deviations, with n the inputs of a unit and D = `depth`:

        - class, place and scale embeddings, and biases of the branches: 0.5; word embedding
          0.5 / sqrt(n);
        - linear layers of the branches: 1 / sqrt(n), the last of each 2 / sqrt(n);
        - AdaLN: 0.2 / sqrt(n) around scale 0, shift 0 and gamma 1 / sqrt(D);
        - classifier: 2 / sqrt(n), so that some tokens are clearly likelier than others.

        Args:
            generator: Source of the values, on the device of the parameters.
        """
        for embedding in (self.class_emb.weight, self.lvl_embed.weight):
            _normal(embedding, 0.5, generator)
        for positions in (self.pos_start, self.pos_1LC):
            _normal(positions, 0.5, generator)
        _linear(self.word_embed, 0.5, generator)
        _linear(self.head, 2.0, generator)
        for module in self.modules():
            _fill_branch(module, generator)
            _fill_norm(module, 1 / math.sqrt(self.depth), generator)
        level, mask = _levels_and_mask(self.scales)
        self.lvl_1L.copy_(level)
        self.attn_bias_for_masking.copy_(mask)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Loads a checkpoint after comparing its architecture and schedule with this model's.

        Args:
            state_dict: A published `var_d*.pth`, or what `state_dict` gave.
            strict: Whether missing and unexpected keys are errors.
            assign: Keep the given tensors instead of copying their values.

        Raises:
            ModelError: If the checkpoint is no VAR's, or of another depth, width or schedule.
            RuntimeError: If other keys or shapes do not fit.
        """
        found = _describe(state_dict)
        if strict and not found:
            raise ModelError(
                f"the state dict of a VAR has pos_1LC (1, L, C); found {len(state_dict)} other "
                f"keys: {', '.join(list(state_dict)[:4])}. Pass the contents of a var_d*.pth"
            )
        asked = _describe(self.state_dict()) | {"scales": self.scales}
        wrong = [name for name in found if found[name] != asked[name]]
        if wrong:
            raise ModelError(
                f"the model has {', '.join(f'{name}={asked[name]}' for name in wrong)}, but the "
                f"checkpoint has {', '.join(f'{name}={found[name]}' for name in wrong)}. Build the "
                f"model as the checkpoint was trained, or load another checkpoint"
            )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _start(self, cond: Tensor) -> Tensor:
        """Returns the input of step 0 without positions, (B, first_l, C), for `cond` (B, C)."""
        shape = (cond.shape[0], self.first_l, -1)
        return cond.unsqueeze(1).expand(shape) + self.pos_start.expand(shape)

    def _positions(self) -> Tensor:
        """Returns scale plus place embedding of all tokens, (1, L, C)."""
        levels: Tensor = self.lvl_embed(self.lvl_1L)
        return levels + self.pos_1LC

    def _classes(self, B: int, label: object, generator: torch.Generator | None) -> Tensor:
        """Returns checked or drawn class indices on the model's device, int64 (B,)."""
        device = self.lvl_1L.device
        if label is None:
            uniform = torch.full((1, self.num_classes), 1.0 / self.num_classes, device=device)
            return torch.multinomial(uniform, B, replacement=True, generator=generator).reshape(B)
        if isinstance(label, int):
            classes, known = torch.full((B,), label, device=device), [label]
        elif isinstance(label, Tensor) and not label.is_floating_point():
            if tuple(label.shape) != (B,):
                raise ArgumentError(
                    f"label of {B} images has shape ({B},), one class per image, or is an int for "
                    f"all; found shape {tuple(label.shape)}"
                )
            classes = label.to(device=device, dtype=torch.int64)
            known = [] if label.is_cuda else label.tolist()  # reading them would wait for the GPU
        else:
            kind = label.dtype if isinstance(label, Tensor) else type(label).__name__
            raise TypeError(f"label is an int, an integer tensor (B,) or None; found {kind}")
        strange = [index for index in known if not -1 <= index < self.num_classes]
        if strange:
            raise ArgumentError(
                f"a label is a class, 0 to {self.num_classes - 1}, or -1 for no class; found "
                f"{strange[0]}"
            )
        return torch.where(classes < 0, self.num_classes, classes)

    def guidance_strengths(self, cfg: float = CFG) -> tuple[float, ...]:
        """Returns the strength of guidance at each of the K steps, from 0 at the first to `cfg`.

        With strength t, tokens are drawn from `(1 + t) * with class - t * without class` logits.
        """
        last = len(self.scales) - 1
        return tuple(cfg * (step / max(last, 1)) for step in range(last + 1))

    def _check_sampling(self, B: int, cfg: float, top_k: int, top_p: float) -> None:
        """Checks batch size, guidance and truncation, and that the VQ-VAE is on the device."""
        check_sizes(B=B)
        if not (math.isfinite(cfg) and cfg >= 0):
            raise ArgumentError(f"cfg is finite and at least 0, usually 1.5; found {cfg}")
        V = self.head.out_features
        if not 0 <= top_k <= V:
            raise ArgumentError(
                f"top_k is 1 to {V}, the size of the codebook, or 0 for all; found {top_k}"
            )
        if not 0 <= top_p <= 1:
            raise ArgumentError(f"top_p is in [0, 1], and 0 means all tokens; found {top_p}")
        here, there = self.lvl_1L.device, self.vae.quantize.embedding.weight.device
        if here != there:
            raise ArgumentError(
                f"the model is on {here}, but its VQ-VAE, which does not move with it, on {there}; "
                f"call var.vae.to({str(here)!r})"
            )


def _normal(tensor: Tensor, std: float, generator: torch.Generator) -> None:
    tensor.normal_(0, std, generator=generator)


def _linear(layer: nn.Linear, gain: float, generator: torch.Generator) -> None:
    _normal(layer.weight, gain / math.sqrt(layer.in_features), generator)
    if layer.bias is not None:
        layer.bias.zero_()


def _fill_branch(module: nn.Module, generator: torch.Generator) -> None:
    """Fills the layers of a module, if it is an attention or feed-forward branch."""
    if isinstance(module, SelfAttention):
        _linear(module.mat_qkv, 1.0, generator)
        _linear(module.proj, 2.0, generator)
        _normal(module.q_bias, 0.5, generator)
        _normal(module.v_bias, 0.5, generator)
        module.zero_k_bias.zero_()
        if module.l2_norm:
            module.scale_mul_1H11.fill_(math.log(4.0))
    elif isinstance(module, FFN):
        _linear(module.fc1, 1.0, generator)
        _linear(module.fc2, 2.0, generator)
        _normal(module.fc1.bias, 0.5, generator)


def _fill_norm(module: nn.Module, gamma: float, generator: torch.Generator) -> None:
    """Fills the AdaLN layer of a module, if it has one."""
    if isinstance(module, SharedAdaLin):
        _linear(module, 0.2, generator)
    elif isinstance(module, AdaLNBeforeHead):
        _linear(cast("nn.Linear", module.ada_lin[1]), 0.2, generator)
    elif isinstance(module, Block) and module.shared_aln:
        _normal(module.ada_gss, 0.2 / math.sqrt(module.width), generator)
        module.ada_gss[:, :, :2] += gamma
    elif isinstance(module, Block):
        layer = cast("nn.Linear", module.ada_lin[1])
        _linear(layer, 0.2, generator)
        layer.bias[: 2 * module.width] = gamma


def _levels_and_mask(scales: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Returns the step of each token, int64 (1, L), and the additive mask, float32 (1, 1, L, L)."""
    level = torch.cat([torch.full((side**2,), step) for step, side in enumerate(scales)])  # (L,)
    sees = level.unsqueeze(1) >= level.unsqueeze(0)  # (L queries, L keys)
    mask = torch.where(sees, 0.0, -math.inf)
    return level.unsqueeze(0), mask.unsqueeze(0).unsqueeze(0)


def _check_scales(scales: Sequence[object]) -> None:
    """Checks that these are the sides of two or more token maps that never shrink."""
    sides = [side for side in scales if isinstance(side, int)]
    grows = all(before <= side for before, side in itertools.pairwise([1, *sides]))
    if len(sides) < 2 or len(sides) < len(scales) or not grows:
        raise ArgumentError(
            f"scales are the sides of two or more token maps, such as {VAR_256}, each an int and "
            f"none smaller than the one before; found {tuple(scales)}"
        )


def _describe(state: Mapping[str, Any]) -> dict[str, object]:
    """Returns what a VAR state dict says about its architecture; empty for any other mapping."""
    positions, levels = state.get("pos_1LC"), state.get("lvl_1L")
    if not (isinstance(positions, Tensor) and positions.ndim == 3):
        return {}
    described: dict[str, object] = {
        "depth": len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
        "width": positions.shape[2],
        "shared_aln": any(key.startswith("shared_ada_lin.") for key in state),
        "attn_l2_norm": any(key.endswith(".attn.scale_mul_1H11") for key in state),
        "tokens": positions.shape[1],
    }
    if isinstance(levels, Tensor) and not levels.is_meta:
        described["scales"] = tuple(
            math.isqrt(int(count)) for count in levels.flatten().long().bincount()
        )
    return described


CONFIGS: Mapping[str, VARConfig] = MappingProxyType(
    {
        "d16": VARConfig(depth=16),
        "d20": VARConfig(depth=20),
        "d24": VARConfig(depth=24),
        "d30": VARConfig(depth=30),
        "d36-512": VARConfig(depth=36, shared_aln=True, scales=VAR_512),
        "tiny": VARConfig(depth=4, width=128, heads=4, vocab_size=512, ch=32),
        "demo": VARConfig(
            depth=8,
            width=256,
            heads=4,
            shared_aln=True,
            num_classes=25,
            scales=VAR_512,
            vocab_size=512,
            z_channels=16,
            ch=64,
            pyramid=Pyramid(multipliers=(1, 2), res_blocks=1, groups=8, attention=False, patch=4),
        ),
    }
)
"""The published models by name, `tiny` for tests, and `demo`, whose weights are packaged."""


def build(
    name: str, *, scales: tuple[int, ...] | None = None, seed: int = 0, **overrides: Any
) -> VAR:
    """Returns a named model with random weights, in eval mode, without gradients, on the CPU.

    Its VQ-VAE is at `.vae`. The weights depend on `seed` alone; torch's global generator is
    neither used nor changed. They draw colourful noise, not objects.

    Args:
        name: A key of `CONFIGS`.
        scales: Sides of the token maps in place of the named model's.
        seed: Seed of the weights.
        **overrides: Fields of `VARConfig` in place of the named model's.

    Raises:
        TypeError: If an override is no field of `VARConfig`, or a size is not an int.
        ArgumentError: If `name` is unknown, or the sizes do not fit each other.

    Example:
        >>> build("tiny", depth=2).depth
        2
    """
    if scales is not None:
        overrides["scales"] = scales
    config = configured(CONFIGS, name, overrides)
    return with_random_weights(lambda: VAR(config.new_vae(), config), _fill_both, seed)


def _fill_both(var: VAR, generator: torch.Generator) -> None:
    """Fills a model and its VQ-VAE, which is still on the meta device."""
    var.vae.to_empty(device="cpu").init_weights(generator)
    var.vae.eval().requires_grad_(False)
    var.init_weights(generator)
