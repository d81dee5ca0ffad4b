"""Every knob of the project, declared once. Nothing heavy is imported here, so a wrong recipe fails before torch loads.

A recipe is one of `PretrainRecipe`, `SftRecipe`, `EVALUATIONS`, `ProbeRecipe` and `ScalingConfig`; its sections are the dataclasses below and are passed
down as they are. Defaults are the paper's values (arXiv 2411.14402, Tables A1 and C1) unless a comment says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


class UserError(Exception):
    """A mistake the user can mend: shown as one line (file, key, reason, what to do), without a traceback."""


EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped by a signal, everything is saved; start the same command again

PRECISIONS = ("auto", "fp32", "bf16")
STRATEGIES = ("auto", "single", "ddp", "fsdp2", "zero2", "zero3")
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def choices(default: str, *allowed: str) -> Any:
    """A string field that accepts only `allowed`."""
    return field(default=default, metadata={"choices": allowed})


def bounded(default: float | None, at_least: float | None = None, above: float | None = None, below: float | None = None, at_most: float | None = None) -> Any:
    """A number within these bounds (of a list: each of its numbers), checked when a recipe is read."""
    return field(default=default, metadata={"bounds": (at_least, above, below, at_most)})


# ------------------------------------------------------------------------------------------------ shared by training runs


@dataclass
class Cooldown:
    """A run that goes on from another run's checkpoint while its learning rate falls linearly to `min_lr` (section 3.1)."""

    checkpoint: str | None = None  # <run>/checkpoints/step_…; model, text and pictures of its recipe must be these, data and schedule may differ
    fraction: float = bounded(0.2, above=0)  # of the steps made until that checkpoint
    min_lr: float = bounded(1e-6, at_least=0)


@dataclass
class Optimizer:
    """AdamW with a warm-up and a schedule; `weight_decay` means what the recipe's paper table means (see `decoupled`)."""

    lr: float = bounded(1e-3, above=0)
    min_lr: float = bounded(1e-5, at_least=0)
    warmup_lr: float = bounded(1e-6, at_least=0)
    warmup_steps: int = bounded(12_500, at_least=0)
    schedule: str = choices("cosine", "cosine", "half_cosine", "constant")  # half_cosine ends at (lr + min_lr) / 2
    cooldown: Cooldown = field(default_factory=Cooldown)
    steps: int = bounded(1_500_000, at_least=1)
    epochs: float | None = bounded(None, above=0)  # instead of `steps`: passes over the data
    batch_size: int = bounded(8192, at_least=1)  # samples of one optimizer step, over all processes
    micro_batch_size: int = bounded(64, at_least=0)  # samples of one forward pass of one process (0: its whole share); never changes the gradient
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95], metadata={"bounds": (0, None, 1, None), "length": 2})
    eps: float = bounded(1e-8, above=0)
    weight_decay: float = bounded(1e-4, at_least=0)
    decoupled: bool = True  # decay = weight_decay * lr_t / lr_peak (Table A1); false: torch's lr_t * weight_decay (C1)
    clip: float = bounded(1.0, at_least=0)
    states: str = choices("fp32", "fp32", "8bit")  # AdamW's moments; 8bit: block-wise (bitsandbytes), 2 bytes a parameter instead of 8


@dataclass
class Loop:
    """How the one training loop runs; nothing here changes what is computed."""

    strategy: str = choices("auto", *STRATEGIES)
    offload: str = choices("none", "none", "optimizer")  # of zero2 and zero3: AdamW's states and the weights it steps lie in the host's memory
    num_workers: int = bounded(2, at_least=0)  # processes that read and decode; any number gives the same samples
    log_every: int = bounded(10, at_least=1)
    validate_every: int = bounded(1000, at_least=1)
    save_every: int = bounded(1000, at_least=1)
    keep_last: int = bounded(2, at_least=1)
    keep_steps: list[int] = field(default_factory=list)  # a checkpoint is written at these steps and kept beside the last ones
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    compile: bool = False  # torch.compile of the model; worth its minutes on a GPU
    peak_tflops: float | None = bounded(None, above=0)  # what `share of peak` is a share of; null: the matrix product's rate measured at start
    stop_after: int | None = bounded(None, at_least=1)  # leave (with a checkpoint) after this many steps of the run; the schedule stays
    memory_check: str = choices("auto", "auto", "off")  # of tuning: estimate a step's memory before the start, refuse what cannot fit


