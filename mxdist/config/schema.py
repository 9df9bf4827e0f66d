"""Every setting of a run, with its meaning, its unit and its bounds.

One frozen pydantic model per section. Unknown keys are errors (``load`` adds the suggestion). A rule that spans
sections lives in ``Config`` so that it is checked before Ray or torch is imported. The longer rules are in ``layout``
and ``turns``.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from mxdist.config.layout import BLOCK, MACRO_BLOCK, check_engine_layout, check_layout, check_shape
from mxdist.config.turns import check_turns

PositiveSeconds = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]

RecipeName = Literal[
    "bf16",
    "mxfp4",
    "mxfp4_mbs",
    "mxfp4_of",
    "mxfp4_mbs_of",
    "mxfp4_g4",
    "mxfp4_mbs_g4",
    "mxfp4_of_g4",
    "mxfp4_mbs_of_g4",
    "mxfp4_g4_nearest",
]
"""The presets of mxdist/quant/recipe.py, which says what each does; _g4 quantises gradients as well."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RunConfig(Section):
    """What a run is called, how long it is, and which of its checkpoints are kept."""

    name: str = Field("run", pattern=r"^[\w.-]+$", description="Names the default run directory and the loggers' run.")
    dir: Path | None = Field(None, description="Run directory; default runs/<name>-<date>-<time>.")
    seed: int = Field(0, ge=0, description="Every random draw of the run derives from it.")
    steps: PositiveInt = Field(100, description="Reinforcement-learning steps (optimizer updates of one batch).")
    eval_every: int = Field(0, ge=0, description="Evaluate every so many steps besides start and end; 0: only those.")
    checkpoint_every: int = Field(
        0, ge=0, description="Checkpoint every so many steps besides start and end; 0: no more."
    )
    keep_checkpoints: int = Field(2, ge=0, description="Newest checkpoints that are kept; 0 keeps all.")
    keep_every: int = Field(0, ge=0, description="Checkpoints of every so many steps are kept as well; 0: no such.")
    restarts: int = Field(
        3, ge=0, description="Failures of processes to recover from between two checkpoints before the run stops."
    )


class ModelConfig(Section):
    """A Hugging Face checkpoint, or a shape with random initial weights; in Hugging Face's names.

    With ``path`` the shape is read from its config.json (``hf_config``), and a key set here has to say the same.
    ``num_experts`` 0 is a dense model.
    """

    path: str | None = Field(
        None, description="Directory with config.json, safetensors and tokenizer, or a Hugging Face hub name."
    )
    family: Literal["qwen2", "qwen3"] = Field(
        "qwen3", description="qwen2 (also Qwen2.5): biases in q, k and v. qwen3: norms of q and k, and experts if any."
    )
    vocab_size: PositiveInt | None = Field(None, description="Rows of the embedding; null: what the tokenizer has.")
    tie_word_embeddings: bool = Field(False, description="The embedding is the output layer as well.")
    norm_topk_prob: bool = Field(True, description="The probabilities of the chosen experts are scaled to add to 1.")
    hidden_size: PositiveInt = 128
    num_hidden_layers: PositiveInt = 2
    num_attention_heads: PositiveInt = 4
    num_key_value_heads: PositiveInt = 2
    head_dim: PositiveInt = 32
    num_experts: int = Field(8, ge=0)
    num_experts_per_tok: PositiveInt = 2
    moe_intermediate_size: PositiveInt = 64
    intermediate_size: PositiveInt = Field(256, description="Feed-forward width of the dense model.")
    max_position_embeddings: PositiveInt = Field(64, description="Longest context the model has positions for.")
    rope_theta: PositiveFloat = 10_000.0
    rms_norm_eps: PositiveFloat = 1e-6
    initializer_range: PositiveFloat = Field(0.02, description="Standard deviation of the random initial weights.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Of activations and unquantised weights.")

    @model_validator(mode="after")
    def _shape(self) -> "ModelConfig":
        check_shape(self)
        return self


class RecipeOverride(Section):
    """A recipe for some linears. Of several that match a linear the first decides."""

    modules: str = Field(description="Glob over Hugging Face module names; * also matches dots: *.self_attn.*")
    recipe: RecipeName


class EdgeLayers(Section):
    """Decoder layers at either end that stay in bf16, whatever the recipes say."""

    first: int = Field(0, ge=0)
    last: int = Field(0, ge=0)


