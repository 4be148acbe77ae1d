"""A timm VisionTransformer whose chosen blocks carry a routed layer instead of an MLP.

The arrangement is that of google-research/vmoe (`projects/soft_moe/configs/common.py`): no class
token, learned position embedding, LayerNorm on queries and keys with a scale and no bias, tanh
GELU, LayerNorm epsilon 1e-6, mean pooling after the final norm, zero head kernel with bias
-log(classes). Everything timm expects of a model (feature extraction, input size changes, layer
groups, patch dropout, gradient checkpointing) is inherited.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import Attention, DropPath, LayerNorm, Mlp, lecun_normal_
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from encoders.experts import ExpertMLP
from encoders.routed_layer import RoutedLayer
from encoders.routers import build_routed_layer, router_class

LAYER_NORM_EPS = 1e-6
EVERY = re.compile(r"every_([1-9]\d*)(?:_last_([1-9]\d*))?")


class BiasFreeQKNormAttention(Attention):
    """timm's attention with LayerNorm (scale, no bias) over the head width of q and k."""

    def __init__(self, dim: int, **kwargs: Any) -> None:
        kwargs["norm_layer"] = partial(LayerNorm, eps=LAYER_NORM_EPS, bias=False)
        super().__init__(dim, **kwargs)


# What google-research/vmoe builds, in timm's words; every entry can be overridden.
ARRANGEMENT: dict[str, Any] = {
    "class_token": False,
    "global_pool": "avg",
    "fc_norm": False,
    "qk_norm": True,
    "norm_layer": partial(LayerNorm, eps=LAYER_NORM_EPS),
    "act_layer": "gelu_tanh",
    "attn_layer": BiasFreeQKNormAttention,
}


