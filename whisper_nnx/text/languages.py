"""Whisper's language codes and English names."""

import re
from difflib import get_close_matches

# In the token order of the released vocabularies. Cantonese, the last, was added in large-v3.
# fmt: off
LANGUAGES: dict[str, str] = {
    "en": "english", "zh": "chinese", "de": "german", "es": "spanish", "ru": "russian", "ko": "korean",
    "fr": "french", "ja": "japanese", "pt": "portuguese", "tr": "turkish", "pl": "polish", "ca": "catalan",
    "nl": "dutch", "ar": "arabic", "sv": "swedish", "it": "italian", "id": "indonesian", "hi": "hindi",
    "fi": "finnish", "vi": "vietnamese", "he": "hebrew", "uk": "ukrainian", "el": "greek", "ms": "malay",
    "cs": "czech", "ro": "romanian", "da": "danish", "hu": "hungarian", "ta": "tamil", "no": "norwegian",
    "th": "thai", "ur": "urdu", "hr": "croatian", "bg": "bulgarian", "lt": "lithuanian", "la": "latin",
    "mi": "maori", "ml": "malayalam", "cy": "welsh", "sk": "slovak", "te": "telugu", "fa": "persian",
    "lv": "latvian", "bn": "bengali", "sr": "serbian", "az": "azerbaijani", "sl": "slovenian", "kn": "kannada",
    "et": "estonian", "mk": "macedonian", "br": "breton", "eu": "basque", "is": "icelandic", "hy": "armenian",
    "ne": "nepali", "mn": "mongolian", "bs": "bosnian", "kk": "kazakh", "sq": "albanian", "sw": "swahili",
    "gl": "galician", "mr": "marathi", "pa": "punjabi", "si": "sinhala", "km": "khmer", "sn": "shona",
    "yo": "yoruba", "so": "somali", "af": "afrikaans", "oc": "occitan", "ka": "georgian", "be": "belarusian",
    "tg": "tajik", "sd": "sindhi", "gu": "gujarati", "am": "amharic", "yi": "yiddish", "lo": "lao",
    "uz": "uzbek", "fo": "faroese", "ht": "haitian creole", "ps": "pashto", "tk": "turkmen", "nn": "nynorsk",
    "mt": "maltese", "sa": "sanskrit", "lb": "luxembourgish", "my": "myanmar", "bo": "tibetan", "tl": "tagalog",
    "mg": "malagasy", "as": "assamese", "tt": "tatar", "haw": "hawaiian", "ln": "lingala", "ha": "hausa",
    "ba": "bashkir", "jw": "javanese", "su": "sundanese", "yue": "cantonese",
}
_OTHER_NAMES = {
    "burmese": "my", "castilian": "es", "flemish": "nl", "haitian": "ht", "letzeburgesch": "lb", "mandarin": "zh",
    "moldavian": "ro", "moldovan": "ro", "panjabi": "pa", "pushto": "ps", "sinhalese": "si", "valencian": "ca",
}
_OTHER_CODES = {  # ISO 639 codes of languages for which Whisper uses another code
    "iw": "he", "ji": "yi", "in": "id", "jv": "jw", "mo": "ro", "nb": "no", "fil": "tl", "cmn": "zh", "arb": "ar",
}
# fmt: on
_CODES = {**{code: code for code in LANGUAGES}, **{name: code for code, name in LANGUAGES.items()}}
_CODES |= {**_OTHER_NAMES, **_OTHER_CODES}
_LOCALE = re.compile(r"([a-z]{2,3})([-_][a-z0-9]{1,8})+([.@].*)?")  # en-US, zh_Hant_TW, de_DE.UTF-8


def to_language_code(text: str) -> str:
    """Converts a code, locale or English name, in any case, to a language code; ValueError if it is unknown."""
    name = text.strip().lower()
    if (locale := _LOCALE.fullmatch(name)) and locale[1] in _CODES:
        name = locale[1]
    if name in _CODES:
        return _CODES[name]
    near = " or ".join(repr(match) for match in get_close_matches(name, _CODES))
    hint = f"did you mean {near}?" if near else "give a code such as 'en' or an English name such as 'german'"
    raise ValueError(f"language {text!r} is unknown to Whisper; {hint}")


def language_or_none(text: str | None) -> str | None:
    """Returns `text`, or None (detect the language) for "auto"."""
    return None if text is not None and text.strip().lower() == "auto" else text
