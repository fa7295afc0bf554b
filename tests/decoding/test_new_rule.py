"""A rule that the package does not have, in the loop as it is: passed with the batch, greedy and in a beam search."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.oracle import ROWS
from tests.small import quick_compilation, small_mel, small_model  # noqa: F401
from whisper_nnx import keep_programs
from whisper_nnx.decoding.loop import generate
from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.decoding.rules import PER_ROW, PER_WINDOW, SHARED, Rule, suppress
from whisper_nnx.transcription import windows
from whisper_nnx.transcription.windows import decode_windows, encode_windows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NotAfter(Rule):
    """The tokens of `banned` [V] do not follow `token` [R]; a row stops after `most` [R] such tokens."""

    banned: Any = field(metadata=SHARED)
    token: Any = field(metadata=PER_WINDOW)
    most: Any = field(metadata=PER_WINDOW)
    just_sampled: Any = field(metadata=PER_ROW)
    count: Any = field(metadata=PER_ROW)

    def apply(self, logits: jax.Array) -> jax.Array:
        return suppress(logits, self.just_sampled[:, None] & self.banned)

    def append(self, token: jax.Array) -> "NotAfter":
        now = token == self.token
        return replace(self, just_sampled=now, count=self.count + now)

    def stops(self) -> jax.Array:
        return self.count >= self.most


@pytest.fixture(scope="module")
def model():
    return small_model(decoder_layers=1)


@pytest.fixture(scope="module")
def encoded(model):
    return encode_windows(model, small_mel(ROWS))


def followers(results, token: int) -> set[int]:
    return {b for r in results for a, b in zip(r.tokens, r.tokens[1:], strict=False) if a == token}


@pytest.mark.parametrize("strategy", [{}, {"beam_size": 3}], ids=["greedy", "beam"])
def test_a_new_rule_holds_in_the_unchanged_loop(model, encoded, strategy, monkeypatch, tmp_path):
    special = model.tokenizer.special
    options = DecodingOptions(language="de", suppress_tokens=(-1, special.eot), without_timestamps=True, **strategy)
    free = decode_windows(model, encoded, [options] * ROWS, range(ROWS))
    token = int(np.bincount(np.concatenate([r.tokens for r in free])).argmax())
    banned = np.isin(np.arange(model.config.vocab_size), list(followers(free, token)))
    assert banned.any()

    def ruled(most: int):
        rule = NotAfter(banned, np.full(ROWS, token), np.full(ROWS, most), np.zeros(ROWS, bool), np.zeros(ROWS, int))

        def with_rule(decoder, cross, batch, *rest):
            return generate(decoder, cross, replace(batch, rules=(*batch.rules, rule)), *rest)

        monkeypatch.setattr(windows, "generate", with_rule)
        return decode_windows(model, encoded, [options] * ROWS, range(ROWS))

    results = ruled(most=1000)
    assert any(token in r.tokens for r in results)
    assert not followers(results, token) & set(np.flatnonzero(banned))
    assert not any(r.looped for r in results)
    assert [r.tokens for r in results] != [r.tokens for r in free]

    stopped = ruled(most=2)
    assert any(r.looped for r in stopped)
    if not strategy:  # a beam that is stopped continues until it is the best of its window
        assert all(r.tokens == f.tokens[: len(r.tokens)] for r, f in zip(stopped, results, strict=True))
        assert all(r.looped == (r.tokens.count(token) == 2 and r.tokens[-1] == token) for r in stopped)

    keep_programs(tmp_path)  # knows a class by its name only, so it keeps no program with a class from elsewhere
    try:
        assert [r.tokens for r in ruled(most=2)] == [r.tokens for r in stopped]
    finally:
        keep_programs(None)
    assert not list(tmp_path.glob("generate-*"))


def test_a_field_that_belongs_to_nothing_is_refused():
    @dataclass(frozen=True)
    class Unmarked(Rule):
        mask: Any

        def apply(self, logits: jax.Array) -> jax.Array:
            return logits

    with pytest.raises(TypeError, match=r"Unmarked\.mask .*metadata=PER_ROW"):
        Unmarked(jnp.zeros(3)).repeat(2)
