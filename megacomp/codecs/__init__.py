"""Codecs: what the bytes on the wire mean.

``get("mxfp4")`` makes a codec from a preset's name or a specification; ``presets()`` lists the names.
"""

from megacomp.codecs.codec import DTYPES, Codec
from megacomp.codecs.specification import CodecError, get, presets

__all__ = ["DTYPES", "Codec", "CodecError", "get", "presets"]
