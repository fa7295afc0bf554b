"""Grammars as automata, against Python's `re` and llguidance."""

import json
import re
from pathlib import Path

import llguidance
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.small import small_tokenizer
from whisper_nnx.grammar.automaton import MAX_STATES, ByteAutomaton, utf8_ranges
from whisper_nnx.grammar.expressions import complement
from whisper_nnx.grammar.grammar import Grammar, automaton_of
from whisper_nnx.grammar.tokens import Vocabulary, token_automaton

NESTED = {"type": "array", "items": {"$ref": "#"}}


def matches(automaton: ByteAutomaton, text: str) -> bool:
    state = 0
    for byte in text.encode():
        state = automaton.table[state, byte]
        if state < 0:
            return False
    return bool(automaton.ends[state])


pieces = st.recursive(
    st.sampled_from(["a", "b", "é", "☃", "[ab]", "[^a]", "[a-é]", r"\d", r"\w", ".", r"\.", ""]),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,}", "{0,2}"])).map(lambda p: f"(?:{p[0]}){p[1]}"),
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=40)
@given(pieces, st.lists(st.text("ab☃é.1\n𝄞", max_size=5), min_size=8, max_size=8))
def test_a_regular_expression_matches_what_python_matches(pattern, texts):
    automaton = automaton_of(Grammar("regex", pattern))
    for text in texts:
        expected = bool(re.fullmatch(pattern, text) or (text[:1] == " " and re.fullmatch(pattern, text[1:])))
        assert matches(automaton, text) == expected, (pattern, text)


@given(st.lists(st.tuples(st.integers(0, 0x10FFFF), st.integers(0, 0x10FFFF)).map(sorted).map(tuple), max_size=3))
def test_byte_ranges_are_those_of_the_characters(intervals):
    def inside(code: int) -> bool:
        raw = chr(code).encode()
        found = utf8_ranges(tuple(intervals))
        return any(len(r) == len(raw) and all(a <= b <= c for b, (a, c) in zip(raw, r, strict=True)) for r in found)

    edges = [0, 0x7F, 0x80, 0x7FF, 0x800, 0xFFFF, 0x10000, 0x10FFFF, *(edge for pair in intervals for edge in pair)]
    for code in {near for edge in edges for near in (edge - 1, edge, edge + 1) if 0 <= near <= 0x10FFFF}:
        if not 0xD800 <= code <= 0xDFFF:  # surrogates have no UTF-8
            assert inside(code) == any(low <= code <= high for low, high in intervals)
            assert any(low <= code <= high for low, high in complement(tuple(intervals))) != inside(code)


