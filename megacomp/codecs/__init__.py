"""Codecs: what the bytes on the wire mean.

``get("mxfp4")`` makes a codec from a preset's name or a specification; ``presets()`` lists the names.
"""

from megacomp.codecs import operators  # noqa: F401 -- registers torch.ops.megacomp
from megacomp.codecs.block import BlockCodec
from megacomp.codecs.codec import DTYPES, Codec
from megacomp.codecs.specification import CodecError, from_key, get, presets
from megacomp.codecs.static import StaticCodec

__all__ = ["DTYPES", "BlockCodec", "Codec", "CodecError", "StaticCodec", "from_key", "get", "presets"]