class ArithmeticData(Section):
    """Sums generated from the seed, with a held-out split no training ever sees."""

    task: Literal["arithmetic"] = "arithmetic"
    digits: int = Field(2, ge=2, le=3, description="Width of both operands and of their sum, zero-padded: 37+25=62.")
    forgotten_carries: Fraction = Field(
        0.65, description="Share of the warm start's worked answers that forget to carry: what the reward must teach."
    )
    eval_problems: PositiveInt = Field(256, description="Held-out problems.")


class Gsm8kData(Section):
    """GSM8K as published: JSON lines with ``question`` and ``answer`` (a worked solution that ends in ``#### n``)."""

    task: Literal["gsm8k"] = "gsm8k"
    train: str = Field(description="Path of train.jsonl, or a Hugging Face dataset name such as openai/gsm8k.")
    eval: str = Field(description="Path of test.jsonl, or a Hugging Face dataset name.")
    eval_problems: PositiveInt = Field(1319, description="Evaluate on the first so many problems.")
    vocab_size: int = Field(2048, ge=300, description="Size of the byte-level BPE vocabulary trained on the data.")
    format_reward: Fraction = Field(0.1, description="Reward for an answer in the asked-for form, right or wrong.")
    template: Literal["plain", "base", "chat"] = Field(
        "plain",
        description="plain: Question and Answer, no word more. base: that after an instruction, for pretrained models. "
        "chat: the chat template of model.path.",
    )
    few_shot: int = Field(0, ge=0, le=64, description="Worked examples before each question, from data.train.")
    chat_arguments: dict[str, bool | int | float | str] = Field(
        {}, description="Further variables of the chat template, such as enable_thinking: false for Qwen3."
    )

    @model_validator(mode="after")
    def _chat_only(self) -> "Gsm8kData":
        if self.chat_arguments and self.template != "chat":
            raise ValueError("chat_arguments are for template=chat alone; leave them out, or set template=chat")
        return self


DataConfig = Annotated[ArithmeticData | Gsm8kData, Field(discriminator="task")]


class WarmStartConfig(Section):
    """Supervised steps on worked answers before reinforcement learning, by the same learner."""

    steps: int = Field(0, ge=0, description="0: none, the model learns from rewards alone.")
    sequences: PositiveInt = Field(256, description="Sequences a step.")
    lr: PositiveFloat = Field(
        2e-3, description="Largest learning rate: a short warm-up, then a cosine to a tenth of it."
    )


class Algorithm(Section):
    """What all algorithms share. The maths of each is one file in mxdist/learner/losses."""

    prompts_per_step: PositiveInt = Field(32, description="Groups of a step.")
    samples_per_prompt: PositiveInt = Field(8, description="Answers to each prompt: the group size.")
    minibatches: PositiveInt = Field(1, description="Optimizer updates made of one rollout batch.")
    tis_cap: PositiveFloat | None = Field(
        2.0,
        description="Cap of the token-level truncated importance weight "
        "pi_learner / pi_rollout; null switches the correction off.",
    )

    @model_validator(mode="after")
    def _splits(self) -> "Algorithm":
        sequences = self.prompts_per_step * self.samples_per_prompt
        if sequences % self.minibatches:
            raise ValueError(
                f"minibatches={self.minibatches} does not divide the {sequences} sequences of a step, "
                f"prompts_per_step * samples_per_prompt; choose a divisor"
            )
        if not isinstance(self, Supervised) and self.samples_per_prompt < 2:
            raise ValueError("samples_per_prompt=1 leaves no group to compare with; use at least 2")
        return self


class Grpo(Algorithm):
    """Group-relative policy optimisation (arXiv 2402.03300) with decoupled clipping: the ratio of new to old policy is
    clipped to [1 - clip_low, 1 + clip_high]."""

    name: Literal["grpo"] = "grpo"
    clip_low: PositiveFloat = 0.2
    clip_high: PositiveFloat = 0.28


class Dapo(Algorithm):
    """DAPO (arXiv 2503.14476): token-level loss, decoupled clipping (as Grpo), dynamic sampling."""

    name: Literal["dapo"] = "dapo"
    clip_low: PositiveFloat = 0.2
    clip_high: PositiveFloat = 0.28
    max_extra_batches: int = Field(
        3, ge=0, description="Batches sampled beyond the first, at most, to replace groups whose rewards are all equal."
    )