SAMPLE = r"""
# Comments, and rules of several lines
root   ::= init " " (command | "what is the " device "?") "."  # the end
init   ::= " ok"
command ::= "turn " ("on" | "off") " " device |
            "set " device " to " [0-9]+ (
              "%" | " degrees" )?
device ::= "TV" | "caf\u00e9" | "\"lamp\"" | [^a-zé☃\x00-\x1f] "!"{2,3}
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" ok turn on TV.", True),
        (" ok turn on café.", True),
        (' ok what is the "lamp"?.', True),
        (" ok set Z!! to 12 degrees.", True),
        (" ok set Z!!! to 1%.", True),
        (" ok set Z! to 1%.", False),
        (" ok set z!! to 1%.", False),
        (" ok set ☃!! to 1%.", False),
        (" ok set TV to %.", False),
        ("ok turn on TV.", False),
        (" ok turn on TV", False),
    ],
)
def test_gbnf_is_read_as_whisper_cpp_reads_it(text, expected):
    assert matches(automaton_of(Grammar("grammar", SAMPLE)), text) is expected


def test_another_rule_may_be_the_start():
    assert matches(automaton_of(Grammar("grammar", SAMPLE, "init")), " ok")


@pytest.mark.parametrize(
    ("grammar", "yes", "no"),
    [
        ('root ::= "a" root | "b"', ["b", "aab", "a" * 30 + "b"], ["a", "ba"]),
        ('root ::= "a" ("," root)?', ["a", "a,a", "a" + ",a" * 30], ["a,", ""]),
        ('root ::= root "+" term | term\nterm ::= [0-9]', ["1", "1+2", "1" + "+1" * 30], ["+1", "1+"]),
        ('root ::= a\na ::= "x" b | "x"\nb ::= "y" a', ["x", "xyx", "xy" * 30 + "x"], ["xy", "y"]),
    ],
)
def test_recursion_at_an_end_is_repetition(grammar, yes, no):
    automaton = automaton_of(Grammar("grammar", grammar))
    assert [text for text in yes if not matches(automaton, text)] == []
    assert [text for text in no if matches(automaton, text)] == []


def test_choices_may_follow_a_space():
    automaton = automaton_of(Grammar("choices", ("one", " two ", "a.b")))
    assert all(matches(automaton, space + text) for space in ("", " ") for text in ("one", "two", "a.b"))
    assert not any(matches(automaton, text) for text in ("  one", "on", "", " ", "axb", "two "))


def test_a_json_schema_matches_its_documents():
    schema = {"type": "object", "properties": {"on": {"type": "boolean"}, "n": {"type": "integer"}}, "required": ["on"]}
    automaton = automaton_of(Grammar("json_schema", json.dumps(schema)))
    assert matches(automaton, '{"on": true, "n": -12}')
    assert matches(automaton, ' {"on":false}')
    assert not matches(automaton, '{"n": 1}')


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar("grammar", "colors.gbnf"), "neither an existing file nor a grammar"),
        (Grammar("grammar", 'root ::= "a" b'), "'root' refers to 'b', which is not defined"),
        (Grammar("grammar", 'root ::= "a"\nroot ::= "b"'), "line 2: rule 'root' is defined twice"),
        (Grammar("grammar", 'one ::= "a"'), "has no rule 'root'; grammar_rule names the first one of one"),
        (Grammar("grammar", '\nroot ::= ("a"'), r"line 2: expected '\)'"),
        (Grammar("grammar", 'root ::= "a'), "line 1: a literal or set has no end"),
        (Grammar("grammar", "root ::= * x"), "'\\*' follows nothing"),
        (Grammar("grammar", 'root ::= "\\q"'), "is not a known escape"),
        (Grammar("grammar", "root ::= [b-a]"), "range b-a is empty"),
        (Grammar("grammar", "root ::= [a]{3,2}"), "ends below its beginning"),
        (Grammar("grammar", "root ::= root"), "matches no text"),
        (Grammar("grammar", 'root ::= "(" root ")" | one\none ::= "1" [] | "2" one'), "matches no text"),
        (Grammar("grammar", "root ::= " + "(" * 5000), "nested too deeply"),
        (Grammar("regex", "(a"), "not a valid regular expression"),
        (Grammar("regex", r"(a)\1"), "backreferences, which are not supported"),
        (Grammar("regex", "a(?=b)"), "lookaround"),
        (Grammar("regex", "(?i)a"), "flags"),
        (Grammar("regex", "(a|b)*a(a|b){30}"), f"needs more than {MAX_STATES} states"),
        (Grammar("regex", "(((a{99}){99}){99}){99}"), "is too large"),
        (Grammar("regex", "(){4000000000}"), "is too large"),
        (Grammar("regex", "(){0,4000000000}"), "is too large"),
        (Grammar("grammar", 'root ::= (""{999999}){999999}'), "is too large"),
        (
            Grammar(
                "grammar", "root ::= r0\n" + "".join(f"r{n} ::= r{n + 1} r{n + 1}\n" for n in range(40)) + 'r40 ::= ""'
            ),
            "is too large",
        ),
        (Grammar("regex", f"a{{{MAX_STATES}}}"), f"needs {MAX_STATES + 2} states, more than the limit of {MAX_STATES}"),
        (Grammar("json_schema", "{"), "not a JSON schema"),
        (Grammar("json_schema", json.dumps(NESTED | {"uniqueItems": True})), "cannot be used: .*Unimplemented keys"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_refused_in_one_line(grammar, message):
    with pytest.raises(ValueError, match=message) as error:
        automaton_of(grammar)
    assert str(error.value).startswith(f"{grammar.option}=")
    assert len(str(error.value).splitlines()) == 1


# Over tokens.

TOKENIZER = small_tokenizer()
EOT = TOKENIZER.special.eot
TEXT = dict(zip(range(EOT), TOKENIZER.token_bytes(range(EOT)), strict=True))
VOCABULARY = Vocabulary(TEXT)


class ForLlguidance:
    """What llguidance needs of a tokenizer."""

    def __init__(self):
        self.eos_token_id, self.bos_token_id, self.special_token_ids = EOT, None, [EOT]
        self.tokens = [*TEXT.values(), b"<|endoftext|>"]

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


def allowed_by_llguidance(matcher: llguidance.LLMatcher) -> set[int]:
    """Not by its masks: where a text is certain, they only have the token that its tokenizer would take."""
    allowed = {token for token in range(EOT) if matcher.validate_tokens([token])}
    return allowed | {EOT} if matcher.is_accepting() else allowed


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from([r" the (one|two)+", r"(on|one|o|ne)*", r" ?[^a-z]{2}\.", r" t[a-zé☃]*(er)? and", r"(\(a+\))? -"]),
    st.randoms(use_true_random=False),
)
def test_tokens_are_those_that_llguidance_allows(pattern, random):
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(ForLlguidance()))
    matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_regex(f"( ?)({pattern})"))
    size = TOKENIZER.vocab_size
    ours = token_automaton(automaton_of(Grammar("regex", pattern)), VOCABULARY, size, EOT, [], strict=True)
    state = 0
    for _ in range(8):
        allowed = set(np.flatnonzero(ours.table[state, ours.token_class] >= 0).tolist())
        assert allowed == allowed_by_llguidance(matcher)
        if not (others := sorted(allowed - {EOT})):
            break
        token = random.choice(others)
        matcher.consume_token(token)
        state = int(ours.table[state, ours.token_class[token]])


def test_the_distance_is_that_of_the_shortest_text():
    automaton = automaton_of(Grammar("choices", ("the one", "two and two")))
    tokens = token_automaton(automaton, VOCABULARY, TOKENIZER.vocab_size, EOT, [], strict=True)
    assert tokens.distance[0] == len(TOKENIZER.encode(" the one")) == 2
    assert tokens.distance[tokens.after(TOKENIZER.encode(" two"))] == len(TOKENIZER.encode(" and two"))
    few = Vocabulary({i: TEXT[i] for i in TOKENIZER.encode(" two and two")})
    few_tokens = token_automaton(automaton, few, TOKENIZER.vocab_size, EOT, [], strict=True)
    assert few_tokens.distance[0] == len(TOKENIZER.encode(" two and two"))
    with pytest.raises(ValueError, match="cannot be written with the tokens that are not suppressed"):
        token_automaton(automaton, Vocabulary({0: b"x"}), TOKENIZER.vocab_size, EOT, [], strict=True)


def test_a_path_is_read_and_a_text_is_not_a_path(tmp_path: Path):
    from whisper_nnx.decoding.options import DecodingOptions

    file = tmp_path / "g.gbnf"
    file.write_text('root ::= "é"', encoding="utf-8")
    assert DecodingOptions(grammar=file).grammar == 'root ::= "é"'
    with pytest.raises(ValueError, match="give a file as a Path"):
        DecodingOptions(grammar=str(file))
    file.write_bytes(b'root ::= "\xe9"')
    with pytest.raises(ValueError, match=r"grammar='.*g.gbnf' is not UTF-8 text; give a GBNF grammar"):
        DecodingOptions(grammar=file)
