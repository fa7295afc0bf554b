"""The extensions by which recordings are found in a folder; files that are named are read whatever they are called."""

_SUFFIXES = """
3ga 3gp aac ac3 aif aiff amr ape au avi caf dts eac3 flac flv gsm m2ts m4a m4b m4v mka mkv mov mp1 mp2 mp3 mp4 mpeg mpg
mpga mts mxf oga ogg ogv opus ra rm snd spx tak ts tta vob w64 wav weba webm wma wmv wv
"""
SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split())
