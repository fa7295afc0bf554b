"""Grammars that are not regular, by llguidance: against a parser of brackets, and automata where both can be had."""

import itertools
import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.grammar.test_automaton import EOT, NESTED, TEXT, TOKENIZER, VOCABULARY, pieces
from whisper_nnx.grammar.automaton import byte_automaton
from whisper_nnx.grammar.grammar import Grammar, automaton_of
from whisper_nnx.grammar.lark import Lark, lark_of_rules
from whisper_nnx.grammar.parser import Parsers, TokenParser, llguidance_tokenizer, token_parser
from whisper_nnx.grammar.regex import read_regex
from whisper_nnx.grammar.tokens import token_automaton

SIZE, TIMES = TOKENIZER.vocab_size, [TOKENIZER.special.timestamp_begin, TOKENIZER.special.timestamp_end]
IDS = {*TEXT, EOT, *TIMES}
TOKENS = llguidance_tokenizer(TEXT, SIZE, EOT)


def parser_of(grammar: Grammar | Lark, *, strict: bool = True) -> TokenParser:
    form = automaton_of(grammar) if isinstance(grammar, Grammar) else grammar
    assert isinstance(form, Lark)
    return token_parser(form, "grammar", TOKENS, SIZE, EOT, TIMES, strict=strict)


