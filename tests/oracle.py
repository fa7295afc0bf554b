"""Independent second opinions: the network in numpy, the timestamp rules one by one, decoding without a cache."""

import math
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.model.whisper import Constant, Whisper
from whisper_nnx.text.special_tokens import SpecialTokens

ROWS = 4  # the network is asked in batches of one shape, so that it is compiled once

teacher_forced = jax.jit(Whisper.decode)
encode = jax.jit(Whisper.encode)


def params_of(module: nnx.Module) -> dict[str, np.ndarray]:
    state = nnx.to_flat_state(nnx.state(module, (nnx.Param, Constant)))
    return {".".join(map(str, path)): np.asarray(variable[...], np.float64) for path, variable in state}


def plain_norm(p, name, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p[f"{name}.scale"] + p[f"{name}.bias"]


def plain_linear(p, name, x):
    return x @ p[f"{name}.kernel"] + p.get(f"{name}.bias", 0.0)


def plain_gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def plain_attention(p, name, x, source, heads, mask=0.0):
    def split(part, y):
        return plain_linear(p, f"{name}.{part}", y).reshape(len(y), heads, -1).swapaxes(0, 1)

    q, k, v = split("q_proj", x), split("k_proj", source), split("v_proj", source)
    weights = np.exp(q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1]) + mask)
    mixed = weights / weights.sum(-1, keepdims=True) @ v
    return plain_linear(p, f"{name}.out_proj", mixed.swapaxes(0, 1).reshape(x.shape))


def plain_layer(p, name, x, heads, source=None, mask=0.0):
    h = plain_norm(p, f"{name}.self_attn_layer_norm", x)
    x = x + plain_attention(p, f"{name}.self_attn", h, h, heads, mask)
    if source is not None:
        h = plain_norm(p, f"{name}.encoder_attn_layer_norm", x)
        x = x + plain_attention(p, f"{name}.encoder_attn", h, source, heads)
    h = plain_gelu(plain_linear(p, f"{name}.fc1", plain_norm(p, f"{name}.final_layer_norm", x)))
    return x + plain_linear(p, f"{name}.fc2", h)


def plain_conv(p, name, x, stride):
    padded = np.pad(x, ((1, 1), (0, 0)))
    kernel = p[f"{name}.kernel"]
    out = [np.einsum("wi,wio->o", padded[t : t + 3], kernel) for t in range(0, len(x), stride)]
    return plain_gelu(np.array(out) + p[f"{name}.bias"])


