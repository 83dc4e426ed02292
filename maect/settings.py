"""Settings of data, models, stages and evaluations: types, defaults, units and limits.

Importing this module imports neither torch nor Ray: the planner reads it to check a suite file
and to compute keys. Defaults are the published MAE-CT values (arXiv 2304.10520 and its code)
where there are any. A field that a stage's result depends on belongs here, because everything
here is part of the stage's key; what does not change a result (paths, worker counts, logging)
must not be.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
NonNegativeInt = Annotated[int, Field(ge=0)]


class Settings(BaseModel):
    """Base of all settings: immutable, strict about types, unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def resolved(self) -> dict[str, Any]:
        """Return all values, defaults included, as plain JSON data (what goes into a key)."""
        return self.model_dump(mode="json")

    @classmethod
    def parse(cls, data: Any) -> Self:
        """Return settings from plain JSON data. Raises pydantic's ValidationError.

        Through JSON text, where a list may stand for a tuple while all else stays strict.
        """
        return cls.model_validate_json(json.dumps(data))


# ---------------------------------------------------------------------------------------- data


class DataSettings(Settings):
    """Which images. Splits are the committed ones of the data set; see `maect.datasets`."""

    #: a named set, or `image_folder` and `parquet` for images of one's own
    name: Literal["digits", "fashion_mnist", "cifar10", "cifar100", "image_folder", "parquet"]
    #: folder of `image_folder` or `parquet`; the others live under the data directory
    path: str | None = None
    #: "local": each machine first copies an `image_folder` to a disk of its own; changes no result
    stage: Literal["local"] | None = None
    #: side of the images given to the encoder, pixels
    image_size: PositiveInt = 224
    #: images in the training split, needed to plan `image_folder` and `parquet` without the data
    train_images: PositiveInt | None = None
    #: of the same use
    classes: PositiveInt | None = None
    #: training images set apart to choose settings on, 0: none; null: those of the committed split,
    #: of a folder or shards the 4 % that their checksums say
    selection: NonNegativeInt | None = None
    #: folder of published lists of labelled images for low-shot evaluations of an `image_folder`;
    #: see `maect.datasets.lists`
    low_shot: str | None = None
    #: share of unreadable training images above which a stage fails (never any in a test split)
    max_broken: Share = 0.001

    @model_validator(mode="after")
    def _paths(self) -> Self:
        on_disk = self.name in ("image_folder", "parquet")
        if on_disk and self.path is None:
            raise ValueError(f"data '{self.name}' needs a path")
        if not on_disk and self.path is not None:
            raise ValueError(f"data '{self.name}' takes no path; it lives in the data directory")
        if self.low_shot is not None and self.name != "image_folder":
            raise ValueError("lists of files (low_shot) go with data 'image_folder' only")
        if self.stage is not None and self.name != "image_folder":
            raise ValueError(
                "stage 'local' goes with data 'image_folder' only; other data lie in a few large "
                "files of the data directory"
            )
        return self


# --------------------------------------------------------------------------------------- model

#: encoder sizes: (dim, depth, heads), as in ViT, DeiT and MAE
SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}