@dataclass
class Common:
    """What every recipe and eval config has: where to write, and what the whole run is computed with."""

    out: str | None = None
    seed: int = bounded(0, at_least=0, below=2**32)
    precision: str = choices("auto", *PRECISIONS)
    data_root: str | None = None


# ------------------------------------------------------------------------------------------------------------ pre-training


@dataclass
class Pack:
    """A folder of pictures that becomes shards before the run (what `aimv2-vlm data pack` does)."""

    folder: str = ""
    captions: str | None = None  # JSONL or CSV; null: <picture>.txt beside each picture
    where: dict[str, str] = field(default_factory=dict)  # keep rows whose fields have these values


@dataclass
class PairSource:
    """Image-text shards. `caption` is `txt`, `json:<field>`, or a mapping of columns to sampling weights.

    With `pack`, shards are made below `path`'s folder the first time.
    """

    path: str | list[str] = ""
    pack: Pack | None = None
    name: str = ""
    weight: float = 1.0
    caption: Any = "txt"
    licence: str = ""  # as the source states it; stands in the model card


@dataclass
class PairData:
    sources: list[PairSource] = field(default_factory=list)
    validation: list[PairSource] = field(default_factory=list)
    validation_samples: int = bounded(512, at_least=1)  # of the held-out ones, evenly spread; `validation: []` does without
    max_bad_fraction: float = bounded(0.01, at_least=0)
    window_shards: int = 16  # samples are shuffled inside a moving window of this many shards
    # A run or a cooldown that finds other data than its checkpoint's. append: shards were only added; it goes on at its position, in the order of all of
    # them. restart: whatever changed, it goes on at the first sample.
    changed: str = choices("refuse", "refuse", "restart", "append")
    shard_cache: str | None = None  # folder of local copies of remote shards (s3://, https://, …); null: in the user's cache
    shard_cache_gb: float = 100.0  # GiB that these copies may take
    index_dir: str | None = None  # where shard indexes go when the shards' own folder cannot be written


@dataclass
class Native:
    """Pictures at their own aspect and of many sizes (native resolution, section 2.4). `capacity` switches it on.

    A mini-batch holds pictures of at most A = 2^n patches each, n = center + spread z drawn for it with z from N(0, 1) cut at
    -1 and 1, and as many of them as fit `capacity`.
    """

    capacity: int | None = None  # patches of a mini-batch
    center: float = 9.5
    spread: float = 2.5
    patch_limit: int | None = None  # most patches of a picture; null: 2^(center + spread), the paper's sizes being 132 to 3944
    minibatches: int = 1  # of one optimizer step, over all processes; takes the place of optim.batch_size


@dataclass
class ImageInput:
    """Training pictures: RandomResizedCrop and flip of Table A1. mean/std are part of the objective (pixel targets)."""

    size: int = 224
    mean: list[float] = field(default_factory=lambda: list(IMAGENET_MEAN))
    std: list[float] = field(default_factory=lambda: list(IMAGENET_STD))
    scale: list[float] = field(default_factory=lambda: [0.4, 1.0])
    ratio: list[float] = field(default_factory=lambda: [0.75, 1.33])
    flip: float = 0.5
    resize: str = choices("exact", "exact", "fast")
    native: Native = field(default_factory=Native)


@dataclass
class Text:
    """Captions. `tokenizer` is a sentencepiece .model file, or `train`: one is trained on the run's own captions."""

    tokenizer: str = "train"
    vocab_size: int = 32_000  # of a trained tokenizer
    context_length: int = 77  # tokens, end token included
    canonicalize: bool = True  # SigLIP's: lower case, no punctuation


@dataclass
class Encoder:
    """The vision encoder: sizes (spec of AIMv2-L by default), or a checkpoint in any known layout to go on from."""

    path: str | None = None
    patch_size: int = 14
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_layers: int = 24
    num_heads: int = 8
    position_embedding: str = choices("learned", "learned", "sincos")
    attention: str = choices("sdpa", "sdpa", "eager")


