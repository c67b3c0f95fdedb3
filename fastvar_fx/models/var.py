"""VAR: a transformer that draws an image scale by scale.

A step predicts a whole (h, w) token map at once. Its input is the image so far, area-averaged to
the size of the next map; its tokens attend to each other and, through the key/value cache, to every
token of the smaller maps::

    class embedding --> step 0 --> 1 token    --> f_hat
    f_hat at 2 x 2  --> step 1 --> 4 tokens   --> f_hat
    ...
    f_hat at 16x16  --> step 9 --> 256 tokens --> f_hat --> VQ-VAE decoder --> image

The class enters every block as scale, shift and gamma of its adaptive layer norms (AdaLN).

Letters in shapes: B batch, L tokens, C width, H heads, c = C / H, V codebook entries, Cvae code
vector width, K steps.

Source: VAR, arXiv 2404.02905, section 3.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvar_fx.models import packaged
from fastvar_fx.models.cache import KVCache, kv_caching
from fastvar_fx.models.named import check_heads, check_sizes, configured
from fastvar_fx.models.vqvae import PUBLISHED, VQVAE, Pyramid, VQVAEDecoder

VAR_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
"""Sides of the ten token maps of a 256 x 256 image."""

VAR_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
"""Sides of the ten token maps of a 512 x 512 image."""

OnStep = Callable[[int, Tensor], None]
"""Called after each step with its index and ``f_hat`` so far, (B, Cvae, H, W)."""

_MAX_LOG_SCALE = math.log(100)


# --------------------------------------------------------------------------------------------------
# Transformer
# --------------------------------------------------------------------------------------------------


class SelfAttention(KVCache):
    """Multi-head self-attention with an optional cache of keys and values.

    While caching is on, each call appends its keys and values to those of the calls before, so
    the tokens of a step see all earlier scales without a mask.

    Args:
        width: width C in and out.
        heads: number of heads H, a divisor of ``width``.
        l2_norm: whether queries and keys are unit vectors with a learned scale per head.
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
        """Return (B, L, C) for ``x`` (B, L, C).

        Args:
            x: tokens, (B, L, C).
            attn_bias: added to the scores, 0 or -inf, (1, 1, L, L); None lets all see all.
        """
        B, L, C = x.shape
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv = F.linear(x, self.mat_qkv.weight, bias)  # (B, L, 3C)
        qkv = qkv.view(B, L, 3, self.heads, self.head_dim)  # (B, L, 3, H, c)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 of (B, H, L, c)
        if self.l2_norm:
            scale = self.scale_mul_1H11.clamp_max(_MAX_LOG_SCALE).exp()
            q = F.normalize(q, dim=-1).mul(scale)
            k = F.normalize(k, dim=-1)
        k, v = self.with_cached(k, v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias, scale=self.scale)
        out = out.transpose(1, 2).reshape(B, L, C)  # (B, H, L, c) -> (B, L, C)
        projected: Tensor = self.proj(out)
        return projected


class FFN(nn.Module):
    """Two linear layers with a tanh-approximated GELU between them.

    Args:
        width: width C in and out.
        hidden: width between the layers.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, L, C) for ``x`` (B, L, C)."""
        y: Tensor = self.fc2(self.act(self.fc1(x)))
        return y