class ModelSettings(Settings):
    """ViT encoder and MAE decoder. `size` sets dim, depth and heads; each can be overridden."""

    #: sets dim, depth and heads; `custom` sets none
    size: Literal["tiny", "small", "base", "large", "huge", "custom"] = "base"
    #: side of a patch, pixels; divides image_size
    patch_size: PositiveInt = 16
    #: width of the encoder's tokens, a multiple of 4 and of heads
    dim: PositiveInt | None = None
    #: blocks of the encoder
    depth: PositiveInt | None = None
    #: attention heads of the encoder
    heads: PositiveInt | None = None
    #: hidden units of a block's MLP over its width, encoder and decoder
    mlp_ratio: Positive = 4.0
    #: width of the decoder's tokens, a multiple of 4 and of decoder_heads
    decoder_dim: PositiveInt = 512
    #: blocks of the decoder
    decoder_depth: PositiveInt = 8
    #: attention heads of the decoder
    decoder_heads: PositiveInt = 16
    #: features for heads and evaluations: class token or mean of the patch tokens
    pool: Literal["cls", "mean"] = "mean"

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        if self.size == "custom":
            missing = [n for n in ("dim", "depth", "heads") if getattr(self, n) is None]
            if missing:
                raise ValueError(f"size 'custom' needs {', '.join(missing)}")
        else:
            for name, value in zip(("dim", "depth", "heads"), SIZES[self.size], strict=True):
                if getattr(self, name) is None:
                    object.__setattr__(self, name, value)
        for width, heads, what in (
            (self.dim, self.heads, "dim"),
            (self.decoder_dim, self.decoder_heads, "decoder_dim"),
        ):
            if width is None or heads is None or width % heads:
                raise ValueError(f"{what} {width} is not a multiple of its {heads} heads")
            if width % 4:
                raise ValueError(f"{what} {width} is not a multiple of 4 (sin-cos positions)")
        return self


class FeatureSettings(Settings):
    """Which of an encoder's tokens an evaluation reads."""

    #: after this block, counted from 0 or, below 0, from the end; before any norm; several give
    #: numbered metrics; null: after the last block and the final norm
    block: int | list[int] | Literal["all"] | None = None
    #: with `block`: the final norm follows there, too
    norm: bool = False
    #: class token, mean of the patch tokens, or both side by side; null: the model's own
    pool: Literal["cls", "mean", "both"] | None = None

    @model_validator(mode="after")
    def _once(self) -> Self:
        if isinstance(self.block, list) and (
            not self.block or len({*self.block}) < len(self.block)
        ):
            raise ValueError(f"block {self.block} should name blocks, each once")
        if self.norm and self.block is None:
            raise ValueError("norm goes with block; without, the final norm follows anyway")
        return self

    def blocks(self, depth: int) -> int | list[int] | None:
        """Return `block` counted from 0 and `all` written out for an encoder of `depth` blocks.

        A block that there is not stays outside of 0 to `depth` - 1.
        """
        if self.block == "all" or self.block is None:
            return None if self.block is None else list(range(depth))
        if isinstance(self.block, int):
            return self.block + depth * (self.block < 0)
        return [block + depth * (block < 0) for block in self.block]


class NumericsSettings(Settings):
    """What changes the digits of a result without changing the method; part of every key, apart
    from what changes none."""

    #: `bf16`: autocast, weights stay fp32; `fp64`: for comparisons
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    #: instructions of a CPU's kernels: `native`, the best that each machine has; `avx2`, the same
    #: on every x86-64 machine, so that bits travel from one to the other
    isa: Literal["native", "avx2"] = "native"
    #: with `isa`, the class of processors among which bits are equal; the planner fills it in
    processors: str | None = None
    #: intra-op threads of each worker
    threads: PositiveInt = 1
    #: logical shards of the global batch. 1: each worker takes its share in one piece (`fast`).
    #: S > 1: S fixed pieces, summed in one fixed tree, bitwise equal on any worker count that
    #: divides S (`exact`)
    shards: PositiveInt = 1
    #: of `fp32`: let a GPU's matrix products round their factors to 10 bits, which is faster
    tf32: bool = False
    #: compile the blocks of encoder and decoder
    compile: bool = False
    #: recompute the encoder's activations in the backward pass to save memory. Without `compile` it
    #: changes no bit and is in no key
    checkpoint_activations: bool = False

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.shards & (self.shards - 1):
            raise ValueError(f"shards {self.shards} is not a power of two")
        if self.tf32 and self.precision != "fp32":
            raise ValueError(f"tf32 is a way to compute fp32, precision is {self.precision}")
        return self


# -------------------------------------------------------------------------------- augmentation