class SoftMoEVisionTransformer(VisionTransformer):
    """Vision transformer with a routed layer in some blocks; images (B, 3, H, W) in.

    Args:
        moe_blocks: which blocks are routed. An int N means the last N (the paper routes the second
            half); a sequence holds indices; "every_2" means blocks 1, 3, 5, ... and
            "every_2_last_3" the last 3 of those (the two placements of V-MoE, arXiv 2106.05974);
            none gives the dense twin.
        router: a name in `encoders.routers.ROUTERS`.
        num_experts: experts per routed block.
        slots_per_expert: slots per expert; the layer's default, 1, when None.
        capacity_factor: instead of slots_per_expert, all slots as a multiple of the tokens (see
            `encoders.soft_moe.slots_for_capacity`); routers with a capacity get it as it is. The
            number of slots stays when the input size changes later.
        router_options: further arguments of the layer, by name, such as `noise_std`.
        routed_drop_path_rate: how often a sample leaves out a routed layer in training (stochastic
            depth of its residual branch), alike in all routed blocks; what `drop_path_rate` gives
            their blocks, which grows with depth, when None. Attention keeps that in any case.
        pos_embed: "learn", "none", or "sincos2d" for fixed sines and cosines of both coordinates,
            which are no parameter and which a class token does not get.
        pos_embed_std: standard deviation of a learned position embedding at the start. The
            reference's 0.02 hides positions from the first steps: short runs on small data want
            them visible.
        representation_size: width of a tanh layer between pooling and head; none when None.
        **kwargs: timm's VisionTransformer arguments (img_size, patch_size, embed_dim, depth,
            num_heads, mlp_ratio, num_classes, class_token, drop_path_rate, patch_drop_rate, ...).

    Raises:
        ValueError: a block or router that does not exist, an option or size the layer refuses.
    """

    def __init__(
        self,
        *,
        moe_blocks: int | str | Sequence[int] = (),
        router: str = "soft",
        num_experts: int = 128,
        slots_per_expert: int | None = None,
        capacity_factor: float | None = None,
        router_options: dict[str, Any] | None = None,
        routed_drop_path_rate: float | None = None,
        pos_embed: str = "learn",
        pos_embed_std: float = 0.02,
        representation_size: int | None = None,
        depth: int = 12,
        weight_init: str = "",
        **kwargs: Any,
    ) -> None:
        routed = resolve_moe_blocks(moe_blocks, depth)
        router_class(router)  # refuses unknown names, also where no block is routed
        options = merge_options(
            router_options or {}, slots_per_expert=slots_per_expert, capacity_factor=capacity_factor
        )
        if routed_drop_path_rate is not None and not 0 <= routed_drop_path_rate < 1:
            raise ValueError(f"routed_drop_path_rate={routed_drop_path_rate} must be in [0, 1)")
        if pos_embed not in ("learn", "none", "sincos2d"):
            raise ValueError(f"pos_embed='{pos_embed}': choose learn, none or sincos2d")
        width, heads = kwargs.get("embed_dim", 768), kwargs.get("num_heads", 12)
        if width % heads:
            raise ValueError(f"num_heads={heads} must divide embed_dim={width}")
        if not kwargs.get("dynamic_img_pad"):
            check_grid(kwargs.get("img_size", 224), kwargs.get("patch_size", 16))
        fixed = pos_embed == "sincos2d"
        defaults = ARRANGEMENT | {
            "block_fn": block_factory(
                self, routed, router, num_experts, options, routed_drop_path_rate
            ),
            "no_embed_class": fixed,
        }
        super().__init__(
            depth=depth,
            pos_embed="none" if fixed else pos_embed,
            weight_init="skip",  # only below is everything there that has initial values
            **(defaults | kwargs),
        )
        self.moe_blocks, self.router = routed, router
        self.pos_embed_std, self.fixed_pos_embed = pos_embed_std, fixed
        if fixed:
            self._fix_pos_embed()
            self.register_load_state_dict_post_hook(_restore_positions)
        self.representation: nn.Module = nn.Identity()
        if representation_size is not None:
            self._add_representation(representation_size)
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    def _fix_pos_embed(self) -> None:
        """Make the position embedding of the present grid a buffer that checkpoints leave out."""
        kernel = self.patch_embed.proj.weight
        values = sincos_position_embedding(self.patch_embed.grid_size, self.embed_dim)
        del self.pos_embed
        values = values.to(kernel.device, kernel.dtype)
        self.register_buffer("pos_embed", values, persistent=False)

    def init_non_persistent_buffers(self) -> None:
        """What transformers' wrapper of timm calls once weights are loaded: checkpoints leave the
        fixed position embedding out."""
        if self.fixed_pos_embed:
            self._fix_pos_embed()

    def _add_representation(self, width: int) -> None:
        if width < 1:
            raise ValueError(f"representation_size must be at least 1 or None, got {width}")
        kernel = self.patch_embed.proj.weight
        place = {"device": kernel.device, "dtype": kernel.dtype}
        self.representation = nn.Sequential(nn.Linear(self.embed_dim, width, **place), nn.Tanh())
        self.head_hidden_size = width
        self._fit_head()

    def _fit_head(self) -> None:
        """timm makes heads for the token width; a representation layer may have another one."""
        head, width = self.head, self.head_hidden_size
        if isinstance(head, nn.Linear) and head.in_features != width:
            place = {"device": head.weight.device, "dtype": head.weight.dtype}
            self.head = nn.Linear(width, head.out_features, **place)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Draw the reference's initial values.

        Args:
            mode: one of timm's schemes, not used.
            needs_reset: also redraw what initialises itself on construction (norms, Soft MoE), as
                a model that was materialised from the meta device needs.
        """
        if self.fixed_pos_embed:
            self._fix_pos_embed()
        elif self.pos_embed is not None:
            nn.init.normal_(self.pos_embed, std=self.pos_embed_std)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif needs_reset and isinstance(module, RoutedLayer | ExpertMLP):
                module.init_weights()
            elif needs_reset and callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        for module in self.modules():  # after the loop above: it visits parents before children
            if isinstance(module, Attention):
                # One Xavier draw per projection: the fused kernel has three outputs per input.
                for projection in module.qkv.weight.chunk(3):
                    nn.init.xavier_uniform_(projection)
            elif isinstance(module, Mlp):
                for bias in (module.fc1.bias, module.fc2.bias):
                    if bias is not None:
                        nn.init.normal_(bias, std=1e-6)
        for module in self.representation.modules():
            if isinstance(module, nn.Linear):
                lecun_normal_(module.weight)
        lecun_normal_(self.patch_embed.proj.weight)
        if self.patch_embed.proj.bias is not None:
            nn.init.zeros_(self.patch_embed.proj.bias)
        if isinstance(self.head, nn.Linear):
            nn.init.zeros_(self.head.weight)
            nn.init.constant_(self.head.bias, -math.log(self.num_classes))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameter names without weight decay: position embedding, and what routed layers name."""
        names = set(super().no_weight_decay())
        for prefix, module in self.named_modules():
            if isinstance(module, RoutedLayer):
                names |= {f"{prefix}.{name}" for name in module.no_weight_decay()}
        return names

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Fresh head for `num_classes` classes, or none for 0; see timm."""
        super().reset_classifier(num_classes, global_pool)
        self._fit_head()

    def set_input_size(
        self,
        img_size: tuple[int, int] | None = None,
        patch_size: tuple[int, int] | None = None,
    ) -> None:
        """Change the image size: positions are resampled (or computed anew), slots stay."""
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        if self.fixed_pos_embed:
            self._fix_pos_embed()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, M, d) to logits (B, classes), or to what the head sees."""
        x = self.representation(super().forward_head(x, pre_logits=True))
        return x if pre_logits else self.head(x)


