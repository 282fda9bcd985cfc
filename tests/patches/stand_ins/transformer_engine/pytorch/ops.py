"""Operations to fuse: named in annotations, never called."""


class Operation:
    """Any of them."""


def __getattr__(name: str) -> type[Operation]:
    if name.startswith("__"):
        raise AttributeError(name)
    return Operation