class DrGrpo(Algorithm):
    """Dr. GRPO (arXiv 2503.20783): no division by the group's deviation, none by the answer's length."""

    name: Literal["dr_grpo"] = "dr_grpo"
    clip_low: PositiveFloat = 0.2
    clip_high: PositiveFloat = 0.28


class Gspo(Algorithm):
    """GSPO (arXiv 2507.18071): one length-normalised ratio a sequence, clipped as a whole."""

    name: Literal["gspo"] = "gspo"
    clip_low: PositiveFloat = 3e-4
    clip_high: PositiveFloat = 4e-4


class Rloo(Algorithm):
    """REINFORCE with the leave-one-out baseline (arXiv 2402.14740)."""

    name: Literal["rloo"] = "rloo"


class Supervised(Algorithm):
    """Negative log-likelihood of given answers: the warm start. No choice for ``algorithm.name``."""

    name: Literal["supervised"] = "supervised"
    samples_per_prompt: PositiveInt = 1
    tis_cap: None = None


AlgorithmConfig = Annotated[Grpo | Dapo | DrGrpo | Gspo | Rloo, Field(discriminator="name")]


class OptimizerConfig(Section):
    """AdamW. Norms and biases do not decay."""

    lr: PositiveFloat = 1e-6
    warmup_steps: int = Field(0, ge=0, description="Linear warm-up of the learning rate, then constant.")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: PositiveFloat = 1e-8
    weight_decay: float = Field(0.0, ge=0)
    clip_grad: PositiveFloat = Field(1.0, description="Largest global norm of the gradient.")


class LearnerConfig(Section):
    """The processes that train, and how the model is divided over them."""

    backend: Literal["megatron", "deepspeed"] = Field(
        "megatron", description="megatron: any model and layout. deepspeed: dense models, data parallelism with ZeRO."
    )
    ranks: PositiveInt = Field(2, description="Learner processes.")
    zero_stage: Literal[1, 2, 3] = Field(
        1,
        description="deepspeed: what ranks divide instead of holding it all (arXiv 1910.02054). 1: optimizer state, as "
        "megatron does. 2: gradients as well. 3: weights as well.",
    )
    zero_offload: Literal["none", "optimizer", "weights"] = Field(
        "none",
        description="deepspeed: what the CPU's memory holds for the GPU. optimizer: its state, which is updated there. "
        "weights: those as well (zero_stage 3).",
    )
    tensor_parallel: PositiveInt = Field(1, description="Ranks that share every matrix of a layer but the experts'.")
    pipeline_parallel: PositiveInt = Field(1, description="Stages that the layers are divided over.")
    expert_parallel: PositiveInt = Field(2, description="Ranks of a stage that share one set of experts.")
    micro_batch_tokens: PositiveInt = Field(
        4096, description="Tokens of one forward pass of one rank; a sequence longer than that has one of its own."
    )
    recompute: bool = Field(
        False, description="Keep only the input of each layer and compute the layer again in the backward pass."
    )
    port: int = Field(0, ge=0, le=65535, description="Port of the ranks' rendezvous; 0 takes a free one.")
    cpus_per_rank: PositiveFloat = Field(0.5, description="CPUs that Ray reserves for a rank.")
    gpus_per_rank: float = Field(0.0, ge=0, description="GPUs that Ray gives a rank: 0 on a CPU, 1, or a share of one.")


class RolloutConfig(Section):
    """The engines that sample answers (vLLM)."""

    workers: PositiveInt = Field(1, description="Engines.")
    tensor_parallel: PositiveInt = Field(
        1, description="Processes, on a GPU each, that share every matrix of an engine's layers."
    )
    temperature: PositiveFloat = Field(1.0, description="Of sampling in training; evaluation is greedy unless asked.")
    max_new_tokens: PositiveInt = Field(8, description="Tokens after which an answer is cut off.")
    max_context: PositiveInt | None = Field(
        None, description="Prompt and answer together, in tokens; null: model.max_position_embeddings."
    )
    max_lag: int = Field(0, ge=0, description="Learner updates a sampled answer may be behind; 0 is synchronous.")
    max_sequences: PositiveInt = Field(
        256,
        description="Sequences an engine decodes together. With fewer than it is given at once, new ones come in while "
        "others are decoded, and such steps run without CUDA graphs.",
    )
    kv_cache_mib: PositiveInt = Field(
        64,
        description="Keys and values of each process of an engine, in MiB. Sequences that find no room are put off and "
        "what they had is computed again; the metric rollout/preemptions counts that.",
    )
    cuda_graphs: bool = Field(
        True,
        description="On a GPU, record decoding steps when an engine starts, and replay them. False saves seconds of "
        "the start and some GPU memory; every step then waits for its kernels to be launched one by one.",
    )
    sleep: bool = Field(
        False,
        description="Where learner and engine share a GPU: between rollouts the engine frees its KV cache and keeps "
        "its weights in the host's memory.",
    )
    cpus_per_worker: PositiveFloat = Field(0.5, description="CPUs that Ray reserves for an engine.")
    gpus_per_worker: float = Field(
        0.0, ge=0, description="GPUs that Ray gives an engine: 0 on a CPU, a share of one, or rollout.tensor_parallel."
    )