def _restore_positions(model: Any, _: object) -> None:
    """Compute fixed positions after loading: on the meta device there were none to keep."""
    model._fix_pos_embed()


def block_factory(
    model: VisionTransformer,
    routed: Collection[int],
    router: str,
    num_experts: int,
    options: dict[str, Any],
    drop_path_rate: float | None = None,
) -> Callable[..., Block]:
    """What timm calls for each block of `model`, whose patch embedding exists by then."""

    def routed_mlp(in_features: int, hidden_features: int, drop: float, **rest: Any) -> RoutedLayer:
        return build_routed_layer(
            router,
            in_features,
            num_experts,
            hidden_features,
            tokens=model.patch_embed.num_patches + model.num_prefix_tokens,
            dropout=drop,
            device=rest.get("device"),
            dtype=rest.get("dtype"),
            **options,
        )

    def block(depth: int, **rest: Any) -> Block:
        if depth in routed:
            rest["mlp_layer"] = routed_mlp
        made = Block(depth=depth, **rest)
        if depth in routed and drop_path_rate is not None:
            made.drop_path2 = DropPath(drop_path_rate) if drop_path_rate else nn.Identity()
        return made

    return block


def merge_options(options: dict[str, Any], **named: Any) -> dict[str, Any]:
    """Add the named options that are not None; raise ValueError where one is given twice."""
    given = {name: value for name, value in named.items() if value is not None}
    for name in given.keys() & options.keys():
        raise ValueError(
            f"router_options['{name}']={options[name]} repeats an argument of the model that is"
            f" {given[name]}: give one"
        )
    return options | given


def sincos_position_embedding(grid: tuple[int, int], dim: int) -> Tensor:
    """Fixed position embedding (1, h * w, d), float32: sin x, cos x, sin y, cos y, d / 4 each.

    Wavelengths grow geometrically from 2 pi to 20,000 pi, as in MoCo v3 (arXiv 2104.02057) and
    google-research/vmoe (`vmoe/nn/vit_moe.py`).

    Raises:
        ValueError: d is no multiple of 4, or less than 8.
    """
    if dim % 4 or dim < 8:
        raise ValueError(f"embed_dim={dim} must be a multiple of 4 and at least 8 for sincos2d")
    quarter = dim // 4
    frequencies = 10_000.0 ** -(torch.arange(quarter, dtype=torch.float64) / (quarter - 1))
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in (x, y)]
    parts = [function(angle) for angle in angles for function in (torch.sin, torch.cos)]
    return torch.cat(parts, dim=1).unsqueeze(0).float()


def check_grid(image: int | Sequence[int], patch: int | Sequence[int]) -> None:
    """Refuse pictures whose last pixels would be in no patch.

    Raises:
        ValueError: the patch size does not divide the image size.
    """
    images = (image, image) if isinstance(image, int) else image
    patches = (patch, patch) if isinstance(patch, int) else patch
    for pixels, size in zip(images, patches, strict=True):
        if pixels % size:
            near = [str(n) for n in (pixels - pixels % size, pixels + size - pixels % size) if n]
            raise ValueError(
                f"patches of {size} pixels do not divide img_size {pixels}: take"
                f" {' or '.join(near)}, or dynamic_img_pad"
            )


def resolve_moe_blocks(moe_blocks: int | str | Sequence[int], depth: int) -> tuple[int, ...]:
    """Turn "last N", "every_K[_last_N]" or indices into sorted indices, or raise ValueError."""
    if isinstance(moe_blocks, str):
        match = EVERY.fullmatch(moe_blocks)
        step, count = (int(group or 0) for group in match.groups()) if match else (0, 0)
        blocks = tuple(range(step - 1, depth, step)) if step else ()
        if not blocks or count > len(blocks):
            raise ValueError(
                f"moe_blocks='{moe_blocks}' names no blocks of {depth}: write every_K for every"
                f" K-th block (K at most {depth}), or every_K_last_N for the last N of those"
            )
        return blocks[-count:]
    if isinstance(moe_blocks, int):
        if not 0 <= moe_blocks <= depth:
            raise ValueError(f"moe_blocks={moe_blocks}: choose 0 to {depth} of the last blocks")
        return tuple(range(depth - moe_blocks, depth))
    wrong = sorted(set(moe_blocks) - set(range(depth)))
    if wrong:
        raise ValueError(f"moe_blocks {wrong} do not exist: the model has blocks 0 to {depth - 1}")
    return tuple(sorted(set(moe_blocks)))
