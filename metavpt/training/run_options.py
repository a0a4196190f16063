"""The options that a run's numbers depend on, to recognise a checkpoint of another run.

They are stored as `Options`, dotted keys with plain values. Options that may change when a run is
resumed are left out: the length of its budget, paths, devices, and logging.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Options = dict[str, Any]

LEFT_OUT = {
    *("budget", "runs", "output", "resume", "minimise", "metrics", "tracker"),
    *("allow_targets", "allow_env"),
    *("device", "devices", "nodes", "parallel", "threads"),
    *("strategies", "controls", "vary", "seeds", "match", "warm_start", "jobs"),  # of comparisons
}
LEFT_OUT_OF_TRAINER = {
    *("log_every", "probe_every", "first_order_every", "checkpoint_every"),
    *("max_failures", "data_timeout", "dry_run", "recompute", "compile"),
}
LEFT_OUT_ANYWHERE = {"num_workers", "cache_bytes", "report"}
# Only their presence counts. Of other paths, the last part counts.
PATHS = {"path", "folder", "weights"}
WRITTEN_BY_STEPS = frozenset({"grad_norms", "max_grad_norm"})  # in parameter groups, by clipping


def significant(config: Mapping[str, Any]) -> Options:
    """Select the options that a run's numbers depend on from its resolved configuration."""
    return {
        ".".join(keys): value
        for keys, value in _leaves(config)
        if keys[0] not in LEFT_OUT
        and not (keys[0] == "trainer" and keys[-1] in LEFT_OUT_OF_TRAINER)
        and keys[-1] not in LEFT_OUT_ANYWHERE
    }


def of_optimizer(key: str, groups: Sequence[Mapping[str, Any]]) -> Options:
    """Describe the parameter groups of an optimizer under `key`. Equal values become one."""
    options = {}
    for name in groups[0] if groups else ():
        values = [_plain(group.get(name)) for group in groups]
        if name not in WRITTEN_BY_STEPS | {"params"} and values[0] is not None:
            options[f"{key}.{name}"] = values[0] if values == values[:1] * len(values) else values
    return options


def difference(before: Options, now: Options) -> str | None:
    """Describe up to three options that differ, as in `seed=0, now 1`. None: all are equal.

    A missing option equals one that is null.
    """
    keys = [
        key for key in dict.fromkeys([*before, *now]) if not _equal(before.get(key), now.get(key))
    ]
    named = [f"{key}={before.get(key)}, now {now.get(key)}" for key in keys[:3]]
    more = f"; {len(keys) - 3} more differ" if len(keys) > 3 else ""
    return "; ".join(named) + more if keys else None


def _leaves(node: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, (*keys, str(key)))
    elif isinstance(node, list | tuple):
        for k, value in enumerate(node):
            yield from _leaves(value, (*keys, str(k)))
    elif keys:
        if keys[-1] in PATHS and node is not None:
            node = "(a path)"
        yield keys, node.rsplit("/", 1)[-1] if isinstance(node, str) else _plain(node)


def _plain(value: Any) -> Any:
    """Reduce a value to a form that a checkpoint can hold and compare. None: impossible."""
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    try:
        return float(value)  # a learning rate may be a tensor
    except (TypeError, ValueError, RuntimeError):
        return None


def _equal(a: Any, b: Any) -> bool:
    both_nan = isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)
    return both_nan or a == b
