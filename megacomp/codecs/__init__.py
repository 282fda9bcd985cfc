"""Codecs: what the bytes on the wire mean.

``get("mxfp4")`` makes a codec from a preset's name or a specification; ``presets()`` lists the names.
"""

from megacomp.codecs import operators  # noqa: F401 -- registers torch.ops.megacomp
from megacomp.codecs.codec import DTYPES, Codec
from megacomp.codecs.specification import CodecError, from_key, get, presets

__all__ = ["DTYPES", "Codec", "CodecError", "from_key", "get", "presets"]
