"""Texts are normalized as openai-whisper does it: 4,000 generated ones, which together reach every rule."""

import random
import re
import warnings
from collections.abc import Iterator

import pytest
from whisper.normalizers import BasicTextNormalizer, EnglishTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer as PackagesOwn

from whisper_nnx.evaluation.normalizers import _normalizer, normalize, split

N = 4_000
ONES = "zero|oh|one|two|three|four|five|nine|ten|eleven|thirteen|nineteen|twenty|fifty|ninety"
KINDS = f"""{ONES}
{ONES}
hundred|thousand|million|billion|hundredth|thousandths|dozen|half|double|triple
first|second|third|fifths|ninth|twelfth|twentieth|1st|22nd|3rd|40th|101st|1960s|thirties|sixes
dollars|dollar|cents|euros|pounds|pence|$|€|£|¢|US$|per cent|percent
won't|can't|let's|ain't|y'all|wanna|kinda|sorta|dunno|gotta|gonna|i'ma|imma|woulda|coulda|shoulda|cause|ma'am|'t've
it'd been|she's been|he'd gone|it's gone|i'd done|who's got|don't|we're|that's|i'd|they'll|i've|I'M|rock'n
mr.|Mrs|st.|dr|prof.|Capt|gov|ald|gen|sen|rep|pres|rev|hon|asst|assoc|lt|col|jr.|sr|esq
colour|centre|analyse|travelled|judgement|Grey|organisation|paediatric|manoeuvre|theatre|jewellery
hmm|mm|mhm|mmm|uh|um|Uh,|UM...|uhm
[music]|<i>|</i>|(laughs loudly)|[|)|((nested) more)|<~en~>|[a > b]|()|( )
naïve|œuvre|Ørsted|straße|ẞ|đà|Þór|łódź|e\u0301te\u0301|ﬁn|Å|İstanbul
Привет|你好，世界|こんにちは|ありがとう。|สวัสดี|नमस्ते|שָׁלוֹם|السَّلام|한국어|ελληνικά|🙂|٣٤|१२
and|point|minus|negative|a|the|of|by|old man|Cats|o'clock"""
POOLS = [line.split("|") for line in KINDS.splitlines()]
MARKS = ". , ! ? ... — - – ' ’ \" “ % & ½ ² № _ / \u00a0 \n \t"


def number(rng: random.Random) -> str:
    """With what may stand before and after it."""
    whole = f"{rng.randrange(10 ** rng.randrange(1, 8)):,}" if rng.random() < 0.5 else str(rng.randrange(5000))
    fraction = rng.choice(["", "", f".{rng.randrange(100)}", f",{rng.randrange(10)}", f"/{rng.randrange(1, 9)}", "."])
    before = rng.choice(["", "", "$", "€", "£", "-", "+", "¢", "."])
    after = rng.choice(["", "", "%", "th", "s", "M", "¢"])
    return before + whole + fraction + after


def letters(rng: random.Random) -> str:
    """Of any script."""
    begins = (0x20, 0xA0, 0x250, 0x400, 0x900, 0xC00, 0x1E00, 0x2200, 0x3000, 0x5000, 0x1D400, 0x1F500)
    return "".join(chr(rng.choice(begins) + rng.randrange(0x200)) for _ in range(rng.randrange(1, 6)))


def texts() -> Iterator[str]:
    for seed in range(N):
        rng = random.Random(seed)
        parts = []
        for _ in range(rng.randrange(1, 16)):
            kind = rng.random()
            part = number(rng) if kind < 0.15 else letters(rng) if kind < 0.2 else rng.choice(rng.choice(POOLS))
            part = rng.choice([part, part, part, part.upper(), part.capitalize()])
            parts.append(part + (rng.choice(MARKS.split(" ")) if rng.random() < 0.2 else ""))
        yield rng.choice([" ", " ", " ", "  ", "-", ", "]).join(parts)


@pytest.fixture(scope="module")
def generated() -> list[str]:
    return list(texts())


@pytest.fixture(scope="module")
def english() -> EnglishTextNormalizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves a file open
        return EnglishTextNormalizer()


def test_english_texts_are_normalized_as_by_openai_whisper(generated, english):
    expected = [english(text) for text in generated]
    assert [_normalizer("english")(text) for text in generated] == expected
    assert [normalize(text, "en") for text in generated] == [" ".join(text.split()) for text in expected]


def test_texts_in_other_languages_are_normalized_as_by_openai_whisper(generated):
    reference = BasicTextNormalizer()
    expected = [reference(text) for text in generated]
    assert [_normalizer("basic")(text) for text in generated] == expected
    assert [normalize(text, "de") for text in generated] == [" ".join(text.split()) for text in expected]


@pytest.mark.parametrize("language", ["zh", "ja", "th", "lo", "my", "yue"])
def test_letters_are_those_that_openai_whisper_splits(generated, language):
    reference = BasicTextNormalizer(split_letters=True)
    assert [split(text, language) for text in generated] == [reference(text).split() for text in generated]


@pytest.mark.slow
def test_the_package_alone_would_differ_on_these_texts(generated, english):
    packages_own = PackagesOwn()
    assert sum(english(text) != packages_own(text) for text in generated) > 100


@pytest.mark.slow
def test_the_texts_reach_every_rule(generated, english):
    every = "\n".join(generated).lower()
    assert [pattern for pattern in english.replacers if not re.search(pattern, every)] == []
    normal = " ".join(english(text) for text in generated).split()
    signs = ("$20", "€5", "£3", "¢5", "2%", "1st", "40th", "color", "-1", "1960s", "doctor")
    assert [sign for sign in signs if not any(word.startswith(sign) for word in normal)] == []
