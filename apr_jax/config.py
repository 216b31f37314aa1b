"""Every setting of the library: small frozen dataclasses, one a layer. Validation is pure and names value and bound."""

import dataclasses
from typing import Literal

ROPE_KINDS = ("default", "linear", "llama3", "yarn")
KVDtype = Literal["float32", "bfloat16", "float64", "int8", "float8_e4m3fn"]
AttentionChoice = Literal["auto", "reference", "pallas"]


def check(condition: bool, message: str) -> None:
    """Raises ValueError(message) unless condition holds."""
    if not condition:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary positions. Field names follow Hugging Face's `rope_scaling`; unused fields are ignored by the kind.

    Source: the rope utilities of Hugging Face transformers; YaRN is arXiv 2309.00071.
    """

    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_position: int | None = None  # llama3, yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None derives it from factor and the two mscales
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions

    def __post_init__(self):
        check(self.kind in ROPE_KINDS, f"rope kind {self.kind!r} is not one of {ROPE_KINDS}")
        check(self.theta > 0, f"rope theta is {self.theta}, must be > 0")
        check(self.factor >= 1.0, f"rope factor is {self.factor}, must be >= 1")
        if self.kind in ("llama3", "yarn"):
            original = self.original_max_position
            check(
                original is not None and original >= 1,
                f"rope kind {self.kind!r} has original_max_position {original}, must be >= 1",
            )
        if self.kind == "llama3":
            low, high = self.low_freq_factor, self.high_freq_factor
            check(0 < low < high, f"rope low_freq_factor is {low}, must be in (0, high_freq_factor = {high})")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Llama-like decoder: Llama 2 / 3.x, Qwen2 / 2.5, Qwen3, Mistral without a window."""

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    max_position: int  # the context window, in tokens
    rms_eps: float = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    rope: RopeConfig = RopeConfig()
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    architecture: str = "LlamaForCausalLM"  # the Hugging Face class this came from, and goes back to

    def __post_init__(self):
        for name in (
            "vocab_size",
            "d_model",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "d_ff",
            "max_position",
        ):
            check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}, must be >= 1")
        check(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads is {self.num_heads}, must be a multiple of num_kv_heads = {self.num_kv_heads}",
        )
        check(self.head_dim % 2 == 0, f"head_dim is {self.head_dim}, must be even")

    @property
    def group_size(self) -> int:
        """Query heads a KV head."""
        return self.num_heads // self.num_kv_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The paged KV cache. `num_pages` counts page 0, the null page, which is never handed out."""

    page_size: int = 16
    num_pages: int = 2048
    prefix_cache: bool = True

    def __post_init__(self):
        check(self.page_size >= 1, f"page_size is {self.page_size}, must be >= 1")
        check(self.num_pages >= 2, f"num_pages is {self.num_pages}, must be >= 2 (page 0 is the null page)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The loop: how many threads run side by side and what one dispatch may do.

    Declared buckets are (rows, chunk, items); the smallest that holds a dispatch is used.
    """

    max_threads: int = 32  # slots
    steps_per_dispatch: int = 16
    prefill_chunk: int = 256  # tokens of one row a prefill dispatch may feed
    prefill_rows: int = 4  # rows of a prefill dispatch
    max_tail_pages: int = 32  # M: a longer tail is sealed and a new one begun
    item_pages: int = 16  # C
    max_partials: int = 16  # P
    max_prefill_partials: int = 4  # P in prefill, where a partial is as large as a chunk's output
    target_runs: int | None = None  # runs that fill the chip, longer ones are cut up to; None: by platform
    min_shared_tokens: int = 32  # a shared run shorter than this is read privately
    max_family_pages: int | None = None  # None: the pool's size
    max_stop_ids: int = 8
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    kv_dtype: KVDtype | None = None  # None: dtype
    attention: AttentionChoice = "auto"  # auto: Pallas where it runs
    tensor: int = 1  # devices that heads, MLP and pages are split over
    compile_cache_dir: str | None = None  # None: no persistent compile cache

    def __post_init__(self):
        for name in (
            "max_threads",
            "steps_per_dispatch",
            "prefill_chunk",
            "prefill_rows",
            "max_tail_pages",
            "item_pages",
            "max_partials",
            "max_prefill_partials",
            "max_stop_ids",
            "tensor",
        ):
            check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}, must be >= 1")
        runs = self.target_runs
        check(runs is None or runs >= 1, f"target_runs is {runs}, must be >= 1")