@dataclass
class Decoder:
    """The multimodal decoder of pre-training, the same for all encoder sizes."""

    path: str | None = None  # a pre-training checkpoint whose decoder and heads go on (its tokenizer must be the run's)
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_layers: int = 12
    num_heads: int = 8


@dataclass
class Objective:
    """What an encoder is trained by (Tables 5 and 9, Figure 4).

    aimv2: pixels and text. aimv1: pixels. captioning: text. cappa: text, some captions decoded in parallel. genlip:
    text, by the encoder's own blocks. clip: picture against text, two towers. lit: the same, encoder frozen.
    """

    name: str = choices("aimv2", "aimv2", "aimv1", "captioning", "cappa", "genlip", "clip", "lit")
    pixel_weight: float = 0.4  # alpha, of aimv2
    attention: str = choices("prefix", "prefix", "bidirectional")  # the encoder's while captioning; evaluated bidirectional
    decoders: str = choices("joint", "joint", "separate")  # separate: patches and text have one each (Table 9d)
    parallel_fraction: float = 0.75  # of captions, in cappa
    caption_patches: float = 1.0  # share of patches, drawn for each picture, that captions are decoded from (captioning)
    text_tower: TextTower = field(default_factory=lambda: TextTower())  # of clip and lit
    shuffle_captions: bool = False  # control arm: every picture gets another picture's caption


@dataclass
class TextTower:
    """The text side of clip and lit (LiT's sizes by default)."""

    hidden_size: int = 768
    intermediate_size: int = 2048
    num_layers: int = 12
    num_heads: int = 6
    projection_size: int = 768


@dataclass
class PretrainRecipe(Common):
    precision: str = choices("auto", *PRECISIONS, "fp8")  # fp8: bf16, with the blocks' matrix products in 8 bits (torchao; GPUs from compute capability 8.9)
    licence: str = ""  # of the model, by its name on the hub (apache-2.0, other, …); stands in the model card
    data: PairData = field(default_factory=PairData)
    image: ImageInput = field(default_factory=ImageInput)
    text: Text = field(default_factory=Text)
    encoder: Encoder = field(default_factory=Encoder)
    decoder: Decoder = field(default_factory=Decoder)
    objective: Objective = field(default_factory=Objective)
    optim: Optimizer = field(default_factory=Optimizer)
    train: Loop = field(default_factory=Loop)


# ------------------------------------------------------------------------------------------------------ instruction tuning


@dataclass
class ConversationSource:
    """LLaVA JSON or Cambrian JSONL, or interleaved documents; `take` is `all`, `first:N`, `random:N` or `N%`."""

    path: str = ""
    images: str = ""
    take: str = "all"
    licence: str = ""  # as the source states it; stands in the model card
    format: str = choices("conversations", "conversations", "obelics", "mmc4")  # the last two: documents, loss on all their text
    follow_links: bool = False  # whether links may lead out of `images`; if not, what lies behind them is left out


@dataclass
class ConversationData:
    sources: list[ConversationSource] = field(default_factory=list)
    max_length: int = bounded(2048, at_least=1)  # tokens of one row; longer ones are cut at a turn boundary (documents: between pieces) and counted
    tokens_per_microbatch: int = bounded(8192, at_least=1)  # most tokens of rows that are computed together; never changes the gradient
    max_bad_fraction: float = bounded(0.01, at_least=0)


@dataclass
class FrozenEncoder:
    """A frozen encoder: AIMv2 or one that it is compared with. `cache` keeps features of pictures used more than once."""

    path: str = ""
    kind: str = choices("auto", "auto", "aimv2", "clip", "dfn_clip", "siglip", "dinov2", "dinov2_registers", "mae")  # auto: by config.json
    image_size: int | None = bounded(None, at_least=1)  # null: the checkpoint's own
    layer: int | None = None  # null: the last one, normalised; else as that block left them: 0 the embeddings, -1 the last block, -2 the one before
    tokens: str = choices("all", "all", "patches")  # patches: without CLS and registers
    attention: str = choices("sdpa", "sdpa", "eager")
    cache: str = choices("auto", "auto", "on", "off")
    cache_limit_gb: float = bounded(3.0, at_least=0)  # `auto` does without a cache above this size
    batch_size: int = bounded(64, at_least=1)  # views of one frozen forward pass