class SharedAdaLin(nn.Linear):
    """One linear layer that makes the AdaLN values of all blocks.

    Args:
        width: width C.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, 6 * width)

    def forward(self, cond: Tensor) -> Tensor:
        """Return (B, 1, 6, C) for ``cond`` (B, C)."""
        return super().forward(cond).view(cond.shape[0], 1, 6, -1)  # (B, 6C) -> (B, 1, 6, C)


class Block(nn.Module):
    """A transformer block: attention and feed-forward branch, each with AdaLN and a residual add.

    Args:
        width: width C.
        heads: number of heads H.
        hidden: inner width of the feed-forward branch.
        shared_aln: whether the block takes ready AdaLN values and adds its own offset to them,
            instead of making them from the class embedding.
        attn_l2_norm: see :class:`SelfAttention`.
        norm_eps: epsilon of the layer norms.

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
        """Return the residual stream after both branches, (B, L, C).

        Args:
            x: residual stream, (B, L, C).
            cond: class embedding, (B, C); with ``shared_aln`` the output of
                :class:`SharedAdaLin`, (B, 1, 6, C).
            attn_bias: see :class:`SelfAttention`.
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


class AdaLNBeforeHead(nn.Module):
    """The AdaLN between the last block and the classifier; it has no gamma.

    Args:
        width: width C.
        norm_eps: epsilon of the layer norm.
    """

    def __init__(self, width: int, norm_eps: float) -> None:
        super().__init__()
        self.width = width
        self.ln_wo_grad = nn.LayerNorm(width, eps=norm_eps, elementwise_affine=False)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Return (B, L, C) for ``x`` (B, L, C) and the class embedding ``cond`` (B, C)."""
        scale, shift = self.ada_lin(cond).view(-1, 1, 2, self.width).unbind(2)  # 2 of (B, 1, C)
        y: Tensor = self.ln_wo_grad(x).mul(scale.add(1)).add_(shift)
        return y


# --------------------------------------------------------------------------------------------------
# Sampling
# --------------------------------------------------------------------------------------------------


