"""AttentionConfig: how many tokens a decode step may read, and who chooses them."""

import json
from dataclasses import asdict, dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

from sparse_attention_decoder.errors import ConfigError
from sparse_attention_decoder.given import object_of, require_count, scales_of
from sparse_attention_decoder.tables import BACKENDS, KV_BITS, POLICIES, QUALITIES

# policies that read what a cap leaves; the others keep or evict by rules of their own
CAPPED = ("sketch", "dense", "window")
# policies that obey a threshold
SCALED = ("sketch", "oracle")
# shares of attention are below 1
LARGEST_THRESHOLD = 0.999


@dataclass(frozen=True)
class AttentionConfig:
    """What one decode step reads: sinks + window + the tokens that the policy retrieves.

        AttentionConfig()                                  # the measured default
        AttentionConfig(top_k=32, attention_window=512)
        AttentionConfig(threshold=None, top_k=256)         # a fixed budget
        AttentionConfig(policy="dense")                    # read everything: the baseline
        AttentionConfig(dense_below=0)                     # sparse as soon as the budget is exceeded
        AttentionConfig(missing_mass=0.03)                 # the threshold follows: 3 % of the attention left unread
        AttentionConfig(quality="fast")                    # a measured preset: fast, balanced or firm

    Args:
        top_k: tokens retrieved per KV head and step, at least: the floor. 1 or more.
        threshold: every token whose estimated share of the attention (mean over the query heads
            of a KV head) exceeds this is read too; 0 or None turns it off. Quest ignores it:
            its page bounds are no probabilities. So do snapkv, h2o and streaming: they keep a fixed number.
        attention_window: newest tokens always read, the current one included. 1 or more.
        sink_tokens: first tokens always read. 0 or more.
        policy: a name in `tables.POLICIES`: sketch, dense, window, oracle, quest, and to compare with,
            snapkv, h2o, streaming: they evict, so a token once left out is never read again.
        backend: a name in `tables.BACKENDS`, or "auto" for the first that can serve.
        dense_below: contexts of fewer tokens than this are read whole. None is the context from which
            the backend's sparse step was measured to be the faster one (benchmarks/crossover.py);
            0 never forces dense. Policies that evict have nothing left to read densely, and ignore it.
        kv_dtype: "int8" or "int4" keep each channel of keys and values in so many bits, with a scale a token:
            about a quarter and an eighth of float32's memory. None keeps them as the model makes them. So are the
            newest 64 to 95 tokens under either. int8 costs nothing that shows, int4 some two hundredths of the
            perplexity (docs/experiments.md, 17). Not for the backend triton.
        max_cache_tokens: tokens held per layer and KV head at most. What is beyond is evicted, an eighth at a
            time: the tokens that the newest queries attend to least, never sinks or window. For policies sketch,
            dense and window.
        max_cache_bytes: bytes that keys, values and sketch of all layers and rows may take together. Precision
            goes first, to int8 and then to int4; what is beyond even so is evicted.
        missing_mass: share of the attention that may go unread, mean over layers, heads, rows and steps: from
            `threshold` on, a closed loop moves the threshold so that the estimated missing attention mass stays there;
            with `layer_scales` all layers' thresholds, by one factor, and layers read whole do not count. The estimate
            is audited by exact attention, see `dial`; it is no bound. None leaves the threshold where it is. For
            policies sketch and oracle; the others ignore it, as they do the threshold.
        sample_tail: of the tokens whose share does not exceed the threshold, one is read for every `threshold` of
            attention and stands for that much: half the bytes at the same KL (docs/experiments.md, 21), with a
            threshold some ten times higher. For policy sketch, backends cpu and reference; other policies ignore it.
        quality: a row of `tables.QUALITIES`, which sets the fields it names. Fields at their plain default take the
            preset's value; one that says a third thing is an error. None sets nothing.
        far_field: how much of the far field is added to a step's output, from 0 to 1: the mean value of all cached
            tokens, times the share of attention that a head is estimated to leave unread. No bytes to speak of. For
            policies sketch and oracle, not for the backend triton. docs/experiments.md has what it gains.
        layer_scales: what the threshold is multiplied by in each full-attention layer of the model, in order; a layer
            of None is read whole. None is 1.0 for all. `sparse-decoder tune` finds them.
        tuned_for: the model that this was tuned for, see `models.identity.of`: another architecture is refused, other
            weights are warned of.
    Raises:
        ConfigError: a value that cannot work; the message gives one that would.
    What the defaults keep is measured in benchmarks/report/report.md; docs/experiments.md says what
    cheaper settings lose.
    """

    top_k: int = 32
    threshold: float | None = 3e-5
    attention_window: int = 256
    sink_tokens: int = 4
    policy: str = "sketch"
    backend: str = "auto"
    dense_below: int | None = None
    kv_dtype: str | None = None
    max_cache_tokens: int | None = None
    max_cache_bytes: int | None = None
    missing_mass: float | None = None
    quality: str | None = None
    sample_tail: bool = False
    far_field: float = 0.0
    layer_scales: tuple[float | None, ...] | None = None
    tuned_for: str | None = None

    def __post_init__(self) -> None:
        self._apply_quality()
        require_count("top_k", self.top_k, 1, 'to retrieve nothing use policy="window"')
        require_count("attention_window", self.attention_window, 1, "the current token is part of it")
        require_count("sink_tokens", self.sink_tokens, 0, "0 keeps no first tokens")
        if self.dense_below is not None:
            require_count("dense_below", self.dense_below, 0, "0 never forces dense, None waits until sparse is faster")
        if self.threshold is not None:
            if isinstance(self.threshold, bool) or not isinstance(self.threshold, (int, float)):
                raise ConfigError(
                    f"threshold is {self.threshold!r}; expected a number from 0 to below 1, or None for off"
                )
            if not 0 <= self.threshold < 1:
                raise ConfigError(
                    f"threshold is {self.threshold}; as a share of attention it is 0 (off) up to below 1, such as 3e-5"
                )
        if not isinstance(self.policy, str) or self.policy not in POLICIES:
            raise ConfigError(f"policy is {self.policy!r}; choose one of {', '.join(POLICIES)}")
        if not isinstance(self.backend, str) or self.backend not in ("auto", *BACKENDS):
            raise ConfigError(f"backend is {self.backend!r}; choose auto or one of {', '.join(BACKENDS)}")
        if self.kv_dtype is not None and (not isinstance(self.kv_dtype, str) or self.kv_dtype not in KV_BITS):
            raise ConfigError(
                f"kv_dtype is {self.kv_dtype!r}; choose one of {', '.join(KV_BITS)}, or None to keep them whole"
            )
        self._check_caps()
        self._check_missing_mass()
        self._check_layers()
        if not isinstance(self.sample_tail, bool):
            raise ConfigError(f"sample_tail is {self.sample_tail!r}; expected True or False")
        if self.sample_tail and not self.threshold:
            raise ConfigError("sample_tail is True, but the threshold is off; give one to sample below, such as 1e-3")

    def _apply_quality(self) -> None:
        if self.quality is None:
            return
        if not isinstance(self.quality, str) or self.quality not in QUALITIES:
            raise ConfigError(f"quality is {self.quality!r}; choose one of {', '.join(QUALITIES)}, or None")
        plain = {field.name: field.default for field in fields(self)}
        for name, value in QUALITIES[self.quality].items():
            given = getattr(self, name)
            if given not in (plain[name], value):
                raise ConfigError(
                    f"quality {self.quality!r} sets {name} to {value!r}, and it is given as {given!r}; leave one of "
                    "them out (quality=None keeps all other fields)"
                )
            object.__setattr__(self, name, value)

    def _check_missing_mass(self) -> None:
        if self.missing_mass is None:
            return
        if isinstance(self.missing_mass, bool) or not isinstance(self.missing_mass, (int, float)):
            raise ConfigError(
                f"missing_mass is {self.missing_mass!r}; expected a number above 0 and below 1, or None for a fixed "
                "threshold"
            )
        if not 0 < self.missing_mass < 1:
            raise ConfigError(
                f"missing_mass is {self.missing_mass}; as a share of attention it is above 0 and below 1, such as 0.03"
            )
        if not self.threshold:
            raise ConfigError(
                f"missing_mass is {self.missing_mass}, but the threshold it is to move is off; give one to start "
                "from, such as 3e-5"
            )

    def _check_layers(self) -> None:
        if self.layer_scales is not None:
            # JSON has lists alone
            object.__setattr__(self, "layer_scales", scales_of(self.layer_scales))
            if self.policy not in SCALED or not self.threshold:
                raise ConfigError(
                    f"layer_scales multiply a threshold, and policy {self.policy!r} with threshold {self.threshold!r} "
                    f"has none; use one of {', '.join(SCALED)} with a threshold above 0, or no layer_scales"
                )
        is_number = isinstance(self.far_field, (int, float)) and not isinstance(self.far_field, bool)
        if not is_number or not 0 <= self.far_field <= 1:
            raise ConfigError(f"far_field is {self.far_field!r}; expected a number from 0 (off) to 1 (all of it)")
        if self.far_field and self.policy not in SCALED:
            raise ConfigError(
                f"far_field needs estimated shares of attention, which policy {self.policy!r} has none of; use one of "
                f"{', '.join(SCALED)}"
            )
        if self.far_field and self.sample_tail:
            raise ConfigError("far_field and sample_tail each stand for what is left unread; use one of them")
        if self.tuned_for is not None and not isinstance(self.tuned_for, str):
            raise ConfigError(f"tuned_for is {self.tuned_for!r}; expected what `models.identity.of` gives, or None")

    def of_layers(self, count: int) -> list["AttentionConfig"]:
        """What each of a model's `count` full-attention layers reads.

        Raises:
            ConfigError: layer_scales are of another number of layers.
        """
        if self.layer_scales is None:
            return [self] * count
        if len(self.layer_scales) != count:
            raise ConfigError(
                f"layer_scales are of {len(self.layer_scales)} layers, and this model has {count} with full attention; "
                "`sparse-decoder tune` finds those of a model"
            )
        return [self._of(scale) for scale in self.layer_scales]

    def _of(self, scale: float | None) -> "AttentionConfig":
        if scale is None:
            return replace(
                self,
                policy="dense",
                far_field=0.0,
                layer_scales=None,
                quality=None,
                sample_tail=False,
                missing_mass=None,
            )
        # one that would be larger asks for nothing but the floor, as this does
        return replace(
            self, threshold=min((self.threshold or 0.0) * scale, LARGEST_THRESHOLD), layer_scales=None, quality=None
        )

    def _check_caps(self) -> None:
        if self.max_cache_tokens is not None:
            require_count(
                "max_cache_tokens", self.max_cache_tokens, self.least_cache_tokens,
                "what is left when an eighth has been evicted must hold sinks, window and top_k; None sets no cap",
            )  # fmt: skip
        if self.max_cache_bytes is not None:
            require_count("max_cache_bytes", self.max_cache_bytes, 1, "None sets no cap", "bytes")
        if self.is_capped and self.policy not in CAPPED:
            raise ConfigError(
                f"policy {self.policy!r} does not work with max_cache_tokens or max_cache_bytes: "
                f"it has rules of its own for what is held; choose one of {', '.join(CAPPED)}"
            )

    @property
    def is_capped(self) -> bool:
        """Whether there is a limit to what is held."""
        return self.max_cache_tokens is not None or self.max_cache_bytes is not None

    @property
    def least_cache_tokens(self) -> int:
        """The smallest cap of tokens that still holds the budget after an eighth of it has been evicted."""
        return self.budget_tokens + max(1, (self.budget_tokens - 1) // 7)

    @property
    def budget_tokens(self) -> int:
        """Tokens read at least: a context no longer than this is attended densely, without kv_dtype bit for bit."""
        retrieved = self.top_k if self.policy not in ("window", "streaming") else 0
        return self.sink_tokens + self.attention_window + retrieved

    def to_json(self) -> str:
        """The config as a JSON object, one key a field."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "AttentionConfig":
        """Read a file that `sparse-decoder tune` wrote (its evidence is in there too), or one of `to_json`.

        Raises:
            ConfigError: it cannot be read, or holds no config.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read a config from {path}: {error}") from error
        values = object_of(text)
        return cls._of_values(values["config"] if isinstance(values.get("config"), dict) else values)

    @classmethod
    def from_json(cls, text: str) -> "AttentionConfig":
        """Read back what `to_json` wrote; keys left out take their default.

        Raises:
            ConfigError: not a JSON object, an unknown key, or a value that cannot work.
        """
        return cls._of_values(object_of(text))

    @classmethod
    def _of_values(cls, values: dict[str, Any]) -> "AttentionConfig":
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(f"unknown key {', '.join(map(repr, unknown))}; known are {', '.join(known)}")
        config = cls(**values)
        for name, value in values.items():
            if name in QUALITIES.get(str(config.quality), {}) and getattr(config, name) != value:
                raise ConfigError(
                    f"quality {config.quality!r} sets {name} to {getattr(config, name)!r}, and the JSON says "
                    f"{value!r}; leave one of them out"
                )
        return config
