"""VAR's multi-scale VQ-VAE: from token maps to an image, and from an image to token maps.

VAR draws an image as K square token maps of growing side. The decoder side turns them into pixels:

    token ids --codebook--> vectors --upsample, phi--> residual of one scale
    f_hat = sum of the K residuals          (B, Cvae, H, W), H = W = side of the last token map
    image = decoder(post_quant_conv(f_hat)) (B, 3, r * H, r * W), r = 16 as published

It also turns a partial `f_hat` into the input of the next scale. Generation needs no more;
`VQVAE` adds the encoder, for training and for measuring on pictures.

Source: VAR, arXiv 2404.02905, section 3.2 and algorithms 1 and 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvar_fx.errors import ArgumentError, ModelError
from fastvar_fx.models.configs import check_sizes


@dataclass(frozen=True, kw_only=True)
class Pyramid:
    """How encoder and decoder go from an image to the last token map; by default as published.

    Attributes:
        multipliers: Width per resolution, in units of the base width, from the image down.
        res_blocks: Residual blocks per resolution of the encoder; the decoder has one more.
        groups: Groups of every group norm, a divisor of the base width.
        attention: Whether the lowest resolution attends to itself.
        patch: Side of the squares of pixels that are the channels of the highest resolution.

    Raises:
        ArgumentError: If a number is below 1, or there is no multiplier.
    """

    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    groups: int = 32
    attention: bool = True
    patch: int = 1

    def __post_init__(self) -> None:
        numbers = (*self.multipliers, self.res_blocks, self.groups, self.patch)
        if not self.multipliers or min(numbers) < 1:
            raise ArgumentError(
                f"a pyramid has a multiplier or more, and every number is at least 1; found {self}"
            )

    @property
    def factor(self) -> int:
        """Pixels per side of a token of the last map."""
        return int(self.patch * 2 ** (len(self.multipliers) - 1))

    def widths(self, ch: int) -> list[int]:
        """Returns the channels of each resolution for the base width `ch`, from the image down."""
        return [ch * multiplier for multiplier in self.multipliers]


PUBLISHED = Pyramid()
"""The shape of `vae_ch160v4096z32.pth`."""

_ENCODER_PREFIXES = ("encoder.", "quant_conv.")
_ENCODER_KEYS = ("quantize.ema_vocab_hit_SV",)


class Phi(nn.Conv2d):
    """A residual 3x3 convolution that repairs what upsampling blurred.

    Args:
        channels: Channels Cvae in and out.
        mix: Share of the convolution in the result, in [0, 1].
    """

    def __init__(self, channels: int, mix: float = 0.5) -> None:
        super().__init__(channels, channels, kernel_size=3, padding=1)
        self.mix = mix

    def forward(self, h: Tensor) -> Tensor:
        """Returns `(1 - mix) * h + mix * conv(h)`, (B, Cvae, H, W)."""
        return h.mul(1 - self.mix) + super().forward(h).mul_(self.mix)


class PhiBank(nn.Module):
    """A few `Phi` shared by the K scales, chosen by how far generation has come.

    Args:
        channels: Channels Cvae.
        count: Number of convolutions, at least 1.
    """

    def __init__(self, channels: int, count: int = 4) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList([Phi(channels) for _ in range(count)])
        # With ten scales and four convolutions step 2 lies exactly between two ticks, so the
        # choice depends on the last bit: these operations round as numpy.linspace does, with which
        # the published weights were trained.
        first = 1 / 3 / count if count == 4 else 1 / 2 / count
        last = 1 - first
        gap = (last - first) / max(count - 1, 1)
        self.ticks = (*(i * gap + first for i in range(count - 1)), last if count > 1 else first)

    def forward(self, h: Tensor, progress: float) -> Tensor:
        """Returns `h` through the convolution whose tick is nearest to `progress`.

        Args:
            h: Residual map, (B, Cvae, H, W).
            progress: step / (K - 1), in [0, 1].
        """
        nearest = min(range(len(self.ticks)), key=lambda i: abs(self.ticks[i] - progress))
        refined: Tensor = self.qresi_ls[nearest](h)
        return refined


class QuantizedMap(NamedTuple):
    """One token map of an image.

    Attributes:
        z: The vectors that were quantized, (B, Cvae, h, w).
        tokens: Their ids, int64 (B, h * w).
        added: What the map adds to `f_hat`, (B, Cvae, H, W).
    """

    z: Tensor
    tokens: Tensor
    added: Tensor


class Quantizer(nn.Module):
    """The codebook and the two moves of generation: add a scale, look at the sum at another size.

    Args:
        vocab_size: Codebook entries V.
        channels: Code vector width Cvae.
        phis: Number of shared `Phi`.
    """

    def __init__(self, vocab_size: int, channels: int, phis: int = 4) -> None:
        super().__init__()
        self.quant_resi = PhiBank(channels, phis)
        self.embedding = nn.Embedding(vocab_size, channels)

    def residual(self, tokens: Tensor, step: int, steps: int, side: int) -> Tensor:
        """Returns what one token map adds to `f_hat`, (B, Cvae, side, side).

        Args:
            tokens: int64 ids of a square token map in row-major order, (B, h * h).
            step: Index of the scale, 0 to `steps` - 1.
            steps: Number of scales K, at least 2.
            side: Side of `f_hat`, equal to h at the last step.
        """
        B, L = tokens.shape
        h = math.isqrt(L)
        z = self.embedding(tokens)  # (B, L, Cvae)
        z = z.transpose(1, 2).reshape(B, -1, h, h)  # (B, Cvae, h, h)
        if step != steps - 1:
            z = F.interpolate(z, size=(side, side), mode="bicubic")  # (B, Cvae, side, side)
        added: Tensor = self.quant_resi(z, step / (steps - 1))
        return added

    def get_next_autoregressive_input(
        self, si: int, SN: int, f_hat: Tensor, tokens: Tensor, scales: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Returns `f_hat` with a token map added, and area-averaged to the next token map.

        The name and the first arguments are those of the published code; step skipping finds it
        by them.

        Args:
            si: Index of the scale, 0 to `SN` - 1.
            SN: Number of scales K.
            f_hat: Sum of the residuals so far, (B, Cvae, H, W); it is not overwritten.
            tokens: See `residual`.
            scales: Sides of the token maps.

        Returns:
            The new sum, and its average (B, Cvae, h, h); at the last step the sum itself.
        """
        f_hat = f_hat + self.residual(tokens, si, SN, scales[-1])
        if si == SN - 1:
            return f_hat, f_hat
        side = scales[si + 1]
        return f_hat, F.interpolate(f_hat, size=(side, side), mode="area")

    def nearest(self, z: Tensor) -> Tensor:
        """Returns the ids of the code vectors nearest to `z` (B, Cvae, h, w), int64 (B, h * w)."""
        vectors = z.flatten(2).transpose(1, 2)  # (B, h * w, Cvae)
        codes = self.embedding.weight  # (V, Cvae)
        # |z - c|^2 without |z|^2, which moves no minimum
        return (codes.square().sum(1) - 2 * vectors @ codes.T).argmin(-1)

    def quantized(self, f: Tensor, scales: Sequence[int]) -> Iterator[QuantizedMap]:
        """Yields what each token map takes of the features; their sum over the maps is `f_hat`.

        Gradients reach codebook and phi through `added`; none reach `f`.

        Args:
            f: Features of an image, (B, Cvae, H, W), H = W = `scales[-1]`.
            scales: Sides of the token maps.

        Source: VAR, arXiv 2404.02905, algorithm 1.
        """
        rest, steps = f.detach(), len(scales)
        for step, side in enumerate(scales):
            last = step == steps - 1
            z = rest if last else F.interpolate(rest, size=(side, side), mode="area")
            tokens = self.nearest(z.detach())
            added = self.residual(tokens, step, steps, scales[-1])
            rest = rest - added.detach()
            yield QuantizedMap(z, tokens, added)

    def inputs(self, tokens: Sequence[Tensor], scales: Sequence[int]) -> Tensor:
        """Returns the inputs of steps 1 to n for the token maps of the n steps before.

        Args:
            tokens: int64 ids of the first n token maps, each (B, h * h), n at least 1.
            scales: Sides of all K token maps, n < K.

        Returns:
            Side by side, each `f_hat` averaged to the size of its step, (B, L, Cvae).
        """
        side = scales[-1]
        f_hat = self.embedding.weight.new_zeros(len(tokens[0]), 1, side, side)
        averages = []
        for step, ids in enumerate(tokens):
            f_hat, average = self.get_next_autoregressive_input(
                step, len(scales), f_hat, ids, scales
            )
            averages.append(average.flatten(2).transpose(1, 2))  # (B, h * h, Cvae)
        return torch.cat(averages, dim=1)