@dataclass
class LanguageModel:
    """`path`: any causal language model. Without it a small Llama and a tokenizer are made from scratch."""

    path: str | None = None
    template: str = choices("llama3", "llama3", "vicuna", "plain", "own")
    vocab_size: int = bounded(2048, at_least=1)
    hidden_size: int = bounded(256, at_least=1)
    intermediate_size: int = bounded(688, at_least=1)
    num_layers: int = bounded(4, at_least=1)
    num_heads: int = bounded(4, at_least=1)
    num_kv_heads: int | None = bounded(None, at_least=1)  # null: as many as num_heads
    max_positions: int = bounded(2048, at_least=1)
    attention: str = choices("sdpa", "sdpa", "eager")
    quantization: str = choices("none", "none", "nf4", "int8")  # how the linear layers of its blocks are stored (bitsandbytes); they are frozen then
    double_quantization: bool = True  # of nf4: the scales of its blocks are quantised too (0.37 bit a weight less)


@dataclass
class Adapter:
    """Low-rank adapters of the decoder: `trainable: [llm]` then trains them and nothing else of it. Default sizes are LLaVA's."""

    kind: str = choices("none", "none", "lora", "dora")
    rank: int = bounded(128, at_least=1)
    alpha: int = bounded(256, at_least=1)  # the adapter's product is scaled by alpha / rank
    rslora: bool = False  # by alpha / sqrt(rank) instead
    dropout: float = bounded(0.0, at_least=0, below=1)  # on the adapter's input
    targets: list[str] = field(default_factory=list)  # e.g. [q_proj, v_proj]; empty: all linear layers of the decoder's blocks
    merge: bool = True  # final/ holds base + adapter as ordinary weights; false: base, and final/adapter/ beside it
    path: str | None = None  # an adapter to start from: final/adapter of a run with the same base


@dataclass
class Tiling:
    """`grid` 1x1 gives a Llava, RxC a LlavaNext with an overview picture and RxC tiles, RxC+RxC a choice per picture; with
    `unshuffle`, a Cohere2Vision with one view or at most RxC tiles and an overview."""

    grid: str = "1x1"
    pad_square: bool = True
    unshuffle: int = bounded(1, at_least=1)  # 2: 2 x 2 patches become one token before the connector, a quarter of the tokens
    source_size: int | None = bounded(None, at_least=1)  # control: pictures are first reduced to this many pixels (no new pixels in tiles)


@dataclass
class SftRecipe(Common):
    licence: str = ""  # of the model, by its name on the hub (apache-2.0, other, …); stands in the model card
    encoder: FrozenEncoder = field(default_factory=FrozenEncoder)
    llm: LanguageModel = field(default_factory=LanguageModel)
    tiling: Tiling = field(default_factory=Tiling)
    data: ConversationData = field(default_factory=ConversationData)
    trainable: list[str] = field(default_factory=lambda: ["connector", "llm"])
    connector_path: str | None = None  # a trained connector to start from: final/ of a run, or LLaVA's mm_projector.bin
    connector_lr_scale: float = bounded(8.0, above=0)
    adapter: Adapter = field(default_factory=Adapter)
    optim: Optimizer = field(
        default_factory=lambda: Optimizer(
            lr=1e-5, min_lr=0.0, warmup_lr=0.0, warmup_steps=250, steps=5000, batch_size=128, micro_batch_size=8,
            betas=[0.9, 0.999], weight_decay=0.01, decoupled=False,
        )
    )
    train: Loop = field(default_factory=Loop)


# ------------------------------------------------------------------------------------------------------------- evaluation


@dataclass
class EvalModel:
    """One row of the report. `source_size` reduces pictures first: a checkpoint judged without the new pixels."""

    path: str = ""
    name: str = ""
    source_size: int | None = None
    tiling: str | None = None  # another grid than the checkpoint was tuned with; marked in the ledger