class ViewSettings(Settings):
    """One augmented view; operators apply in the order of the fields (the official order)."""

    #: area of the random resized crop as a share of the image; null: resize and centre crop
    crop_scale: tuple[float, float] | None = (0.08, 1.0)
    #: width over height of the crop
    crop_ratio: tuple[float, float] = (0.75, 4.0 / 3.0)
    #: probability of a horizontal flip
    flip: Share = 0.5
    #: probability of colour jitter
    jitter: Share = 0.0
    #: strength of the jitter: factors from 1 - strength to 1 + strength
    brightness: NonNegative = 0.4
    #: strength of the jitter, likewise
    contrast: NonNegative = 0.4
    #: strength of the jitter, likewise
    saturation: NonNegative = 0.2
    #: strength of the jitter: shift as a share of the colour circle
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.1
    #: probability of Gaussian blur
    blur: Share = 0.0
    #: standard deviation of the blur, pixels of the cropped image
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    #: probability that colours are dropped
    grey: Share = 0.0
    #: probability that bright values are inverted
    solarise: Share = 0.0
    #: threshold of solarise on the 0-255 scale
    solarise_threshold: Annotated[int, Field(ge=0, le=255)] = 128

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for name in ("crop_scale", "crop_ratio", "blur_sigma"):
            pair = getattr(self, name)
            if pair is not None and not 0.0 < pair[0] <= pair[1]:
                raise ValueError(f"{name} {list(pair)} is not a range, low first")
        if self.crop_scale is not None and self.crop_scale[1] > 1.0:
            raise ValueError(f"crop_scale {list(self.crop_scale)} is more than the whole image")
        return self


class AugmentSettings(Settings):
    """A pipeline: one view (MAE) or two (NNCLR), the second differing from the first by `view1`."""

    #: the first view
    view0: ViewSettings = ViewSettings()
    #: null: the same as view0
    view1: ViewSettings | None = None

    def views(self, count: int) -> list[ViewSettings]:
        """Return the settings of the first `count` views."""
        return [self.view0, self.view1 or self.view0][:count]


# ---------------------------------------------------------------------------- training stages