def sample_top_k_top_p(
    logits: Tensor,
    top_k: int = 0,
    top_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return one id drawn per token, int64 (B, L).

    Args:
        logits: unnormalized log-probabilities, (B, L, V).
        top_k: draw among the k likeliest ids (ties with the k-th included); 0 for all.
        top_p: draw among the likeliest ids that together reach this probability; 0 for all.
        generator: source of randomness; None for torch's global one of the device.
    """
    B, L, V = logits.shape
    if top_k > 0:
        kth = logits.topk(top_k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p > 0:
        ascending, order = logits.sort(dim=-1)
        drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= (1 - top_p)
        drop[..., -1] = False  # the likeliest id always stays
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -math.inf)
    probabilities = logits.softmax(dim=-1).view(-1, V)  # (B * L, V)
    drawn = torch.multinomial(probabilities, 1, replacement=True, generator=generator)
    return drawn.view(B, L)  # (B * L, 1) -> (B, L)


# --------------------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------------------


class VAR(nn.Module):
    """Class-conditional next-scale image generator.

    Parameters and buffers have the names and shapes of the published ``var_d*.pth``.

    The VQ-VAE is held, not owned: it is no submodule, so ``state_dict()``, ``parameters()``,
    ``to()``, ``half()`` and ``eval()`` leave it alone. To move both::

        var.to(device)
        var.vae.to(device)

    Generation keeps keys and values on the attention modules: one call at a time per model.

    Args:
        vae: decoder side of the VQ-VAE whose tokens are predicted.
        num_classes: number of classes; the index after the last stands for "no class".
        depth: number of blocks.
        width: width C, by default 64 * ``depth``.
        heads: number of heads, by default ``depth``.
        mlp_ratio: inner width of the feed-forward branch, in units of ``width``.
        shared_aln: whether all blocks share one AdaLN layer (d36 at 512 x 512 does).
        attn_l2_norm: whether attention works on unit queries and keys.
        norm_eps: epsilon of the layer norms.
        scales: sides of the K >= 2 square token maps, never shrinking.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is below 1, ``heads`` does not divide ``width``, or ``scales`` is no
            schedule.

    Example:
        >>> var = build("tiny", scales=(1, 2, 4))
        >>> var.autoregressive_infer_cfg(2, 7, g_seed=0).shape
        torch.Size([2, 3, 64, 64])

    Source: VAR, arXiv 2404.02905, section 3.
    """

    lvl_1L: Tensor  # noqa: N815  (the published checkpoints' name)
    attn_bias_for_masking: Tensor

    def __init__(
        self,
        vae: VQVAEDecoder,
        *,
        num_classes: int = 1000,
        depth: int = 16,
        width: int | None = None,
        heads: int | None = None,
        mlp_ratio: float = 4.0,
        shared_aln: bool = False,
        attn_l2_norm: bool = True,
        norm_eps: float = 1e-6,
        scales: tuple[int, ...] = VAR_256,
    ) -> None:
        super().__init__()
        width = 64 * depth if width is None else width
        heads = depth if heads is None else heads
        check_sizes(num_classes=num_classes, depth=depth, width=width, heads=heads)
        check_heads(width, heads)
        _check_scales(scales)
        self._vae = (vae,)  # a tuple hides the module from nn.Module's registration
        self.num_classes, self.depth, self.width, self.heads = num_classes, depth, width, heads
        self.shared_aln, self.attn_l2_norm = shared_aln, attn_l2_norm
        self.scales = tuple(scales)
        self.first_l = self.scales[0] ** 2
        self.L = sum(side**2 for side in self.scales)

        # Input: code vectors, class, place in the token map, scale.
        std = math.sqrt(1 / width / 3)
        self.word_embed = nn.Linear(vae.z_channels, width)
        self.class_emb = nn.Embedding(num_classes + 1, width)
        self.pos_start = nn.Parameter(nn.init.normal_(torch.empty(1, self.first_l, width), std=std))
        self.pos_1LC = nn.Parameter(nn.init.normal_(torch.empty(1, self.L, width), std=std))
        self.lvl_embed = nn.Embedding(len(self.scales), width)

        # Backbone.
        self.shared_ada_lin: nn.Module = (
            nn.Sequential(nn.SiLU(), SharedAdaLin(width)) if shared_aln else nn.Identity()
        )
        self.blocks = nn.ModuleList(
            [
                Block(
                    width,
                    heads,
                    round(width * mlp_ratio),
                    shared_aln=shared_aln,
                    attn_l2_norm=attn_l2_norm,
                    norm_eps=norm_eps,
                )
                for _ in range(depth)
            ]
        )

        # Only the teacher-forced pass needs the mask; it is part of the published checkpoints.
        level, mask = _levels_and_mask(self.scales)
        self.register_buffer("lvl_1L", level)
        self.register_buffer("attn_bias_for_masking", mask)

        # Output.
        self.head_nm = AdaLNBeforeHead(width, norm_eps)
        self.head = nn.Linear(width, vae.vocab_size)

    @property
    def vae(self) -> VQVAEDecoder:
        """The VQ-VAE decoder side; not moved, cast or saved with this module."""
        return self._vae[0]

    def kv_caching(self, enable: bool) -> None:
        """Turn the key/value caches of all blocks on or off; either way they are emptied."""
        for module in self.modules():
            if isinstance(module, KVCache):
                module.kv_caching(enable)

    def get_logits(self, x: Tensor, cond: Tensor) -> Tensor:
        """Return float32 logits, (B, L, V).

        Args:
            x: residual stream after the last block, (B, L, C).
            cond: class embedding, (B, C).
        """
        # The classifier runs at the precision of its weights even under autocast.
        dtype = self.head.weight.dtype
        logits: Tensor = self.head(self.head_nm(x.to(dtype), cond).to(dtype))
        return logits.float()

    def forward(
        self, label: Tensor, x_BLCv_wo_first_l: Tensor, only: Tensor | None = None
    ) -> Tensor:
        """Return teacher-forced logits of all scales at once, float32 (B, L, V).

        A mask keeps each scale from seeing later ones, so the logits equal those of the K cached
        steps of generation on the same tokens. No class is dropped here: for classifier-free
        training, put ``num_classes`` in place of some labels.

        Args:
            label: int64 class indices in [0, ``num_classes``], (B,); not checked for range.
            x_BLCv_wo_first_l: inputs of steps 1 to K - 1 side by side, each ``f_hat`` of the step
                before averaged to the size of the step, (B, L - first_l, Cvae); the quantizer's
                ``inputs`` makes them.
            only: which tokens to run, int64 (n,) in [0, L), rising; None for all. The others do
                not exist then: the result is (B, n, V), the same as without ``only`` if the tokens
                are those of the first scales.

        Raises:
            ValueError: the shapes do not fit each other or the schedule.
        """
        B = label.shape[0] if label.ndim == 1 else -1
        asked = (B, self.L - self.first_l, self.word_embed.in_features)
        if B < 0 or tuple(x_BLCv_wo_first_l.shape) != asked:
            raise ValueError(
                f"asked: labels (B,) and inputs (B, {asked[1]}, {asked[2]}) for scales "
                f"{self.scales}\nfound: labels {tuple(label.shape)}, inputs "
                f"{tuple(x_BLCv_wo_first_l.shape)}\ndo: leave the first token map out of the inputs"
            )
        cond = self.class_emb(label)  # (B, C)
        rest = self.word_embed(x_BLCv_wo_first_l.to(self.word_embed.weight.dtype))
        x = torch.cat((self._start(cond), rest), dim=1)  # (B, L, C)
        x = x + self._positions()
        mask = self.attn_bias_for_masking
        if only is not None:
            x, mask = x[:, only], mask[:, :, only[:, None], only]
        ada = self.shared_ada_lin(cond)
        for block in self.blocks:
            x = block(x, ada, mask)
        return self.get_logits(x, cond)

    def autoregressive_infer_cfg(
        self,
        B: int,
        label: int | Tensor | None,
        g_seed: int | None = None,
        cfg: float = 1.5,
        top_k: int = 0,
        top_p: float = 0.0,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Return generated images in [0, 1], (B, 3, r * H, r * H).

        This is :meth:`infer_fhat` followed by the VQ-VAE decoder. H is the side of the last map and
        r the decoder's factor, 16 as published.

        Args:
            B: number of images, at least 1.
            label: class of all images, or int64 classes (B,), or None to draw them; -1 stands for
                "no class".
            g_seed: seed of the draws; None uses torch's global generator of the device.
            cfg: guidance strength at the last step, at least 0; it grows linearly from 0 at the
                first.
            top_k: draw among the k likeliest tokens, 0 to V; 0 for all.
            top_p: draw among the likeliest tokens that reach this probability, in [0, 1]; 0 for
                all.
            on_step: called after each step with its index and ``f_hat`` so far.

        Raises:
            TypeError: ``B`` is no int, or ``label`` is neither of the above.
            ValueError: an argument is out of range, a label tensor has another length than ``B``,
                or the VQ-VAE is on another device.
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
        cfg: float = 1.5,
        top_k: int = 0,
        top_p: float = 0.0,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Return the feature maps that the VQ-VAE decodes to images, (B, Cvae, H, W).

        Classifier-free guidance runs each image twice, with its class and without: the batch
        inside is 2B.

        Args:
            B: see :meth:`autoregressive_infer_cfg`.
            label: see there.
            g_seed: see there.
            cfg: see there.
            top_k: see there.
            top_p: see there.
            on_step: called after each step with its index and ``f_hat`` so far, a tensor that
                later steps do not overwrite.

        Raises:
            TypeError: see there.
            ValueError: see there.

        Source: VAR, arXiv 2404.02905, algorithm 2; guidance as in the published code.
        """
        self._check_sampling(B, cfg, top_k, top_p)
        device = self.lvl_1L.device
        generator = None if g_seed is None else torch.Generator(device).manual_seed(g_seed)
        classes = self._classes(B, label, generator)  # (B,)
        no_class = torch.full_like(classes, self.num_classes)
        cond = self.class_emb(torch.cat((classes, no_class)))  # (2B, C)
        ada = self.shared_ada_lin(cond)
        positions = self._positions()  # (1, L, C)
        quantize = self.vae.quantize
        side = self.scales[-1]
        f_hat = quantize.embedding.weight.new_zeros(B, self.vae.z_channels, side, side)
        last = len(self.scales) - 1
        x = self._start(cond) + positions[:, : self.first_l]  # (2B, first_l, C)
        end = self.first_l

        with kv_caching(self):
            for step in range(len(self.scales)):
                for block in self.blocks:
                    x = block(x, ada)
                logits = self.get_logits(x, cond)  # (2B, l, V)
                t = cfg * (step / last)
                logits = (1 + t) * logits[:B] - t * logits[B:]  # (B, l, V)
                tokens = sample_top_k_top_p(logits, top_k, top_p, generator)  # (B, l)
                f_hat, average = quantize.get_next_autoregressive_input(
                    step, len(self.scales), f_hat, tokens, self.scales
                )
                if step < last:
                    begin, end = end, end + self.scales[step + 1] ** 2
                    x = average.flatten(2).transpose(1, 2)  # (B, l, Cvae)
                    x = self.word_embed(x.to(self.word_embed.weight.dtype))
                    x = (x + positions[:, begin:end]).repeat(2, 1, 1)  # (2B, l, C)
                if on_step is not None:
                    on_step(step, f_hat)
        return f_hat

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Fill all parameters and buffers, parameters with random values that keep branches alive.

        Training starts with gammas near zero, which turns every block into the identity. Here
        each branch counts instead, and the residual stream is about as large at any depth. Standard
        deviations, with n the inputs of a unit and D = ``depth``:

        - class, place and scale embeddings, and biases of the branches: 0.5; word embedding
          0.5 / sqrt(n);
        - linear layers of the branches: 1 / sqrt(n), the last of each 2 / sqrt(n);
        - AdaLN: 0.2 / sqrt(n) around scale 0, shift 0 and gamma 1 / sqrt(D);
        - classifier: 2 / sqrt(n), so that some tokens are clearly likelier than others.

        Args:
            generator: source of the values, on the device of the parameters.
        """

        def normal(tensor: Tensor, std: float) -> None:
            tensor.normal_(0, std, generator=generator)

        def linear(layer: nn.Linear, gain: float) -> None:
            normal(layer.weight, gain / math.sqrt(layer.in_features))
            if layer.bias is not None:
                layer.bias.zero_()

        gamma = 1 / math.sqrt(self.depth)
        for embedding in (self.class_emb.weight, self.lvl_embed.weight):
            normal(embedding, 0.5)
        for positions in (self.pos_start, self.pos_1LC):
            normal(positions, 0.5)
        linear(self.word_embed, 0.5)
        linear(self.head, 2.0)
        for module in self.modules():
            if isinstance(module, SelfAttention):
                linear(module.mat_qkv, 1.0)
                linear(module.proj, 2.0)
                normal(module.q_bias, 0.5)
                normal(module.v_bias, 0.5)
                module.zero_k_bias.zero_()
                if module.l2_norm:
                    module.scale_mul_1H11.fill_(math.log(4.0))
            elif isinstance(module, FFN):
                linear(module.fc1, 1.0)
                linear(module.fc2, 2.0)
                normal(module.fc1.bias, 0.5)
            elif isinstance(module, SharedAdaLin):
                linear(module, 0.2)
            elif isinstance(module, AdaLNBeforeHead):
                _ada_linear(module.ada_lin, linear)
            elif isinstance(module, Block):
                if module.shared_aln:
                    normal(module.ada_gss, 0.2 / math.sqrt(self.width))
                    module.ada_gss[:, :, :2] += gamma
                else:
                    layer = _ada_linear(module.ada_lin, linear)
                    layer.bias[: 2 * self.width] = gamma
        level, mask = _levels_and_mask(self.scales)
        self.lvl_1L.copy_(level)
        self.attn_bias_for_masking.copy_(mask)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a checkpoint after comparing its architecture and schedule with this model's.

        Args:
            state_dict: a published ``var_d*.pth``, or what :meth:`state_dict` gave.
            strict: whether missing and unexpected keys are errors.
            assign: keep the given tensors instead of copying their values.

        Raises:
            ValueError: the checkpoint is no VAR's, or of another depth, width or schedule.
            RuntimeError: other keys or shapes do not fit.
        """
        found = _describe(state_dict)
        if strict and not found:
            raise ValueError(
                f"asked: the state dict of a VAR\nfound: no pos_1LC (1, L, C) among "
                f"{len(state_dict)} keys: {', '.join(list(state_dict)[:4])}\n"
                "do: pass the contents of a var_d*.pth"
            )
        asked = _describe(self.state_dict()) | {"scales": self.scales}
        wrong = [name for name in found if found[name] != asked[name]]
        if wrong:
            raise ValueError(
                f"asked: VAR with {', '.join(f'{name}={asked[name]}' for name in wrong)}\n"
                f"found: a checkpoint with {', '.join(f'{name}={found[name]}' for name in wrong)}\n"
                "do: build the model as the checkpoint was trained, or load another checkpoint"
            )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _start(self, cond: Tensor) -> Tensor:
        """Return the input of step 0 without positions, (B, first_l, C), for ``cond`` (B, C)."""
        shape = (cond.shape[0], self.first_l, -1)
        return cond.unsqueeze(1).expand(shape) + self.pos_start.expand(shape)

    def _positions(self) -> Tensor:
        """Return scale plus place embedding of all tokens, (1, L, C)."""
        levels: Tensor = self.lvl_embed(self.lvl_1L)
        return levels + self.pos_1LC

    def _classes(self, B: int, label: object, generator: torch.Generator | None) -> Tensor:
        """Return checked or drawn class indices on the model's device, int64 (B,)."""
        device = self.lvl_1L.device
        if label is None:
            uniform = torch.full((1, self.num_classes), 1.0 / self.num_classes, device=device)
            return torch.multinomial(uniform, B, replacement=True, generator=generator).reshape(B)
        if isinstance(label, int):
            classes = torch.full((B,), label, device=device)
        elif isinstance(label, Tensor) and not label.is_floating_point():
            if tuple(label.shape) != (B,):
                raise ValueError(
                    f"asked: {B} images\nfound: label of shape {tuple(label.shape)}\n"
                    f"do: give one class per image, shape ({B},), or an int for all"
                )
            classes = label.to(device=device, dtype=torch.int64)
        else:
            kind = label.dtype if isinstance(label, Tensor) else type(label).__name__
            raise TypeError(f"label of type {kind}: give an int, an integer tensor (B,) or None")
        low, high = int(classes.min()), int(classes.max())
        if low < -1 or high >= self.num_classes:
            raise ValueError(
                f"asked: label {high if high >= self.num_classes else low}\n"
                f"found: classes 0 to {self.num_classes - 1}\n"
                "do: pick one of them, or -1 for no class"
            )
        return torch.where(classes < 0, self.num_classes, classes)

    def _check_sampling(self, B: int, cfg: float, top_k: int, top_p: float) -> None:
        """Raise on a batch size, guidance or truncation out of range, or a VQ-VAE elsewhere."""
        check_sizes(B=B)
        if not (math.isfinite(cfg) and cfg >= 0):
            raise ValueError(f"cfg={cfg}: guidance is finite and at least 0; 1.5 is usual")
        V = self.head.out_features
        if not 0 <= top_k <= V:
            raise ValueError(
                f"top_k={top_k}: the codebook has {V} tokens; use 1 to {V}, or 0 for all"
            )
        if not 0 <= top_p <= 1:
            raise ValueError(f"top_p={top_p}: a probability is in [0, 1]; use 0 for all tokens")
        here, there = self.lvl_1L.device, self.vae.quantize.embedding.weight.device
        if here != there:
            raise ValueError(
                f"asked: generation on {here}\nfound: the VQ-VAE on {there}, it does not move "
                f"with the model\ndo: var.vae.to({str(here)!r})"
            )


def _ada_linear(
    ada_lin: nn.Sequential, fill: Callable[[nn.Linear, float], None], gain: float = 0.2
) -> nn.Linear:
    """Fill the linear layer of a SiLU + linear pair and return it."""
    layer = ada_lin[1]
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"AdaLN ends in {type(layer).__name__}, not in a linear layer")
    fill(layer, gain)
    return layer


