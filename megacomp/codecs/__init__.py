"""Codecs: what the bytes on the wire mean.

``get("mxfp4")`` makes a codec from a preset's name or a specification; ``presets()`` lists the names.
"""

from megacomp.codecs.codec import Codec
from megacomp.codecs.specification import CodecError, get, presets

__all__ = ["Codec", "CodecError", "get", "presets"]