def _group_norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Two normalized 3x3 convolutions and a residual add.

    Args:
        channels_in: Input channels.
        channels_out: Output channels; where they differ a 1x1 convolution carries the shortcut.
        groups: Groups of the norms.
    """

    def __init__(self, channels_in: int, channels_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = _group_norm(channels_in, groups)
        self.conv1 = nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1)
        self.norm2 = _group_norm(channels_out, groups)
        self.conv2 = nn.Conv2d(channels_out, channels_out, kernel_size=3, padding=1)
        self.nin_shortcut: nn.Module = (
            nn.Identity()
            if channels_in == channels_out
            else nn.Conv2d(channels_in, channels_out, kernel_size=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Returns (B, channels_out, H, W) for `x` (B, channels_in, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        y: Tensor = self.nin_shortcut(x) + h
        return y


class SpatialAttention(nn.Module):
    """Single-head self-attention over the H * W positions of a feature map, plus a residual add.

    Args:
        channels: Channels C in and out.
        groups: Groups of the norm.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = _group_norm(channels, groups)
        self.qkv = nn.Conv2d(channels, 3 * channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (B, C, H, W) for `x` (B, C, H, W)."""
        B, C, H, W = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(B, 3, C, H * W).unbind(1)  # 3 of (B, C, H * W)
        q = q.transpose(1, 2).contiguous()  # (B, H * W, C)
        weights = torch.bmm(q, k).mul_(C**-0.5).softmax(dim=2)  # (B, H * W queries, H * W keys)
        mixed = torch.bmm(v, weights.transpose(1, 2).contiguous())  # (B, C, H * W)
        update: Tensor = self.proj_out(mixed.view(B, C, H, W))
        return x + update


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by two, then a 3x3 convolution.

    Args:
        channels: Channels in and out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (B, C, 2H, 2W) for `x` (B, C, H, W)."""
        doubled: Tensor = self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        return doubled


class Downsample(nn.Module):
    """A 3x3 convolution with stride two, padded at the right and the bottom.

    Args:
        channels: Channels in and out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (B, C, H / 2, W / 2) for `x` (B, C, H, W)."""
        halved: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return halved


class Middle(nn.Module):
    """The bottleneck: residual block, attention where the pyramid has it, residual block.

    Args:
        channels: Channels in and out.
        pyramid: Says the groups, and whether there is attention.
    """

    def __init__(self, channels: int, pyramid: Pyramid) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, pyramid.groups)
        self.attn_1: nn.Module = (
            SpatialAttention(channels, pyramid.groups) if pyramid.attention else nn.Identity()
        )
        self.block_2 = ResBlock(channels, channels, pyramid.groups)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (B, C, H, W) for `x` (B, C, H, W)."""
        h: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return h


class Level(nn.Module):
    """One resolution of the encoder or decoder.

    Args:
        channels_in: Input channels.
        channels_out: Output channels.
        blocks: Number of residual blocks.
        groups: Groups of the norms.
        attention: Whether self-attention follows every residual block.
        resample: How the level ends, if not at the resolution it began with.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        blocks: int,
        groups: int,
        attention: bool,
        resample: type[Upsample | Downsample] | None,
    ) -> None:
        super().__init__()
        inputs = (channels_in,) + (channels_out,) * (blocks - 1)
        self.block = nn.ModuleList([ResBlock(c, channels_out, groups) for c in inputs])
        self.attn = nn.ModuleList(
            [SpatialAttention(channels_out, groups) for _ in inputs] if attention else []
        )
        # A level that keeps its resolution has no such child: checkpoints have no key for it.
        self.resample = resample.__name__.lower() if resample else None
        if resample and self.resample:
            self.add_module(self.resample, resample(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        """Returns (B, channels_out, H', W') with H' = 2H, H / 2 or H as the level resamples."""
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return self.get_submodule(self.resample)(x) if self.resample else x


def _levels(
    pyramid: Pyramid,
    channels: Sequence[tuple[int, int]],
    *,
    blocks: int,
    resample: type[Upsample | Downsample],
    unchanged: int,
) -> nn.ModuleList:
    """Returns the levels of an encoder or decoder, from the image down.

    Args:
        pyramid: Its resolutions.
        channels: Input and output channels of each level.
        blocks: Number of residual blocks of each level.
        resample: How a level ends.
        unchanged: The level that keeps its resolution.
    """
    lowest = len(channels) - 1
    return nn.ModuleList(
        [
            Level(
                *pair,
                blocks=blocks,
                groups=pyramid.groups,
                attention=pyramid.attention and i == lowest,
                resample=None if i == unchanged else resample,
            )
            for i, pair in enumerate(channels)
        ]
    )


class Encoder(nn.Module):
    """A convolutional encoder from an image to a feature map.

    Args:
        channels: Channels Cvae of the output.
        ch: Base width, a multiple of the pyramid's groups.
        pyramid: Its resolutions.
    """

    def __init__(self, channels: int, ch: int, pyramid: Pyramid) -> None:
        super().__init__()
        widths = pyramid.widths(ch)
        self.patch = pyramid.patch
        self.conv_in = nn.Conv2d(3 * pyramid.patch**2, ch, kernel_size=3, padding=1)
        self.down = _levels(
            pyramid,
            list(zip((ch, *widths[:-1]), widths, strict=True)),
            blocks=pyramid.res_blocks,
            resample=Downsample,
            unchanged=len(widths) - 1,
        )
        self.mid = Middle(widths[-1], pyramid)
        self.norm_out = _group_norm(widths[-1], pyramid.groups)
        self.conv_out = nn.Conv2d(widths[-1], channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns features (B, Cvae, H / r, W / r) of an image (B, 3, H, W)."""
        h = self.conv_in(F.pixel_unshuffle(x, self.patch))
        for level in self.down:
            h = level(h)
        h = self.mid(h)
        z: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return z


class Decoder(nn.Module):
    """A convolutional decoder from a feature map to an image.

    Args:
        channels: Channels Cvae of the input.
        ch: Base width, a multiple of the pyramid's groups.
        pyramid: Its resolutions.
    """

    def __init__(self, channels: int, ch: int, pyramid: Pyramid) -> None:
        super().__init__()
        widths = pyramid.widths(ch)
        self.conv_in = nn.Conv2d(channels, widths[-1], kernel_size=3, padding=1)
        self.mid = Middle(widths[-1], pyramid)
        # Stored from the image down, run from the token map up.
        self.up = _levels(
            pyramid,
            list(zip((*widths[1:], widths[-1]), widths, strict=True)),
            blocks=pyramid.res_blocks + 1,
            resample=Upsample,
            unchanged=0,
        )
        self.norm_out = _group_norm(widths[0], pyramid.groups)
        self.patch = pyramid.patch
        self.conv_out = nn.Conv2d(widths[0], 3 * pyramid.patch**2, kernel_size=3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Returns an image of unbounded values (B, 3, rH, rW) for `z` (B, Cvae, H, W)."""
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.patch)


class VQVAEDecoder(nn.Module):
    """Codebook, phi convolutions and decoder of VAR's multi-scale VQ-VAE.

    Names and shapes of the parameters are those of the published `vae_ch160v4096z32.pth`; its
    encoder is left out. The module knows no schedule: sides come from its callers.

    Args:
        vocab_size: Codebook entries V.
        z_channels: Code vector width Cvae.
        ch: Base width, a multiple of the pyramid's groups.
        phis: Number of phi convolutions the scales share.
        pyramid: The resolutions.

    Raises:
        ArgumentError: If a size is below 1, or `ch` is not a multiple of the groups.

    Example:
        >>> vae = VQVAEDecoder(vocab_size=16, z_channels=8, ch=32)
        >>> vae.decode(torch.zeros(1, 8, 2, 2)).shape
        torch.Size([1, 3, 32, 32])

    Source: VAR, arXiv 2404.02905, section 3.2; the decoder is VQGAN's (arXiv 2012.09841).
    """

    def __init__(
        self,
        *,
        vocab_size: int = 4096,
        z_channels: int = 32,
        ch: int = 160,
        phis: int = 4,
        pyramid: Pyramid = PUBLISHED,
    ) -> None:
        super().__init__()
        check_sizes(vocab_size=vocab_size, z_channels=z_channels, ch=ch, phis=phis)
        if ch % pyramid.groups:
            raise ArgumentError(
                f"ch is a multiple of {pyramid.groups}, the groups of the norms; found {ch}"
            )
        self.vocab_size, self.z_channels, self.ch = vocab_size, z_channels, ch
        self.pyramid = pyramid
        self.decoder = Decoder(z_channels, ch, pyramid)
        self.quantize = Quantizer(vocab_size, z_channels, phis)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, kernel_size=3, padding=1)

    def decode(self, f_hat: Tensor) -> Tensor:
        """Returns images in [0, 1], (B, 3, rH, rW).

        Args:
            f_hat: Sum of the residuals of all scales, (B, Cvae, H, W).
        """
        image: Tensor = self.decoder(self.post_quant_conv(f_hat))
        return image.clamp_(-1, 1).add_(1).mul_(0.5)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Fills all parameters with random values that decode to full-contrast pictures.

        Standard deviations, with n the inputs of a unit: codebook 1; convolutions 1 / sqrt(n), the
        last one 0.8 / sqrt(n) so that most pixels lie in (-1, 1) and few are clipped; norms are the
        identity, biases zero.

        Args:
            generator: Source of the values, on the device of the parameters.
        """
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(0, 1, generator=generator)
            elif isinstance(module, nn.Conv2d):
                gain = 0.8 if module is self.decoder.conv_out else 1.0
                std = gain / math.sqrt(module.weight[0].numel())
                module.weight.normal_(0, std, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.GroupNorm):
                module.weight.fill_(1)
                module.bias.zero_()

    def load_full_state_dict(self, state: Mapping[str, Tensor], *, assign: bool = False) -> None:
        """Loads the decoder side of a whole VQ-VAE checkpoint.

        Ignored are exactly the encoder side's keys: `encoder.*`, `quant_conv.*` and
        `quantize.ema_vocab_hit_SV`. A state dict that lacks them loads as well.

        Args:
            state: State dict of the whole VQ-VAE, or of this module.
            assign: Keep the tensors of `state` instead of copying their values.

        Raises:
            ModelError: If a key of the decoder side is missing, has another shape, or is unknown.
        """
        found = {key: value for key, value in state.items() if not _is_encoder_side(key)}
        problems = list(_mismatches(self.state_dict(), found))
        if problems:
            shown = "\n  ".join(problems[:8] + (["..."] if len(problems) > 8 else []))
            raise ModelError(
                f"{len(problems)} keys do not fit a VQ-VAE of vocab_size={self.vocab_size}, "
                f"z_channels={self.z_channels}, ch={self.ch}; pass the state dict of VAR's VQ-VAE "
                f"(vae_ch160v4096z32.pth), or build with the sizes that it was trained with:\n"
                f"  {shown}"
            )
        self.load_state_dict(found, strict=True, assign=assign)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Self:
        """Returns the decoder side of a whole VQ-VAE checkpoint, in eval mode and of its sizes.

        The tensors of `state` become the parameters; they do not require gradients.

        Args:
            state: State dict of the whole VQ-VAE, or of this module.

        Raises:
            ModelError: If `state` is not the state dict of such a VQ-VAE; what is missing,
                unexpected or of another shape is named.
        """
        try:
            vocab_size, z_channels = state["quantize.embedding.weight"].shape
            (ch,) = state["decoder.norm_out.weight"].shape
        except (KeyError, ValueError) as error:
            raise ModelError(
                f"the state dict of VAR's VQ-VAE has a codebook, quantize.embedding.weight (V, "
                f"Cvae), and a decoder, decoder.norm_out.weight (C,); found {len(state)} keys "
                f"without them: {', '.join(list(state)[:4])}. Pass the contents of "
                f"vae_ch160v4096z32.pth"
            ) from error
        phis = sum(
            key.startswith("quantize.quant_resi.qresi_ls.") and key.endswith(".weight")
            for key in state
        )
        with torch.device("meta"):
            vae = cls(vocab_size=vocab_size, z_channels=z_channels, ch=ch, phis=max(phis, 1))
        vae.load_full_state_dict(state, assign=True)
        return vae.eval().requires_grad_(False)


class VQVAE(VQVAEDecoder):
    """The whole multi-scale VQ-VAE, with the encoder from an image to features.

    Names and shapes are those of the published checkpoint.

    Args:
        **sizes: Those of `VQVAEDecoder`.

    Example:
        >>> vae = VQVAE(vocab_size=16, z_channels=8, ch=32)
        >>> [tuple(ids.shape) for ids in vae.encode(torch.zeros(1, 3, 64, 64), (1, 2, 4))]
        [(1, 1), (1, 4), (1, 16)]

    Source: VAR, arXiv 2404.02905, section 3.2 and algorithm 1.
    """

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.encoder = Encoder(self.z_channels, self.ch, self.pyramid)
        self.quant_conv = nn.Conv2d(self.z_channels, self.z_channels, kernel_size=3, padding=1)

    def features(self, images: Tensor, scales: Sequence[int]) -> Tensor:
        """Returns unquantized features, (B, Cvae, H, W) with H = W the side of the last map.

        Args:
            images: (B, 3, rH, rW) in [-1, 1].
            scales: Sides of the token maps.

        Raises:
            ArgumentError: If the images do not have the size that the last token map draws.
        """
        side = self.pyramid.factor * scales[-1]
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, side, side):
            raise ArgumentError(
                f"token maps of sides {tuple(scales)} take images (B, 3, {side}, {side}); found "
                f"{tuple(images.shape)}. Resize or crop them"
            )
        f: Tensor = self.quant_conv(self.encoder(images))
        return f

    @torch.no_grad()
    def encode(self, images: Tensor, scales: Sequence[int]) -> list[Tensor]:
        """Returns the K token maps of images, each int64 (B, h * h).

        Args:
            images: (B, 3, rH, rW) in [-1, 1].
            scales: Sides of the token maps.

        Raises:
            ArgumentError: If the images are of another size.
        """
        f = self.features(images, scales)
        return [token_map.tokens for token_map in self.quantize.quantized(f, scales)]


def _is_encoder_side(key: str) -> bool:
    return key.startswith(_ENCODER_PREFIXES) or key in _ENCODER_KEYS


def _mismatches(asked: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Iterator[str]:
    """Yields a line for each key for which `found` cannot be loaded into `asked`."""
    for key, tensor in asked.items():
        if key not in found:
            yield f"missing     {key} {tuple(tensor.shape)}"
        elif found[key].shape != tensor.shape:
            yield f"other shape {key} {tuple(found[key].shape)}, not {tuple(tensor.shape)}"
    for key in found:
        if key not in asked:
            yield f"unexpected  {key}"