def _levels_and_mask(scales: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the step of each token, int64 (1, L), and the additive mask, float32 (1, 1, L, L)."""
    level = torch.cat([torch.full((side**2,), step) for step, side in enumerate(scales)])  # (L,)
    sees = level.unsqueeze(1) >= level.unsqueeze(0)  # (L queries, L keys)
    mask = torch.where(sees, 0.0, -math.inf)
    return level.unsqueeze(0), mask.unsqueeze(0).unsqueeze(0)


def _check_scales(scales: Sequence[object]) -> None:
    """Raise unless ``scales`` are the sides of at least two token maps that never shrink."""
    sides = [side for side in scales if isinstance(side, int)]
    grows = all(before <= side for before, side in itertools.pairwise([1, *sides]))
    if len(sides) < 2 or len(sides) < len(scales) or not grows:
        raise ValueError(
            f"asked: scales={tuple(scales)}\nfound: not the sides of two or more token maps, each "
            f"an int of at least the one before\ndo: use a schedule like {VAR_256}"
        )


def _describe(state: Mapping[str, Any]) -> dict[str, object]:
    """Return what a VAR state dict says about its architecture; empty for any other mapping."""
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


# --------------------------------------------------------------------------------------------------
# Named models
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class VARConfig:
    """Sizes of a VAR and of its VQ-VAE; see :class:`VAR` and ``VQVAEDecoder`` for the fields.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is below 1, ``heads`` does not divide ``width``, or ``scales`` is no
            schedule.
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
        width = 64 * self.depth if self.width is None else self.width
        heads = self.depth if self.heads is None else self.heads
        check_sizes(depth=self.depth, width=width, heads=heads, num_classes=self.num_classes)
        check_sizes(vocab_size=self.vocab_size, z_channels=self.z_channels, ch=self.ch)
        check_heads(width, heads)
        _check_scales(self.scales)

    def new_vae(self) -> VQVAEDecoder:
        """Return a VQ-VAE decoder side of these sizes with torch's default weights."""
        return VQVAEDecoder(**self._vae_sizes())

    def new_whole_vae(self) -> VQVAE:
        """Return a VQ-VAE of these sizes, encoder included, with torch's default weights."""
        return VQVAE(**self._vae_sizes())

    def _vae_sizes(self) -> dict[str, Any]:
        names = ("vocab_size", "z_channels", "ch", "pyramid")
        return {name: getattr(self, name) for name in names}

    def new_var(self, vae: VQVAEDecoder) -> VAR:
        """Return a VAR of these sizes with torch's default weights, on top of ``vae``."""
        return VAR(
            vae,
            num_classes=self.num_classes,
            depth=self.depth,
            width=self.width,
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            shared_aln=self.shared_aln,
            attn_l2_norm=self.attn_l2_norm,
            norm_eps=self.norm_eps,
            scales=self.scales,
        )


CONFIGS: Mapping[str, VARConfig] = MappingProxyType(
    {
        "d16": VARConfig(depth=16),
        "d20": VARConfig(depth=20),
        "d24": VARConfig(depth=24),
        "d30": VARConfig(depth=30),
        "d36-512": VARConfig(depth=36, shared_aln=True, scales=VAR_512),
        "tiny": VARConfig(depth=4, width=128, heads=4, vocab_size=512, ch=32),
        "demo": VARConfig(
            depth=6,
            width=256,
            heads=8,
            shared_aln=True,
            num_classes=5,
            scales=VAR_512,
            vocab_size=512,
            z_channels=16,
            ch=64,
            pyramid=Pyramid(multipliers=(1, 2), res_blocks=1, groups=8, attention=False, patch=4),
        ),
    }
)
"""The published models by name, ``tiny`` for tests, and ``demo``, whose weights come along."""


def build(
    name: str, *, scales: tuple[int, ...] | None = None, seed: int = 0, **overrides: Any
) -> VAR:
    """Return a named model with random weights, in eval mode, without gradients, on the CPU.

    Its VQ-VAE is at ``.vae``. The weights depend on ``seed`` alone; torch's global generator is
    neither used nor moved. They draw colourful noise, not objects.

    Args:
        name: a key of ``CONFIGS``.
        scales: sides of the token maps in place of the named model's.
        seed: seed of the weights.
        **overrides: fields of :class:`VARConfig` in place of the named model's.

    Raises:
        TypeError: an override is no field of :class:`VARConfig`, or a size is not an int.
        ValueError: ``name`` is unknown, or the sizes do not fit each other.

    Example:
        >>> build("tiny", depth=2).depth
        2
    """
    if scales is not None:
        overrides["scales"] = scales
    config = configured(CONFIGS, name, overrides)
    # On the meta device torch's own initialization, soon overwritten, costs neither time nor draws.
    with torch.device("meta"):
        vae = config.new_vae()
        var = config.new_var(vae)
    generator = torch.Generator().manual_seed(seed)
    vae.to_empty(device="cpu").init_weights(generator)
    var.to_empty(device="cpu").init_weights(generator)
    vae.eval().requires_grad_(False)
    return var.eval().requires_grad_(False)


def load(name: str, var_path: str | Path | None = None, vae_path: str | Path | None = None) -> VAR:
    """Return a named model with trained weights, in eval mode, without gradients, on the CPU.

    The weights of ``demo`` come along with the package, and its ``.vae`` is a whole
    :class:`~fastvar_fx.models.vqvae.VQVAE`. Those of the published models are downloads.

    Args:
        name: a key of ``CONFIGS``.
        var_path: the transformer of a published model, for example ``var_d16.pth``.
        vae_path: its whole VQ-VAE, ``vae_ch160v4096z32.pth``; its encoder is not kept.

    Raises:
        FileNotFoundError: a file is not there.
        TypeError: the model needs both files, or none.
        ValueError: ``name`` is unknown, a file is damaged or no state dict, or its contents do not
            fit the named model.

    Example:
        >>> load("demo").num_classes
        5
    """
    config = configured(CONFIGS, name, {})
    if (var_path is None) != (vae_path is None) or (var_path is None) == (name != packaged.NAME):
        raise TypeError(
            f"load({name!r}): the weights of {packaged.NAME!r} come along and take no file; the "
            "other models need var_path and vae_path"
        )
    if var_path is None or vae_path is None:
        return _load_packaged(config)
    vae_state, var_state = _read_state(vae_path), _read_state(var_path)
    try:
        vae = VQVAEDecoder.from_state_dict(vae_state)
    except ValueError as error:
        raise ValueError(f"{vae_path}: {error}") from error
    with torch.device("meta"):
        var = config.new_var(vae)
    try:
        var.load_state_dict(var_state, strict=True, assign=True)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"asked: model {name!r}\nfound: {var_path} does not hold it\n{error}"
        ) from error
    return var.eval().requires_grad_(False)