def plain_whisper(model: Whisper, mel: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """One row: mel [M,T], ids [S] -> logits [S,V]."""
    p, config = params_of(model), model.config
    x = plain_conv(p, "encoder.conv2", plain_conv(p, "encoder.conv1", mel.T, 1), 2)
    x = x + p["encoder.embed_positions"][: len(x)]
    for i in range(config.encoder_layers):
        x = plain_layer(p, f"encoder.layers.{i}", x, config.encoder_attention_heads)
    audio = plain_norm(p, "encoder.layer_norm", x)
    table = p["decoder.embed_tokens.embedding"]
    x = table[ids] + p["decoder.embed_positions.embedding"][: len(ids)]
    mask = np.where(np.tri(len(ids)) > 0, 0.0, -np.inf)
    for i in range(config.decoder_layers):
        x = plain_layer(p, f"decoder.layers.{i}", x, config.decoder_attention_heads, audio, mask)
    x = plain_norm(p, "decoder.layer_norm", x)
    return x @ (table.T if config.tie_word_embeddings else p["decoder.proj_out.kernel"])


def timestamp_oracle(
    logits: np.ndarray, history: Sequence[int], max_initial: int | None, special: SpecialTokens
) -> np.ndarray:
    """One row's logits [V] after the rules on timestamps."""
    vocabulary = range(len(logits))
    times = {token for token in vocabulary if special.timestamp_begin <= token <= special.timestamp_end}
    text = {token for token in vocabulary if token < special.eot or token > special.timestamp_end}
    allowed = set(vocabulary) - {special.no_timestamps}
    said = [token for token in history if token in times]
    if not history:
        latest = special.timestamp_end if max_initial is None else special.timestamp_begin + max_initial
        allowed &= {time for time in times if time <= latest}
    elif history[-1] in times and len(history) > 1 and history[-2] not in times:
        allowed -= text | {time for time in times if time < said[-1]}  # after an end: its start, or the end of text
    else:
        if history[-1] in times:
            allowed -= times  # after a start: something that is said
        allowed -= {time for time in times if said and time <= said[-1]}

    likelihood = {token: math.exp(float(logits[token])) for token in allowed}
    time_likelihood = math.fsum(likelihood[token] for token in allowed & times)
    if time_likelihood > max((likelihood[token] for token in allowed - times), default=0.0):
        allowed &= times
    return np.where([token in allowed for token in vocabulary], logits, -np.inf)


def is_text(token: int, special: SpecialTokens) -> bool:
    return token < special.eot or token > special.timestamp_end


def repetition_oracle(
    logits: np.ndarray, said: Sequence[int], penalty: float, ngram: int, special: SpecialTokens
) -> np.ndarray:
    """One row's logits [V] after the rules on what was said."""
    logits = logits.copy()
    for token in {token for token in said if is_text(token, special)}:
        logits[token] *= 1 / penalty if logits[token] > 0 else penalty
    there = {tuple(said[i : i + ngram]) for i in range(len(said) - ngram + 1)} if ngram else set()
    for token in {gram[-1] for gram in there if is_text(gram[-1], special)}:
        if (*said[len(said) - ngram + 1 :], token) in there:
            logits[token] = -np.inf
    return logits


def has_loop(sampled: Sequence[int], repeats: int | None, special: SpecialTokens) -> bool:
    """Somewhere up to 16 text tokens come so many times in a row."""
    text = [token for token in sampled if is_text(token, special)]
    return repeats is not None and any(
        text[start : start + period * repeats] == text[start : start + period] * repeats
        for period in range(1, 17)
        for start in range(len(text) - period * repeats + 1)
    )


class PlainDecoder:
    """One window, one sequence at a time, without a cache.

    start: the ids before the first sampled one; said: those of them that are a prefix of the transcript.
    """

    def __init__(
        self, model: Whisper, mel: jax.Array, options: DecodingOptions, start: Sequence[int], said: Sequence[int] = ()
    ):
        self.model, self.options, self.start, self.said = model, options, [*start], [*said]
        self.special, self.context = model.tokenizer.special, model.config.max_target_positions
        self.audio = encode(model, jnp.broadcast_to(mel, (ROWS, *mel.shape)))
        self.limit = min(
            options.max_new_tokens or options.sample_len or self.context // 2, self.context - len(start) + 1
        )
        self.never = self._never()

    def _never(self) -> set[int]:
        """What is not sampled, whatever comes before."""
        special, tokenizer = self.special, self.model.tokenizer
        tasks = {special.transcribe, special.translate, special.sot, special.sot_prev}
        tasks |= set() if self.options.tinydiarize else {special.sot_lm}
        if (regex := self.options.suppress_regex) is not None:
            texts = ((i, tokenizer.decode([i])) for i in range(special.eot))
            tasks |= {i for i, text in texts if re.fullmatch(regex, text)}
        without_a_token = set(range(tokenizer.known_ids.sum(), self.model.config.vocab_size))
        asked = {i for i in self.options.suppress_tokens if i >= 0}
        usual = tokenizer.non_speech_tokens if -1 in self.options.suppress_tokens else ()
        return tasks | {special.no_speech} | without_a_token | asked | {*usual}

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Of the token after each of ids: [S,V]."""
        padded = np.zeros((ROWS, self.context), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(teacher_forced(self.model, padded, self.audio)[0, : len(ids)])

    def logprobs(self, sampled: Sequence[int]) -> np.ndarray:
        """Of the token after `sampled`, behind all filters: [V]."""
        logits = self.logits([*self.start, *sampled])[-1].astype(np.float64)
        o, said = self.options, [*self.said, *sampled]
        logits = repetition_oracle(logits, said, o.repetition_penalty, o.no_repeat_ngram_size, self.special)
        logits[[*self.never]] = -np.inf
        if self.options.suppress_blank and not sampled:
            logits[[*self.model.tokenizer.encode(" "), self.special.eot]] = -np.inf
        if not self.options.without_timestamps:
            seconds = self.options.max_initial_timestamp
            steps = None if seconds is None else round(seconds / 0.02)
            logits = timestamp_oracle(logits, said, steps, self.special)
        return logits - np.log(np.exp(logits).sum())

    def loops(self, sampled: Sequence[int]) -> bool:
        return has_loop(sampled, self.options.max_repeats, self.special)

    def greedy(self) -> tuple[tuple[int, ...], float]:
        """(tokens, sum of the log-probabilities with that of the end)."""
        tokens, total = (), 0.0
        while len(tokens) < self.limit:
            logprobs = self.logprobs(tokens)
            best = int(np.argmax(logprobs))
            total += logprobs[best]
            if best == self.special.eot:
                break
            tokens += (best,)
            if self.loops(tokens):
                break
        return tokens, total

    def beam(self) -> tuple[tuple[int, ...], float]:
        """As greedy; a full list of ended sequences, or the limit, ends the search."""
        size, alpha = self.options.beam_size, self.options.length_penalty
        wanted = round(size * (self.options.patience or 1))
        going, ended = {(): 0.0}, {}
        for _ in range(self.limit):
            longer = {}
            for tokens, total in going.items():
                logprobs = self.logprobs(tokens)
                for token in np.argsort(-logprobs)[: size + 1]:
                    if logprobs[token] > -np.inf:
                        longer[(*tokens, int(token))] = total + logprobs[token]
            going = {}
            for tokens in sorted(longer, key=longer.get, reverse=True):
                if tokens[-1] != self.special.eot:
                    going[tokens] = longer[tokens]
                elif len(ended) < wanted:
                    ended[tokens[:-1]] = longer[tokens]
                if len(going) == size:
                    break
            if len(ended) == wanted or self.loops(next(iter(going))):
                break
        while len(ended) < size and going:
            best = max(going, key=going.get)
            ended[best] = going.pop(best)

        def score(tokens):
            return ended[tokens] / (len(tokens) if alpha is None else ((5 + len(tokens)) / 6) ** alpha)

        best = max(ended, key=score)
        return best, ended[best]