def allowed(parsers: Parsers, parser: TokenParser, text: list[int]) -> set[int]:
    tokens = np.array([[*text, 0, 0]], np.int32)
    [mask] = parsers.masks(-(-SIZE // 32), np.array(parsers.use([parser])), tokens, np.array([len(text)]))
    return set(np.unpackbits(mask.view(np.uint8), bitorder="little").nonzero()[0].tolist())


def matches(parser: TokenParser, text: str) -> bool:
    return EOT in allowed(Parsers(), parser, TOKENIZER.encode(text))


BRACKETS = 'root ::= " "* "(" root ")" root | ""'


def may_follow(text: bytes) -> tuple[bool, bool]:
    """Whether a text is the beginning of one of brackets, and whether it is whole."""
    depth = 0
    for byte in text:
        depth += {ord("("): 1, ord(")"): -1, ord(" "): 0}.get(byte, -1000)
        if depth < 0:
            return False, False
    return True, not depth and not text.endswith(b" ")


@settings(deadline=None, max_examples=20)
@given(st.randoms(use_true_random=False))
def test_brackets_are_those_that_close(random):
    parsers, parser, text = Parsers(), parser_of(Grammar("grammar", BRACKETS)), []
    for _ in range(20):
        found = allowed(parsers, parser, text)
        written = b"".join(TEXT[i] for i in text)
        # A space is followed by a bracket that opens, which any text may continue with, but a closing one does not.
        expected = {i for i, piece in TEXT.items() if may_follow(written + piece)[0] and b" )" not in written + piece}
        ends = may_follow(written)[1]
        assert found == expected | ({EOT, *TIMES} if ends else set() if text else {*TIMES})
        text.append(random.choice(sorted(found - {EOT, *TIMES})))


@settings(deadline=None, max_examples=30)
@given(pieces, st.booleans(), st.randoms(use_true_random=False))
def test_a_regular_grammar_allows_what_its_automaton_allows(pattern, strict, random):
    expression = read_regex(pattern)
    parser = parser_of(lark_of_rules({"root": expression}, "root"), strict=strict)
    automaton = token_automaton(byte_automaton(expression), VOCABULARY, SIZE, EOT, TIMES, strict=strict)
    parsers, text = Parsers(), list[int]()
    for _ in range(8):
        row = automaton.table[automaton.after(text)]
        found = allowed(parsers, parser, text)
        assert found & IDS == set(np.flatnonzero(row[automaton.token_class] >= 0).tolist()) & IDS
        others = sorted((set(TEXT) if not strict and random.random() < 0.1 else found) & set(TEXT))
        if not others:
            break
        text.append(random.choice(others))


SUM = 'root ::= root "+" one | one\none ::= "x" | "(" root ")"'
VALUE = r"""
root   ::= object | list | word
object ::= "{" (word ": " root (", " word ": " root)*)? "}"
list   ::= "[" (root (", " root)*)? "]"
word   ::= "\"" [^"\\\x00-\x1f]* "\""
"""


@pytest.mark.parametrize(
    ("grammar", "yes", "no"),
    [
        (("grammar", 'root ::= "(" root ")" | "x"'), ["x", "(" * 40 + "x" + ")" * 40], ["(x", "x)", "", "((x)"]),
        (("grammar", SUM), ["x+x+x", "(" * 30 + "x+x" + ")" * 30 + "+x"], ["(x", "x+", "(x))", "+x"]),
        (("grammar", 'root ::= "é" root "☃" | ""'), ["", "é" * 9 + "☃" * 9], ["é", "é" * 9 + "☃" * 8]),
        (
            ("grammar", 'root ::= "a" root "a" | "b" root | dead\ndead ::= "d" dead | "c"'),
            ["bbc", "abadcaa"],
            ["d", "abadca"],
        ),
        # A longer terminal would win against the two that the rest needs.
        (("grammar", 'root ::= "a" "b" "c" | "ab" "d" | "(" root ")"'), ["abc", "abd", "(abc)"], ["ab", "(ab)"]),
        (("grammar", VALUE), ['{"é": [[[[[[["x"], {}]]]]]]}', "[" * 20 + "]" * 20], ["[", '{"a": x}', '["x"]]']),
        (("json_schema", json.dumps(NESTED)), ["[" * 20 + "]" * 20, " [[ ], []]"], ["[1]", "[[]", "[\n]", "[[],]"]),
    ],
    ids=str,
)
def test_recursion_has_no_limit(grammar, yes, no):
    parser = parser_of(Grammar(*grammar))
    assert [text for text in yes if not matches(parser, text)] == []
    assert [text for text in no if matches(parser, text)] == []


def test_a_schema_of_many_definitions_is_whole():
    """Beyond the depth that outlines-core expands them to."""
    names = [f"d{n}" for n in range(8)]
    inner = {a: {"type": "array", "items": {"$ref": f"#/$defs/{b}"}} for a, b in itertools.pairwise(names)}
    parser = parser_of(
        Grammar("json_schema", json.dumps({"$ref": "#/$defs/d0", "$defs": inner | {"d7": {"const": 1}}}))
    )
    assert matches(parser, "[[[[[[[1]]]]]]]")
    assert not matches(parser, "[[[[[[[[1]]]]]]]]")


def test_without_llguidance_an_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ImportError, match="rule 'root' contains itself other than at one end, which needs llg"):
        automaton_of(Grammar("grammar", 'root ::= "(" root ")" | "without"'))
    assert automaton_of(Grammar("grammar", 'root ::= "(" root | "without"'))


def test_a_grammar_that_is_too_complex_ends_the_text_with_a_warning():
    many = " | ".join(f'"a"{{{n}}}' for n in range(3000))
    parser, parsers = parser_of(Grammar("grammar", f'root ::= "(" root ")" | "b" ({many})')), Parsers()
    assert allowed(parsers, parser, TOKENIZER.encode("("))
    with pytest.warns(UserWarning, match="a text of grammar is cut off; llguidance: Parser Error: Current row has"):
        assert allowed(parsers, parser, TOKENIZER.encode("(b")) == {EOT}


def test_texts_that_are_forgotten_are_parsed_again(monkeypatch):
    parsers, parser = Parsers(), parser_of(Grammar("grammar", BRACKETS))
    text = TOKENIZER.encode("((")
    first = allowed(parsers, parser, text)
    monkeypatch.setattr("whisper_nnx.grammar.parser.MAX_TEXTS", 3)
    for n in range(5):
        allowed(parsers, parser, [n])
    assert len(parsers._texts) == 3
    assert allowed(parsers, parser, text) == first
