"""Settings of the training loop: plain dataclasses, free of heavy imports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from training.durations import parse_duration


@dataclass
class ParameterRule:
    """What one group of parameters gets that is its own."""

    match: str = ""
    """Regular expression for the whole name of a parameter, as the model calls it."""
    group: Literal["", "experts", "phi", "scale"] = ""
    """In the place of `match`, parameters of all routed layers of both towers: the experts' kernels
    and biases; Phi, or what other routers have in its place; the scales of Soft MoE routers."""
    lr: float = 1.0
    """Factor on the learning rate."""
    weight_decay: float | None = None
    """Decay of every parameter that matches; null leaves `optimizer.weight_decay` to kernels and
    none to what is never decayed unless told so."""
    freeze: bool = False
    """Do not train these parameters."""


@dataclass
class OptimizerConfig:
    """Biases, norms, position embeddings, Soft MoE's slots and the logit scale and bias are not
    decayed unless a rule says so."""

    kind: Literal["adamw", "adafactor", "lion", "muon"] = "adamw"
    """torch's AdamW and Adafactor, timm's Lion and Muon. Muon turns matrices; everything else
    (expert banks, convolutions, embeddings, vectors) is AdamW's, at the same learning rate."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.05
    """Decoupled decay, multiplied by the learning rate (torch's meaning)."""
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    lr_factors: dict[str, float] = field(default_factory=dict)
    """Factors on the learning rate by regular expression; the first that matches the whole name of
    a parameter counts, and every expression must match one. `{"head.*": 10}` suits a short run:
    the reference's zero-initialised head otherwise holds the rest back."""
    rules: list[ParameterRule] = field(default_factory=list)
    """In the place of `lr_factors`: the first rule that matches a parameter holds for it. Every
    trained parameter needs a rule, and every rule a parameter; `{match: ".*"}` takes the rest."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""


@dataclass
class ScheduleConfig:
    """Learning rate over steps: linear warm-up, then `kind`. Lengths are steps, or words such as
    `2 epochs` or `1M samples`."""

    kind: Literal["cosine", "rsqrt", "linear", "constant"] = "cosine"
    """rsqrt is the paper's: peak / sqrt(1 + t / timescale), then a linear cooldown to zero."""
    warmup_steps: int | str = 0
    timescale: int = 10_000
    """Steps after which rsqrt has fallen to peak / sqrt(2)."""
    cooldown_steps: int | str = 0
    """Last steps of rsqrt and constant, over which the rate falls linearly to zero. It may branch
    off any checkpoint: resume that in a new run directory, with `train.steps` so many later."""
    final_fraction: float = 0.0
    """Share of the peak at which cosine and linear end."""

    def __post_init__(self) -> None:
        _check_words(self, "schedule", ("warmup_steps", "cooldown_steps"))


@dataclass
class TrainConfig:
    """The loop itself. `steps` and what is done every so often are numbers of steps, or words such
    as `3 epochs`, `1.2M samples` or `500 steps`."""

    steps: int | str = 1000
    """Length of the run: optimizer steps, or a duration in words; a time, such as `2 hours`, is
    converted when the first steps have shown how long one takes."""
    max_time: str | None = None
    """Stop after this time, such as `11.5 hours`, with a checkpoint to go on from."""
    stall_limit: str = "30 min"
    """Longest wait for a batch, and longest step; a run that stands still ends with a message."""
    batch_size: int = 256
    """Samples per step, over all processes."""
    accumulation: int = 1
    """Parts into which each process splits its share of a batch, to save memory; gradients stay
    those of the whole batch. Contrastive training pays with a second forward pass."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """tf32 and fp16 need a GPU; tf32 rounds the factors of fp32 products to ten bits."""
    compile: str = ""
    """Backend of torch.compile, such as `inductor`; empty is off. Steps whose routing is logged run
    uncompiled, because compiled code does not say what routers do."""
    gradient_checkpointing: bool = False
    """Compute activations of each block again in the backward pass, to save memory."""
    ema_decay: float = 0.0
    """Share of the averaged weights that each step keeps, such as 0.9999; 0 is off. Early steps
    keep less."""
    ema_evaluate: bool = True
    """Also evaluate the averaged weights; their figures begin with `ema/`."""
    ema_export: bool = False
    """Checkpoints open with the averaged weights; those in training lie beside them."""
    skip_updates: int = 0
    """Updates in a row with a loss or gradient that is not finite to leave out before the run
    stops; 0 stops at the first. Under fp16 the gradient scaler leaves them out by itself."""
    spike_sigmas: float = 0.0
    """Also leave out updates whose loss or gradient norm lies so many standard deviations above
    the mean of the last 128; 6 is usual, 0 is off."""
    expert_parallel: int = 1
    """Processes that share one copy of the experts, each with an equal part (docs/scaling.md); must
    divide the number of processes and the experts of every routed layer."""
    fsdp: bool = False
    """Divide all parameters among all processes, block by block (docs/scaling.md); the same as
    `accelerate launch --use_fsdp --fsdp_version 2`."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    log_routing: bool = True
    """Lines also say what the routers of the image encoder do (`routing/...`), which is measured
    in the steps that are logged only: each process's share of the batch, then the mean."""
    eval_every: int | str = 0
    """Steps between evaluations; 0 evaluates only at the end."""
    save_every: int | str = 1000
    """Steps between checkpoints; the end is always saved, 0 saves nothing before it."""
    keep_last: int = 2
    """Newest checkpoints to keep."""
    keep_every: int | str = 0
    """Also keep the checkpoints of every so many steps for good, to branch off; 0 keeps none."""
    keep_best: str = ""
    """Also keep the checkpoint with the largest value of a figure of the evaluation, such as
    `val/acc1`, or with a minus before it the smallest; every evaluation is then saved."""
    save_in_background: bool = False
    """Copy what is saved to the CPU's memory and write it while training goes on."""
    tensorboard: bool = False
    """Also write TensorBoard event files to the run directory."""
    trackers: list[Literal["wandb", "trackio", "mlflow", "swanlab"]] = field(default_factory=list)
    """Also send figures there, through Accelerate."""
    sample_sheets: bool = True
    """Draw the first batches, as the model gets them, into `samples/` and for trackers that take
    pictures (TensorBoard, wandb, swanlab)."""
    peak_tflops: float = 0.0
    """What a device can do at most in the precision of the run, for `tflops` and `mfu`; 0 looks it
    up for some GPUs."""
    threads: int | None = None
    """CPU threads of each process; null chooses from the cores that are there."""

    def __post_init__(self) -> None:
        _check_words(self, "train", ("steps", "eval_every", "save_every", "keep_every"))


def _check_words(config: Any, group: str, names: tuple[str, ...]) -> None:
    """Raise ValueError where text is no duration."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, str):
            parse_duration(value, f"{group}.{name}")