class SyncConfig(Section):
    """How new weights come from the learner to the engines."""

    transport: Literal["auto", "host", "delta", "ipc", "broadcast"] = Field(
        "auto",
        description="ipc: engines copy from buckets that stay on the learner's GPUs, rollout.max_lag + 1 versions of "
        "them (CUDA IPC; GPUs of one host). broadcast: the learner's ranks send such buckets to all engines at once "
        "(NCCL, a GPU for each process; gloo on CPUs). host: through Ray's object store, over any network. delta: as "
        "host, but only blocks of 16 bytes that changed since the version before; learner and engines keep the bytes "
        "of versions to compare with. auto: ipc on a machine where it works, broadcast between machines with whole "
        "GPUs, otherwise host.",
    )
    update: Literal["drained", "in_flight"] = Field(
        "drained",
        description="drained: an engine finishes the batches it was given before. in_flight: it goes on with the new "
        "weights between two tokens, so that answers are less stale; which tokens they draw is a matter of time, and "
        "two runs of one seed differ. Needs rollout.max_lag of at least 1.",
    )


class RewardConfig(Section):
    """The processes that score answers."""

    workers: PositiveInt = Field(1, description="On CPUs.")


class AqnConfig(Section):
    """Adaptive quantisation noise: who decides sigma, and within which bounds."""

    mode: Literal["disabled", "schedule", "entropy_band"] = Field(
        "schedule", description="schedule: sigma falls in stages. entropy_band: it follows the policy's entropy."
    )
    sigma_start: PositiveFloat = Field(1e-2, description="Largest standard deviation, in units of the norm weights.")
    sigma_end: PositiveFloat = Field(1e-3, description="Smallest one; the schedule falls to it by equal factors.")
    stages: int = Field(10, ge=2, description="Equal stages of the run; the first is silent (arXiv 2510.11696).")
    entropy_low: float = Field(0.1, ge=0, description="entropy_band: below this (nats a token) sigma rises.")
    entropy_high: PositiveFloat = Field(0.5, description="entropy_band: above this sigma falls.")
    gain: float = Field(1.25, gt=1, description="entropy_band: factor by which sigma rises or falls a step.")

    @model_validator(mode="after")
    def _ordered(self) -> "AqnConfig":
        if self.sigma_end > self.sigma_start:
            raise ValueError(f"sigma_end={self.sigma_end} is above sigma_start={self.sigma_start}; swap them")
        if self.entropy_low >= self.entropy_high:
            raise ValueError(f"entropy_low={self.entropy_low} is not below entropy_high={self.entropy_high}; lower it")
        return self


class LogConfig(Section):
    """What is logged, and loggers beside metrics.jsonl."""

    quant_every: int = Field(10, ge=0, description="Measure quantisation errors (quant/*) every so many steps; 0: off.")
    tensorboard: bool = Field(False, description="Event files in tensorboard/ of the run directory.")
    rollout_groups: int = Field(2, ge=0, description="Groups of each step written to rollouts/step_N.jsonl.")
    wandb: Literal["disabled", "offline", "online"] = Field("disabled", description="Weights & Biases.")
    wandb_project: str = "mxdist"


class GuardConfig(Section):
    """What is done when training goes wrong. roll_back goes on from the newest checkpoint with the prompts that come
    next, and counts as a failure for run.restarts."""

    not_finite: Literal["stop", "skip", "roll_back"] = Field(
        "stop",
        description="A gradient that is NaN or infinite. The weights are as before; skip leaves out the update.",
    )
    max_mismatch: PositiveFloat | None = Field(
        None, description="Largest rollout_corr/k3_kl, learner against rollout engine, that a step may show."
    )
    min_entropy: PositiveFloat | None = Field(None, description="Least actor/entropy (nats a token) of a step.")
    pinned_reward_steps: int = Field(
        0, ge=0, description="Steps in a row in which no group's rewards differ: nothing is learnt. 0: any number."
    )
    then: Literal["warn", "stop", "roll_back"] = Field("stop", description="What the last three bounds do.")


