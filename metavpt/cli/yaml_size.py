"""YAML documents that expand to much more than their size."""

import yaml

MAX_GROWTH = 2**20  # limit on the characters that aliases add to a document
NODE = 100  # characters counted per node, in addition to its value
MAX_INTERPOLATED = 10_000  # limit on a text with interpolations: parsing takes 1 kB per character


def check_yaml(text: str) -> None:
    """Check that aliases and interpolations do not expand a document too far.

    Aliases of aliases double at each line, so 30 lines can stand for a billion nodes. Invalid YAML
    passes, since its reader has the better message.

    Raises:
        ValueError: The document expands too far.
        RecursionError: It is nested too deeply.
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
        sizes[id(node)] = float("inf")  # until it is known, for a node inside of itself
        if isinstance(node, yaml.ScalarNode):
            if "${" in node.value and len(node.value) > MAX_INTERPOLATED:
                raise ValueError(
                    f"a text with interpolations has {len(node.value)} characters; shorten it"
                )
            alone, parts = NODE + len(node.value), []
        else:
            pairs = [item if isinstance(item, tuple) else (item,) for item in node.value]
            alone, parts = NODE, [part for pair in pairs for part in pair]
        own += alone
        sizes[id(node)] = alone + sum(map(size, parts))
        return sizes[id(node)]

    if root is not None and size(root) - own > MAX_GROWTH:
        raise ValueError("the YAML aliases expand too far; write them out or remove them")
