"""Whether the processes of a run agree, asked through the key-value store of JAX's coordinator.

No collective is involved: processes with different programs would wait in one for ever.
"""

import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any

from sympow_jax.sharding.peers import PATIENCE, absent, coordination
from sympow_jax.sharding.waiting import wait_for

_calls = itertools.count()


def agree(topic: str, facts: Mapping[str, Any], *, advice: str) -> None:
    """Raises ValueError, in every process, unless all called this with the same facts; nothing in a run of one process.

    Args:
      topic: a name for the question.
      facts: JSON values by name.
      advice: what to do about a difference, the end of the line.

    Raises:
      ValueError: in one line, the names that differ, with the values and whose they are.
    """
    values = gather(topic, {name: json.dumps(value) for name, value in facts.items()})
    if wrong := differences(values):
        raise ValueError(f"{wrong}; {advice}")


def gather(topic: str, mine: Any) -> list[Any]:
    """What each process gave, JSON values in order; [mine] in a run of one process. All call it, in the same order."""
    client, index, count = coordination()
    if client is None:
        return [mine]
    folder = f"sympow_jax/{topic}/{next(_calls)}"
    client.key_value_set(f"{folder}/{index}", json.dumps(mine))

    def meet() -> str:
        if index == 0:
            texts = [client.blocking_key_value_get(f"{folder}/{i}", PATIENCE) for i in range(count)]
            client.key_value_set(f"{folder}/all", f"[{','.join(texts)}]")
        return client.blocking_key_value_get(f"{folder}/all", PATIENCE)

    values = json.loads(wait_for(meet, lambda: absent(client, folder, count), f"to agree on: {topic}"))
    client.key_value_delete(f"{folder}/{index}")
    return values


def from_first(topic: str, find: Callable[[], Any], error: type[Exception] = ValueError) -> Any:
    """What `find` returns in process 0, JSON values, in every process; an `error` that it raises there too.

    All call it, as `gather`.
    """
    found, problem = None, ""
    if coordination()[1] == 0:
        try:
            found = find()
        except error as caught:
            problem = str(caught)
    found, problem = gather(topic, [found, problem])[0]
    if problem:
        raise error(problem)
    return found


def differences(values: list[dict[str, str]], *, most: int = 5) -> str:
    """ "optimizer.learning_rate: 0.003 in process 0, 0.001 in process 1" for each name that differs; "" for none."""
    found = []
    for name in {name: None for each in values for name in each}:
        owners: dict[str, list[int]] = {}
        for index, each in enumerate(values):
            owners.setdefault(each.get(name, "absent"), []).append(index)
        if len(owners) > 1:
            found.append(f"{name}: " + ", ".join(f"{value} in {_processes(who)}" for value, who in owners.items()))
    more = f"; and {len(found) - most} more" if len(found) > most else ""
    return "; ".join(found[:most]) + more


def _processes(indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:4])) + (f" and {len(indices) - 4} more" if len(indices) > 4 else "")
    return f"process{'es' * (len(indices) > 1)} {shown}"