class ClusterConfig(Section):
    """Where Ray is."""

    address: str | None = Field(None, description="Ray cluster to join, such as auto; null starts one on this machine.")
    interface: str | None = Field(
        None,
        description="Network interface of the learner's traffic, such as ib0; null: that of Ray's address.",
    )


class DeadlineConfig(Section):
    """Seconds that each named wait may take. After that the process that did not answer is replaced, or the run stops
    and says who waited for whom."""

    start: PositiveSeconds = 300
    rollout: PositiveSeconds = 600
    reward: PositiveSeconds = 300
    update: PositiveSeconds = 600
    sync: PositiveSeconds = 120
    checkpoint: PositiveSeconds = 300
    evaluate: PositiveSeconds = 900

    @property
    def collective(self) -> float:
        """Seconds for a collective of the learner's ranks: longer than any wait for it, so that the wait speaks."""
        return max(self.start, self.update, self.sync, self.checkpoint) + 60


class Config(Section):
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    recipe: RecipeName = Field("mxfp4_mbs_of", description="What is quantised, and how.")
    recipe_overrides: tuple[RecipeOverride, ...] = Field((), description="Exceptions from recipe, in order.")
    bf16_layers: EdgeLayers = EdgeLayers()
    data: DataConfig = ArithmeticData()
    warm_start: WarmStartConfig = WarmStartConfig()
    algorithm: AlgorithmConfig = Grpo()
    optimizer: OptimizerConfig = OptimizerConfig()
    learner: LearnerConfig = LearnerConfig()
    rollout: RolloutConfig = RolloutConfig()
    sync: SyncConfig = SyncConfig()
    reward: RewardConfig = RewardConfig()
    aqn: AqnConfig = AqnConfig()
    guards: GuardConfig = GuardConfig()
    log: LogConfig = LogConfig()
    cluster: ClusterConfig = ClusterConfig()
    deadlines: DeadlineConfig = DeadlineConfig()

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its answer together."""
        return self.rollout.max_context or self.model.max_position_embeddings

    @property
    def context_key(self) -> str:
        """The setting that decides ``context``, for messages."""
        return "rollout.max_context" if self.rollout.max_context else "model.max_position_embeddings"

    @property
    def data_parallel(self) -> int:
        """Learner ranks that see different sequences."""
        return self.learner.ranks // (self.learner.tensor_parallel * self.learner.pipeline_parallel)

    @model_validator(mode="after")
    def _layout(self) -> "Config":
        recipes = [self.recipe, *(override.recipe for override in self.recipe_overrides)]
        quantum = max(MACRO_BLOCK if "_mbs" in name else 1 if name == "bf16" else BLOCK for name in recipes)
        check_layout(self.model, self.learner, quantum)
        check_engine_layout(self.model, self.rollout, quantum)
        offloaded = self.learner.zero_offload == "optimizer" and self.learner.zero_stage < 3
        if self.guards.not_finite != "stop" and offloaded:
            # DeepSpeed 0.19.8 keeps what is not finite for the updates that follow.
            raise ValueError(
                f"guards.not_finite={self.guards.not_finite} does not go with learner.zero_offload=optimizer below "
                f"learner.zero_stage=3; set guards.not_finite=stop, or learner.zero_stage=3"
            )
        edges = self.bf16_layers.first + self.bf16_layers.last
        if edges > self.model.num_hidden_layers:
            raise ValueError(
                f"bf16_layers.first={self.bf16_layers.first} and bf16_layers.last={self.bf16_layers.last} are more "
                f"than model.num_hidden_layers={self.model.num_hidden_layers}; lower them, or set recipe=bf16"
            )
        check_turns(self)
        if self.context > self.model.max_position_embeddings:
            raise ValueError(
                f"rollout.max_context={self.context} is beyond model.max_position_embeddings="
                f"{self.model.max_position_embeddings}; lower it"
            )
        if self.rollout.max_new_tokens >= self.context:
            raise ValueError(
                f"rollout.max_new_tokens={self.rollout.max_new_tokens} leaves no room for a prompt in "
                f"{self.context_key}={self.context}; lower the first"
            )
        return self