@dataclass
class EvalConfig(Common):
    kind: str = choices("benchmarks", "benchmarks")
    models: list[EvalModel] = field(default_factory=list)
    benchmarks: list[str] = field(default_factory=list)
    benchmark_root: str = ""  # folder of <benchmark>/data/test-*.parquet, and of the public benchmarks' mirrors
    convert: dict[str, str] = field(default_factory=dict)  # benchmark-set name -> val.jsonl, written below benchmark_root
    prompts: dict[str, str] = field(default_factory=dict)  # benchmark -> other words after its questions; printed beside the score
    shots: list[int] = field(default_factory=lambda: [0])  # solved training questions asked before each question, e.g. [0, 4, 8]
    shot_lists: str | None = None  # folder of published lists; null: chosen by the seed, written to <out>/shots
    controls: list[str] = field(default_factory=lambda: ["blind", "wrong_picture"])  # without shots
    shot_controls: list[str] = field(default_factory=lambda: ["shuffled_answers", "shots_without_pictures"])  # with shots
    train_conversations: list[str] = field(default_factory=list)  # what the most frequent answers are counted on
    limit: int | None = None
    batch_size: int = 16
    max_new_tokens: int = 64
    write_cards: bool = False  # put the scores into the model cards of `models` that lie in a local folder
    checked: int = 8  # questions of a cell that are asked again one at a time, as plain transformers does; differences stand in the ledger
    unit: int = 512  # questions of a cell that are answered and stored at once; what a killed process costs, what processes share
    processes: int = 1  # that share the work, on GPUs one a device; torchrun, or the same command started again, does so too
    num_workers: int = 2  # threads of a process that open and prepare the pictures of the next questions


@dataclass
class LabelledData:
    """Pictures with one class each. A split is `<path>/<split>/<class>/*`, or `<path>/[data/]<split>-*.parquet` with a column
    of pictures and a column of classes, or the path of one parquet file."""

    path: str = ""
    name: str = ""  # a set of Table B1 (data/recognition.py), in one of the layouts people have it; splits and columns are known then
    train: str = "train"
    test: str = "test"
    image_column: str = "image"
    label_column: str = "label"
    where: dict[str, str] = field(default_factory=dict)  # keep the parquet rows whose columns have these values
    selection: float = 0.1  # share of train, class by class, that hyper-parameters are chosen on
    judged: str = choices("test", "test", "selection")  # selection: that share is kept from training and judged instead of test
    duplicates: str = choices("refuse", "refuse", "drop", "keep")  # pictures of test that train holds too; drop: train does without them
    max_bad_fraction: float = 0.01


@dataclass
class ProbeAugmentation:
    """Training pictures of a probe (Tables A2 and B1). `policy: none`: those of evaluation; frozen features can be cached then."""

    policy: str = choices("rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5-inc1", "none")
    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    ratio: list[float] = field(default_factory=lambda: [0.75, 1.33])
    flip: float = 0.5
    color_jitter: float = 0.3  # the tables name both; timm leaves it out beside a rand policy: 0 for that reading
    resize: str = choices("exact", "exact", "fast")


@dataclass
class ProbeSettings:
    """How probes are trained and judged (Tables A2 and B1)."""

    cache_dtype: str = choices("fp32", "fp32", "fp16")  # of cached features
    augment: ProbeAugmentation = field(default_factory=ProbeAugmentation)
    crop_fraction: float = bounded(0.875, above=0, at_most=1)  # evaluation: the shorter side becomes size / crop_fraction before the centre crop
    optim: Optimizer = field(
        default_factory=lambda: Optimizer(
            lr=1e-3, min_lr=1e-5, warmup_lr=0.0, warmup_steps=0, epochs=100, batch_size=512, micro_batch_size=512,
            betas=[0.9, 0.999], weight_decay=0.05, decoupled=False, clip=3.0,
        )
    )
    warmup_epochs: float | None = None  # instead of optim.warmup_steps (Table A2: 5 on ImageNet-1k)
    train: Loop = field(default_factory=Loop)


@dataclass
class ProbeRecipe(ProbeSettings, Common):
    """An attentive probe on a frozen encoder: one learning rate and weight decay, or a `grid` of them on the same batches."""

    encoder: FrozenEncoder = field(default_factory=FrozenEncoder)
    judge_native: bool = False  # pictures to judge whole, at their own size and aspect (sin-cos positions only); those to learn from stay crops
    data: LabelledData = field(default_factory=LabelledData)
    grid: list[list[float]] = field(default_factory=list)  # pairs of lr and weight_decay, instead of optim's


@dataclass
class ProbedModel(FrozenEncoder):
    """A model of a probing evaluation, called `name` or by its folder."""

    name: str = ""
    judge_native: bool = False  # as in a probe's recipe


