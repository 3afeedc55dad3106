"""A state dict as people have it, matched to a network: prefixes, other heads, missing counters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from featcache.backbone.networks import heads_of
from featcache.display import say
from featcache.errors import UserError, listed, shown
from featcache.tensor_files import State, not_finite

if TYPE_CHECKING:
    from torch import nn


def _prefix_of(state: State, body: State, source: str) -> str:
    """What the names of the network's own tensors begin with, among all that was saved with them.

    Training scripts put their network under a name (`module.`, `backbone.`, `encoder_q.`), with
    heads, queues and twins beside it. The right prefix is that under which most of the network's
    names are found.

    Raises:
        UserError: There are two networks, and neither is known to be the trained one.
    """
    deepest = 1 + max(name.count(".") for name in body)
    found: Counter[str] = Counter()
    for key in state:
        parts = key.split(".")
        ends = {".".join(parts[-n:]) for n in range(1, deepest + 1)}
        found.update(key.removesuffix(end) for end in ends & body.keys())
    most = max(found.values(), default=0)
    best = sorted((start for start in found if found[start] == most), key=len)
    # MoCo keeps a moving average, encoder_k, beside the network that was trained.
    trained = [start for start in best if start.endswith("encoder_q.")]
    if len(best) > 1 and len(trained) != 1 and most == len(body):
        names = listed([shown(start.rstrip(".") or "no prefix", 60) for start in best], 4)
        raise UserError(
            f"{source} holds more than one such network, under {names}: save the tensors of one"
        )
    return (trained or best or [""])[0]


def load_matching(
    model: nn.Module, state: State, source: str, backbone: str, *, quiet: bool = False
) -> None:
    """Load everything but the head; a network of another shape is a UserError.

    Tensors beside the network, such as prototypes or a projection, are left out. One line says what
    was stripped, ignored or missing.

    Args:
        model: The whole network.
        state: Tensors by name.
        source: What messages call them.
        backbone: What messages call the network.
        quiet: Say nothing, for weights that the network's own library publishes.
    """
    own = model.state_dict()
    heads = tuple(f"{name}." for name in heads_of(model))
    body = {k: v for k, v in own.items() if not k.startswith(heads)}
    counters = {k for k in body if k.endswith("num_batches_tracked")}
    needed = {k: v for k, v in body.items() if k not in counters}
    prefix = _prefix_of(state, needed, source)
    inside = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    parts = {name.partition(".")[0] for name in own}
    unused = (*heads, "aux", "AuxLogits")
    given = {
        k: v for k, v in inside.items() if k.partition(".")[0] in parts and not k.startswith(unused)
    }
    problems = list(_mismatches(body, given, counters))
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        keys = listed([shown(key, 60) for key in sorted(state)], 4)
        raise UserError(
            f"{source} does not fit --backbone {backbone}: {'; '.join(problems[:3])}{more}; "
            f"its keys are {keys} ({len(state)} in all); name the backbone that the weights were "
            "made for"
        )
    ignored = sorted(state.keys() - {prefix + name for name in given})
    notes = list(_notes(prefix, ignored, heads, counters - given.keys()))
    if notes and not quiet:
        say(f"{source}, as weights of {backbone}: {'; '.join(notes)}")
    bad = not_finite(given)
    if bad is not None:
        raise UserError(f"{source}: {bad} has values that are not finite")
    for name, tensor in given.items():
        own[name].copy_(tensor)


def _notes(
    prefix: str, ignored: list[str], heads: tuple[str, ...], missing: set[str]
) -> Iterator[str]:
    """What was stripped from names, which tensors were ignored, and which were missing."""
    if prefix:
        yield f"stripped the prefix {shown(prefix, 60)}"
    of_head = [k for k in ignored if k.removeprefix(prefix).startswith(heads)]
    others = [shown(k, 60) for k in ignored if k not in of_head]
    if of_head:
        yield f"ignored the head {shown(of_head[0].rpartition('.')[0], 60)}"
    if others:
        yield f"ignored {len(others)} tensors that are no part of it: {listed(others, 3)}"
    if missing:
        yield f"{len(missing)} counters num_batches_tracked are missing and stay 0"


def _mismatches(body: State, given: State, optional: set[str]) -> Iterator[str]:
    for name in sorted(body.keys() - given.keys() - optional):
        yield f"{name} is missing"
    for name in sorted(given.keys() - body.keys()):
        yield f"{shown(name, 80)} is not in the network"
    for name in sorted(body.keys() & given.keys()):
        if body[name].shape != given[name].shape:
            yield f"{name} is {list(given[name].shape)}, wanted {list(body[name].shape)}"