def _load_packaged(config: VARConfig) -> VAR:
    """Return the model whose weights come along with the package."""
    parts = packaged.weights()
    with torch.device("meta"):
        vae = config.new_whole_vae()
        var = config.new_var(vae)
    # What follows from the sizes is not in the file: levels, mask, zeros.
    var.to_empty(device="cpu").init_weights(torch.Generator())
    try:
        vae.load_state_dict(parts["vae"], strict=True, assign=True)
        var.load_state_dict(dict(var.named_buffers()) | parts["var"], strict=True)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"asked: the weights that come along\nfound: {packaged.WEIGHTS} does not hold them\n"
            f"{error}\ndo: install the package again"
        ) from error
    vae.eval().requires_grad_(False)
    return var.eval().requires_grad_(False)


def _read_state(path: str | Path) -> dict[str, Tensor]:
    """Return the state dict in a file written by ``torch.save``."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"asked: checkpoint {path}\nfound: no such file\n"
            "do: download it from huggingface.co/FoundationVision/var, or correct the path"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever it stumbles on
        raise ValueError(
            f"asked: checkpoint {path}\nfound: a file of {path.stat().st_size} bytes that torch "
            f"cannot read ({type(error).__name__})\ndo: download it again; it may be incomplete"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        kind = f"keys {list(state)[:4]}" if isinstance(state, dict) else type(state).__name__
        raise ValueError(
            f"asked: checkpoint {path}\nfound: {kind}, not a dict of tensors\n"
            "do: pass a plain state dict; take it out of a training checkpoint first"
        )
    return state