class ScheduleSettings(Settings):
    """Length, batch and AdamW of a training stage."""

    #: exactly one of the two; an epoch drops its last incomplete batch
    steps: PositiveInt | None = None
    #: in place of steps
    epochs: PositiveInt | None = None
    #: global batch, images
    batch_size: PositiveInt = 1024
    #: exactly one of the two: peak rate, or base rate scaled by views x batch_size / 256: two views
    #: of each image in head initialisation and tuning, `views` crops in MAE pretraining
    lr: Positive | None = None
    #: in place of lr
    base_lr: Positive | None = None
    #: of AdamW
    betas: tuple[float, float] = (0.9, 0.95)
    #: of AdamW; biases and norms have none
    weight_decay: NonNegative = 0.05
    #: linear warm-up, at most one of the three: a share of the steps, epochs, or steps
    warmup: Share | None = None
    #: in place of warmup
    warmup_epochs: NonNegative | None = None
    #: in place of warmup
    warmup_steps: NonNegativeInt | None = None
    #: largest L2 norm of the gradient; null: no clipping
    clip_grad: Positive | None = None
    #: decay of the encoder's moving average used for evaluation; null: none
    encoder_ema: Share | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        for one, other in (("steps", "epochs"), ("lr", "base_lr")):
            if (getattr(self, one) is None) == (getattr(self, other) is None):
                raise ValueError(f"give exactly one of {one} and {other}")
        if sum(w is not None for w in (self.warmup, self.warmup_epochs, self.warmup_steps)) > 1:
            raise ValueError("give at most one of warmup, warmup_epochs and warmup_steps")
        return self

    def _peak(self, own: float | None = None) -> float:
        """Return the peak rate; of `own` where given, in the form (lr or base_lr) of this stage."""
        rate = own or self.lr or self.base_lr or 0.0
        views = getattr(self, "views", 2)
        return rate if self.lr is not None else rate * views * self.batch_size / 256

    def scaled(self, factor: float) -> Self:
        """Return the same stage with its learning rates times `factor`."""
        rates = {name: getattr(self, name, None) for name in ("lr", "base_lr", "head_lr")}
        return self.model_copy(update={n: r * factor for n, r in rates.items() if r is not None})

    def resolve(self, train_images: int, depth: int) -> Self:
        """Return the same stage told in steps, peak rates and frozen blocks.

        For a training split of `train_images` and an encoder of `depth` blocks. A worker computes
        with these numbers only: what it computes with stands in the stage's key.
        """
        an_epoch = max(1, train_images // self.batch_size)
        steps = self.steps if self.steps is not None else (self.epochs or 0) * an_epoch
        if self.warmup_steps is not None:
            warmup = self.warmup_steps
        elif self.warmup_epochs is not None:
            warmup = round(self.warmup_epochs * an_epoch)
        else:
            warmup = round((self.warmup or 0.0) * steps)
        told = {"steps": steps, "lr": self._peak(), "warmup_steps": min(warmup, steps)}
        untold = dict.fromkeys(("epochs", "base_lr", "warmup", "warmup_epochs"))
        return self.model_copy(update=told | untold)


class MAESettings(ScheduleSettings):
    """MAE pretraining: reconstruct the masked patches' pixels."""

    #: crops of each image in every step, all in the loss: 1 in facebookresearch/mae, 2 in MAE-CT's
    #: published recipes
    views: Literal[1, 2] = 1
    #: share of the patches that the encoder does not see
    mask_ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.75
    #: normalise each target patch by its own mean and (unbiased) variance
    norm_pix: bool = True


class HeadStageSettings(ScheduleSettings):
    """A method's head on the frozen encoder."""

    #: of AdamW; biases and norms have none
    weight_decay: NonNegative = 1e-5


class TuningSettings(ScheduleSettings):
    """Tuning of the encoder's upper blocks with a head; a method's own settings extend it."""

    #: peak rate of the head where it differs from the encoder's (`lr`/`base_lr` form as there)
    head_lr: Positive | None = None
    #: weight decay of the head
    head_weight_decay: NonNegative = 1e-5
    #: first blocks kept frozen with the patch embedding and the class token: a share or a count
    frozen: Share | None = 0.5
    #: in place of frozen, and goes before it
    frozen_blocks: NonNegativeInt | None = None
    #: learning rate of a block over that of the next one above
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.65

    def resolve(self, train_images: int, depth: int) -> Self:
        frozen = self.frozen_blocks
        if frozen is None:
            frozen = int((self.frozen or 0.0) * depth)
        changes = {"head_lr": self._peak(self.head_lr), "frozen": None, "frozen_blocks": frozen}
        return super().resolve(train_images, depth).model_copy(update=changes)


class TeacherSettings(TuningSettings):
    """Tuning towards what a moving average of encoder and head says."""

    #: decay of the average at the first step; it rises to 1 along half a cosine
    target_ema: Share = 0.996
    #: the encoder that is evaluated
    evaluate: Literal["student", "teacher"] = "student"

    @model_validator(mode="after")
    def _one_average(self) -> Self:
        if self.evaluate == "teacher" and self.encoder_ema is not None:
            raise ValueError("evaluate 'teacher' and encoder_ema are two averages; keep one")
        return self


class LocalViews(Settings):
    """Small crops beside the two views (multi-crop, arXiv 2006.09882), for the student alone."""

    #: smaller crops of each image beside the two views
    local_views: NonNegativeInt = 0
    #: their side, pixels
    local_size: PositiveInt | None = None
    #: their area as a share of the image
    local_scale: tuple[float, float] = (0.05, 0.25)
