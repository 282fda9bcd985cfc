"""Names of dtypes; none is used."""

__all__ = ["TE_DType"]

TE_DType: dict[object, object] = {}