@dataclass
class ProbedData(LabelledData):
    """A data set of a probing evaluation, called `title`, `name` or by its folder; null: batch and warm-up of the config."""

    title: str = ""
    duplicates: str = choices("keep", "refuse", "drop", "keep")  # keep: the set as it was published; the ledger says how many
    batch_size: int | None = None
    warmup_epochs: float | None = None


@dataclass
class ProbingConfig(ProbeSettings, Common):
    """Attentive probes of models x data sets (Tables 3, 6, 9, B2): the grid lrs x weight_decays at once, chosen on a tenth of train."""

    kind: str = choices("probing", "probing")
    models: list[ProbedModel] = field(default_factory=list)
    data_sets: list[ProbedData] = field(default_factory=list)
    lrs: list[float] = field(default_factory=lambda: [5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3])
    weight_decays: list[float] = field(default_factory=lambda: [0.05, 0.1])
    best_on_test: bool = True  # the paper's way as a second column; it costs nothing much, all points learn at once


@dataclass
class ZeroShotModel:
    """Two towers: of `aimv2-vlm pretrain` (clip, lit), Apple's LiT model, CLIP or SigLIP."""

    path: str = ""
    name: str = ""
    canonicalize: bool | None = None  # texts in lower case without punctuation; null: as the run that made the model says, else false


@dataclass
class ZeroShotData(LabelledData):
    """Classification: labelled pictures (their `test` split) and `class_names`; retrieval: `captions` of the pictures below `path`."""

    title: str = ""
    class_names: str | None = None  # JSON list or mapping, or lines of `class<TAB>name`; null: what the set calls its classes
    templates: Any = None  # of this set alone: a list of texts with {}, or a file with one a line; null: the config's
    captions: str | None = None  # JSONL of {image, captions: [...]} (or caption); makes it retrieval
    split: str = ""  # of captions: keep the rows whose `split` is this


@dataclass
class ZeroShotConfig(Common):
    """Classification by class names and retrieval with two towers (section 4.1, Table 5)."""

    kind: str = choices("zero_shot", "zero_shot")
    models: list[ZeroShotModel] = field(default_factory=list)
    data_sets: list[ZeroShotData] = field(default_factory=list)
    templates: Any = field(default_factory=lambda: ["a photo of a {}.", "a close-up of a {}.", "a picture showing the {}.", "a {} seen from the side.",
                                                    "a drawing of a {}.", "one {} among other things."])
    crop_fraction: float | None = bounded(None, above=0, at_most=1)  # the shorter side becomes size / crop_fraction before the centre crop; null: 1, and no crop where the model's processor squashes (SigLIP)
    batch_size: int = 64


EVALUATIONS = {"benchmarks": EvalConfig, "probing": ProbingConfig, "zero_shot": ZeroShotConfig}  # `kind` of an eval config


# ----------------------------------------------------------------------------------------------------------- scaling study


@dataclass
class EmbeddedPictures:
    """Pictures of the embedded data that a study draws for itself, below its `data_root`. samples: 0 draws none."""

    samples: int = 0
    held_out: int = 512
    detail_share: float = 0.67


@dataclass
class StudySize:
    """One encoder size: the keys in which its recipe differs, its own `optim.lr` among them."""

    name: str = ""
    keys: dict[str, Any] = field(default_factory=dict)  # of encoder, optim and train


@dataclass
class ScalingConfig:
    """Sizes x samples (section 3.1): one half-cosine run a size and seed, a linear cooldown from each of its checkpoints."""

    out: str | None = None
    data_root: str | None = None
    recipe: str = ""  # the pre-training recipe that all sizes share
    keys: dict[str, Any] = field(default_factory=dict)  # of that recipe, in which the study differs
    embedded: EmbeddedPictures = field(default_factory=EmbeddedPictures)
    sizes: list[StudySize] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)  # pictures seen where a cooldown begins; the last one ends the long run
    cooldown_fraction: float = 0.2
    cooldown_min_lr: float = 1e-6
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"bounds": (0, None, 2**32, None)})
    repeats: str = choices("refuse", "refuse", "allow")  # samples that come again within a run; allow: the results say so
    resamples: int = 1000  # of held-out pictures and seeds, for the intervals
