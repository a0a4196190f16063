"""YAML documents that stand for far more than they hold."""

import yaml

from metavpt.errors import MetaVPTError

MAX_GROWTH = 2**20  # characters that the aliases of a document may add to it
NODE = 100  # characters that a node counts for, beside those of its value
MAX_INTERPOLATED = 10_000  # characters of a text with interpolations: parsing one takes 1 kB each


def check_yaml(text: str) -> None:
    """Raise MetaVPTError for a document whose aliases or interpolations take far more than it.

    Aliases of aliases double at each line: 30 lines can stand for a billion nodes. A document that
    is no valid YAML passes, because its reader has the better message. One that is nested too
    deeply raises RecursionError.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return
    sizes: dict[int, float] = {}  # of nodes by their identity, each with all that is below it
    own = 0

    def size(node: yaml.Node) -> float:
        nonlocal own
        if id(node) in sizes:
            return sizes[id(node)]
        sizes[id(node)] = float("inf")  # until it is known: a node inside of itself
        if isinstance(node, yaml.ScalarNode):
            if "${" in node.value and len(node.value) > MAX_INTERPOLATED:
                raise MetaVPTError(
                    f"a text with interpolations is {len(node.value)} characters long"
                )
            alone, parts = NODE + len(node.value), []
        else:
            pairs = [item if isinstance(item, tuple) else (item,) for item in node.value]
            alone, parts = NODE, [part for pair in pairs for part in pair]
        own += alone
        sizes[id(node)] = alone + sum(map(size, parts))
        return sizes[id(node)]

    if root is not None and size(root) - own > MAX_GROWTH:
        raise MetaVPTError("the aliases of the YAML document stand for far more than it holds")
