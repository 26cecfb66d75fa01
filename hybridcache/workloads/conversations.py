"""conversations: many users take turns with a model; every prompt goes on from all that was said before."""

from collections.abc import Sequence

import numpy as np

from hybridcache.errors import bad, number, whole
from hybridcache.workloads.base import Request, check_ids, uniform_ids

PACES = ("together", "alone")


def conversations(
    *,
    num_conversations: int = 64,
    first_tokens: int = 2000,
    rounds: int = 4,
    output_tokens: int = 100,
    new_tokens: int = 400,
    paced: str = "together",
    think_s: float = 0.0,
    first_id: int = 1000,
    end_id: int = 150_000,
    label: str = "conversations",
    seed: int = 0,
) -> "Conversations":
    """Conversations of the same shape that all begin at 0 s, in a closed loop.

    The first prompts are independent; the prompt of every later round is the prompt before, its output, and new ids.

    Args:
        num_conversations: how many.
        first_tokens: of every first prompt.
        rounds: requests of each conversation.
        output_tokens: of every request.
        new_tokens: what a user adds in every later round.
        paced: ``together`` starts a round when the last request of the round before has ended; ``alone`` lets each
            conversation go on by itself.
        think_s: from that moment to the arrival.
        first_id, end_id: ids lie in ``first_id .. end_id - 1``, uniform and independent; drawn outputs, too.
        label: the workload's name in results.
        seed: of the ids.

    Raises:
        UserError: a value out of range.
    """
    shape = {"num_conversations": num_conversations, "first_tokens": first_tokens, "rounds": rounds}
    for name, value in {**shape, "output_tokens": output_tokens, "new_tokens": new_tokens}.items():
        whole(name, value)
    if paced not in PACES:
        raise bad("paced", paced, f"choose one of {', '.join(PACES)}")
    number("think_s", think_s)
    check_ids(first_id, end_id)
    lengths = (first_tokens, rounds, output_tokens, new_tokens)
    return Conversations(
        label, num_conversations, lengths, paced == "together", think_s, (first_id, end_id), whole("seed", seed, 0)
    )


class Conversations:
    """The closed loop that :func:`conversations` describes; a :class:`~hybridcache.workloads.base.Stream`. The request of
    conversation ``c`` in round ``r`` (from 0) has the id ``r * num_conversations + c``."""

    def __init__(
        self,
        name: str,
        count: int,
        lengths: tuple[int, int, int, int],
        together: bool,
        think_s: float,
        ids: tuple[int, int],
        seed: int,
    ) -> None:
        self.name = name
        self.source = f"conversations seed={seed}"
        self._options = (name, count, lengths, together, think_s, ids, seed)
        self._draws = [np.random.default_rng([seed, i]) for i in range(count)]
        self._running: dict[int, Request] = {}
        self._next: dict[int, np.ndarray] = {}
        """The next prompts of conversations that wait for the others of their round."""

    def fresh(self) -> "Conversations":
        return Conversations(*self._options)

    def begin(self) -> list[Request]:
        """The first request of each conversation, at 0 s."""
        _, count, (first, *_), *_ = self._options
        return [self._release(i, 0, 0.0, self._draw(i, first)) for i in range(count)]

    def ended(
        self, request_id: int, now_s: float, output_ids: Sequence[int] | np.ndarray | None = None, aborted: bool = False
    ) -> list[Request]:
        """See :class:`~hybridcache.workloads.base.Stream`: later prompts hold ``output_ids`` where they are given."""
        _, count, (_, rounds, _, new), together, think_s, _, _ = self._options
        request = self._running.pop(request_id)
        turn, session = request.turn + 1, request_id % count
        if turn < rounds and not aborted:
            said = request.output_ids if output_ids is None else output_ids
            parts = (request.prompt_ids, said, self._draw(session, new))
            self._next[session] = np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])
        if together and self._running:
            return []
        prompts, self._next = self._next, {}
        return [self._release(one, turn, now_s + think_s, prompts[one]) for one in sorted(prompts)]

    def _release(self, session: int, turn: int, arrival_s: float, prompt: np.ndarray) -> Request:
        _, count, (_, _, output, _), *_ = self._options
        request_id, said = turn * count + session, self._draw(session, output)
        request = Request(request_id, arrival_s, len(prompt), output, prompt, said, session=session, turn=turn)
        self._running[request_id] = request
        return request

    def _draw(self, session: int, count: int) -> np.ndarray:
        return uniform_ids(self._draws[session], *self._options[5], count)
