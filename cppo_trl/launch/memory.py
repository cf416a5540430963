"""GPU memory of a training process, estimated from shapes alone: nothing is loaded, and no GPU is asked.

An estimate of the right order, meant to refuse what cannot fit and to compare layouts. It adds up parts that do not
all peak at the same moment, and leaves out fragmentation and the copy of one tensor that each sync of weights to vLLM
makes. Sizes are bytes unless a name says otherwise; P is the number of parameters, N of processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

GIB = 2**30
SHARDINGS = ("none", "ddp", "zero2", "zero3", "fsdp2")
OVERHEAD = 1.5 * GIB  # CUDA context, NCCL and cuBLAS workspaces: assumed
VLLM_OVERHEAD = 1.5 * GIB  # vLLM's activations and CUDA graphs: assumed
DEEPSPEED_BUCKET = 2 * 5e8 * 2  # two bf16 buckets of DeepSpeed's default 5e8 elements
DEEPSPEED_LIVE = 1e9 * 2  # stage3_max_live_parameters, in bf16
TILE_TOKENS, TILE_VOCABULARY = 4096, 32_768  # of TRL's fused LM head


@dataclass(frozen=True)
class ModelShape:
    """What decides the size of a decoder of Qwen3's kind, dense or mixture of experts.

    Args:
        hidden: width H of the residual stream.
        layers: number of decoder layers L.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of a head.
        feed_forward: inner width I of the feed-forward block, or of one expert.
        vocabulary: rows V of the embedding.
        context: longest sequence, prompt and completion.
        tied: whether the LM head is the embedding.
        experts: experts per layer; 0 for a dense model.
        active_experts: experts per token.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocabulary: int
    context: int
    tied: bool
    experts: int = 0
    active_experts: int = 0

    @property
    def queries(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key (or value) heads."""
        return self.kv_heads * self.head_dim

    @property
    def head(self) -> int:
        """Parameters of the LM head, V H."""
        return self.vocabulary * self.hidden

    @property
    def layer(self) -> int:
        """Parameters of one layer: attention, its norms of queries and keys, feed-forward and router, two norms."""
        attention = 2 * self.hidden * (self.queries + self.keys) + 2 * self.head_dim
        feed_forward = 3 * self.hidden * self.feed_forward
        if self.experts:
            feed_forward = self.experts * (feed_forward + self.hidden)
        return attention + feed_forward + 2 * self.hidden

    @property
    def parameters(self) -> int:
        """Parameters P of the whole model."""
        return self.head * (1 if self.tied else 2) + self.layers * self.layer + self.hidden

    def lora_parameters(self, rank: int, modules: Sequence[str] | str | None) -> int:
        """Parameters of a dense model's LoRA adapters on modules by name, "all-linear", or None for PEFT's default."""
        residual = self.hidden
        widths = {"q_proj": residual + self.queries, "o_proj": residual + self.queries}
        widths |= dict.fromkeys(("k_proj", "v_proj"), residual + self.keys)
        widths |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), residual + self.feed_forward)
        if modules is None:
            modules = ("q_proj", "v_proj")
        elif modules in ("all-linear", ["all-linear"]):
            modules = tuple(widths)
        return self.layers * rank * sum(widths.get(name, 0) for name in modules)


_QWEN3 = {  # name: H, L, heads, kv heads, head dim, I, V, context, tied, experts, active (the models' config.json)
    "Qwen/Qwen3-0.6B": ModelShape(1024, 28, 16, 8, 128, 3072, 151_936, 40_960, True),
    "Qwen/Qwen3-1.7B": ModelShape(2048, 28, 16, 8, 128, 6144, 151_936, 40_960, True),
    "Qwen/Qwen3-4B": ModelShape(2560, 36, 32, 8, 128, 9728, 151_936, 40_960, True),
    "Qwen/Qwen3-8B": ModelShape(4096, 36, 32, 8, 128, 12_288, 151_936, 40_960, False),
    "Qwen/Qwen3-14B": ModelShape(5120, 40, 40, 8, 128, 17_408, 151_936, 40_960, False),
    "Qwen/Qwen3-30B-A3B": ModelShape(2048, 48, 32, 4, 128, 768, 151_936, 40_960, False, 128, 8),
}
MODEL_SHAPES = _QWEN3 | {f"{name}-Base": replace(shape, context=32_768) for name, shape in _QWEN3.items()}
"""Shapes that are known without the Hub."""


@dataclass(frozen=True)
class Layout:
    """How a model is laid over processes, one GPU each: their number and one of `SHARDINGS`."""

    processes: int = 1
    sharding: str = "none"

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ValueError(f"num_processes must be >= 1; got {self.processes}.")

    @property
    def shards_weights(self) -> bool:
        """Whether a process holds only its share of the weights."""
        return self.sharding in ("zero3", "fsdp2")


@dataclass(frozen=True)
class Workload:
    """What one process computes.

    Args:
        rows: responses in a micro-batch.
        rollout_rows: responses of a rollout that this process keeps.
        prompt_tokens: tokens of the longest prompt.
        completion_tokens: tokens of the longest completion.
        weight_bytes: bytes of a stored weight: 4 (fp32, computed in 16 bits by autocast) or 2.
        lora_parameters: trainable parameters of the adapters; 0 where all weights are trained.
        checkpointing: whether activations are computed again in the backward pass.
        fp32_head: whether the LM head computes in fp32.
        topk: tokens kept per position for a Top-K estimator; 0 for a binary one.
    """

    rows: int
    rollout_rows: int
    prompt_tokens: int
    completion_tokens: int
    weight_bytes: int = 4
    lora_parameters: int = 0
    checkpointing: bool = True
    fp32_head: bool = True
    topk: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of the longest sequence."""
        return self.prompt_tokens + self.completion_tokens


def model_states(shape: ModelShape, layout: Layout, work: Workload) -> dict[str, float]:
    """Weights, gradients, AdamW's two moments, communication buckets, and copies of weights that an update makes.

    One process and DDP hold the first three in fp32 (16 P); DDP's buckets are one more copy of the gradients; autocast
    keeps 16-bit copies of the matrices during a forward pass. DeepSpeed computes with bf16 weights and gradients (2 P
    each) beside fp32 weights and moments (12 P / N): ZeRO-2 holds all the weights and 1/N of the gradients, ZeRO-3
    1/N of both. FSDP2 shards the fp32 states (16 P / N) and holds two layers and the embeddings in bf16 as it goes.
    With LoRA only the adapters have gradients and moments, all fp32.
    """
    total, shards = shape.parameters, layout.processes
    trained = work.lora_parameters or total
    adapters, sharding = 4.0 * work.lora_parameters, layout.sharding
    deepspeed = sharding in ("zero2", "zero3")
    frozen_head = 2.0 * shape.head if work.weight_bytes == 2 and work.fp32_head and not deepspeed else 0.0
    stored = work.weight_bytes * total + frozen_head + adapters
    if deepspeed:
        weights = 2.0 * (total + work.lora_parameters) / (shards if sharding == "zero3" else 1)
        gradients, optimizer = 2.0 * trained / shards, 12.0 * trained / shards
        buckets = min(DEEPSPEED_BUCKET, 4.0 * trained)
        copies = min(DEEPSPEED_LIVE, 2.0 * total) if sharding == "zero3" else 0.0
    elif sharding == "fsdp2":
        weights, gradients, optimizer = stored / shards, 4.0 * trained / shards, 8.0 * trained / shards
        buckets, copies = 0.0, 2.0 * (2 * shape.layer + shape.head * (1 if shape.tied else 2))
    else:
        weights, gradients, optimizer = stored, 4.0 * trained, 8.0 * trained
        buckets = 4.0 * trained if sharding == "ddp" else 0.0
        copies = 2.0 * shape.layers * shape.layer if work.weight_bytes == 4 else 0.0
    kept = {"weights": weights, "gradients": gradients, "optimizer": optimizer, "buckets": buckets}
    return kept | {"gathered or cast weights": copies}


def layer_activations(shape: ModelShape, residual_bytes: int) -> float:
    """What autograd saves in one layer for one token.

    The coefficients were read off a Qwen3 layer of transformers 5.23 under bf16 autocast, by autograd's own hooks;
    attention is fused (its weights are never held).
    """
    feed_forward = 8 * shape.feed_forward
    if shape.experts:  # every token is copied to its experts, whose products keep the residual stream's precision
        feed_forward = (feed_forward + 4 * shape.hidden) * shape.active_experts * residual_bytes // 2
    of_width = 26 if residual_bytes == 4 else 16
    return of_width * shape.hidden + 10 * (shape.queries + shape.keys) + feed_forward


def activations(shape: ModelShape, layout: Layout, work: Workload) -> float:
    """Saved activations of a micro-batch.

    With gradient checkpointing: the input of every layer, and one layer in full. The residual stream is fp32 only
    where autocast meets fp32 weights.
    """
    residual = 4 if work.weight_bytes == 4 and layout.sharding in ("none", "ddp") else 2
    tokens = work.rows * work.tokens
    layer = layer_activations(shape, residual)
    if not work.checkpointing:
        return tokens * shape.layers * layer
    return tokens * (shape.layers * shape.hidden * residual + layer)


def fused_head(shape: ModelShape, layout: Layout, work: Workload) -> float:
    """TRL's fused LM head: hidden states of completions and their gradient, a tile of logits, its rows of the head.

    Logits are never held for a whole response. The gradient of a trained head is one fp32 copy of it, a sharded head
    is gathered.
    """
    precision = 4 if work.fp32_head else 2
    tokens = work.rows * work.completion_tokens
    hidden = tokens * shape.hidden * (precision + 4)
    tile = min(tokens, TILE_TOKENS) * TILE_VOCABULARY * precision + TILE_VOCABULARY * shape.hidden * precision
    gradient = 0 if work.lora_parameters else 4 * shape.head
    gathered = 4 * shape.head if layout.shards_weights else 0
    return float(hidden + tile + gradient + gathered)


def kept_rollout(work: Workload) -> float:
    """The rollout until its last update: ids and masks (int64), log-probs (fp32), Top-K ids and log-probs."""
    per_token = 4 + (8 * (work.topk + 1) if work.topk else 0)
    return float(work.rollout_rows * (16 * work.tokens + per_token * work.completion_tokens))


def kv_bytes(shape: ModelShape, precision: int = 2) -> int:
    """Keys and values of one token in all layers."""
    return 2 * shape.layers * shape.keys * precision


def generation(shape: ModelShape, layout: Layout, work: Workload) -> float:
    """Transformers' generation of a whole rollout at once: its KV cache, the logits of a step and two copies of them.

    ZeRO-3 also gathers all the weights for it.
    """
    cache = work.rollout_rows * work.tokens * kv_bytes(shape, work.weight_bytes)
    gathered = 2 * shape.parameters if layout.sharding == "zero3" else 0
    return float(cache + 3 * work.rollout_rows * shape.vocabulary * 4 + gathered)


def vllm_minimum(shape: ModelShape, tensor_parallel: int, tokens: int) -> float:
    """The least that one vLLM process needs: its share of the bf16 weights and of the KV cache of one response."""
    cache = tokens * kv_bytes(shape) / min(tensor_parallel, shape.kv_heads)
    return 2.0 * shape.parameters / tensor_parallel + cache + VLLM_OVERHEAD


@dataclass(frozen=True)
class Memory:
    """Bytes of one process by part; the parts of ``engine`` are vLLM's, or those of transformers' generation.

    Args:
        states: as `model_states` gives them.
        update: activations and the fused head.
        rollout: the kept rollout.
        engine: what generating takes.
        engine_stays: whether it is held during updates too (a colocated vLLM without sleep mode).
    """

    states: dict[str, float]
    update: dict[str, float]
    rollout: float
    engine: float
    engine_stays: bool

    @property
    def update_peak(self) -> float:
        """While a micro-batch is trained."""
        engine = self.engine if self.engine_stays else 0.0
        return sum(self.states.values()) + sum(self.update.values()) + self.rollout + engine + OVERHEAD

    @property
    def rollout_peak(self) -> float:
        """While responses are generated: no gradients, no activations."""
        held = sum(self.states[name] for name in ("weights", "optimizer", "buckets"))
        return held + self.rollout + self.engine + OVERHEAD

    @property
    def peak(self) -> float:
        """The larger of the two."""
        return max(self.update_peak, self.rollout_peak)


def estimate(
    shape: ModelShape, layout: Layout, work: Workload, *, engine: float | None = None, engine_stays: bool = False
) -> Memory:
    """Add the parts up; ``engine`` is vLLM's share of this GPU, None for transformers' generation."""
    return Memory(
        states=model_states(shape, layout, work),
        update={
            "activations": activations(shape, layout, work),
            "fused LM head": fused_head(shape, layout, work),
        },
        rollout=kept_rollout(work),
        engine=generation(shape, layout, work) if engine is None else engine,
        engine_stays=engine_stays,
    )
