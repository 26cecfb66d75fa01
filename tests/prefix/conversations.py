"""Random conversations for an engine: many turns, shared beginnings, aborts; and what they say with everything off."""

import random
from dataclasses import dataclass, field, replace

from hybridcache.engine.sampling import CHILD_BITS, SamplingParams


@dataclass
class Conversation:
    """Turns to come; a turn's prompt is the last one, its output (sometimes cut, as templates do), and new tokens."""

    prompt: list[int]
    turns: list[tuple[list[int], SamplingParams, float]]
    """New tokens of each turn, its sampling, and how much of the last output the next prompt keeps. Of several outputs, the
    last one is gone on with."""
    outputs: list[list[list[int]]] = field(default_factory=list)
    """Of each turn so far."""

    def next_prompt(self) -> list[int]:
        new, _, kept = self.turns[len(self.outputs)]
        if self.outputs:
            last = self.outputs[-1][-1]
            self.prompt = self.prompt + last[: round(kept * len(last))]
        self.prompt = self.prompt + new
        return self.prompt

    @property
    def params(self) -> SamplingParams:
        return self.turns[len(self.outputs)][1]

    @property
    def done(self) -> bool:
        return len(self.outputs) == len(self.turns)

    def anew(self) -> "Conversation":
        return Conversation(self.prompt, self.turns)


def draw(seed: int, count: int, longest: int = 60) -> list[Conversation]:
    """``count`` conversations of 1 to 5 turns; some begin with one of three heads, some exactly alike."""
    rng = random.Random(seed)
    heads = [[rng.randrange(101) for _ in range(rng.randrange(40, 200))] for _ in range(3)]
    found = []
    for _ in range(count):
        start = rng.choice([[], *heads])
        start = start[: rng.choice([len(start), 64, 100])]
        turns = []
        for _turn in range(rng.randrange(1, 6)):
            params = SamplingParams(
                max_tokens=rng.randrange(1, 16),
                temperature=rng.choice([0.0, 0.0, 0.9]),
                seed=rng.randrange(1000),
                stop_token_ids=tuple(rng.sample(range(101), rng.choice([0, 0, 20]))),
                n=rng.choice([1, 1, 1, 2, 3, 4]),
            )
            new = [rng.randrange(101) for _ in range(rng.randrange(1, longest))]
            turns.append((new, params, rng.choice([1.0, 1.0, 1.0, 0.5, 0.0])))
        found.append(Conversation(start, turns))
        if rng.random() < 0.2:
            found.append(found[-1].anew())
    return found[:count]


def group(seq) -> tuple:
    """The requests that give a prompt's outputs."""
    return seq.siblings or (seq,)


def num_requests(conversations: list[Conversation]) -> int:
    return sum(params.n for conversation in conversations for _, params, _ in conversation.turns)


def expected_outputs(engine, conversations: list[Conversation]) -> list[list[list[list[int]]]]:
    """One prompt at a time; the ``i``-th of several outputs by a request for one, with the key that is the ``i``-th's."""
    for conversation in conversations:
        while not conversation.done:
            prompt, params = conversation.next_prompt(), conversation.params
            seqs = [engine.add_request(prompt, replace(params, n=1)) for _ in range(params.n)]
            for child, seq in enumerate(seqs):
                seq.key = (params.seed, child << CHILD_BITS)
            engine.run()
            conversation.outputs.append([seq.output_ids for seq in seqs])
            for seq in seqs:
                engine.forget(seq.seq_id)
    return [conversation.outputs for conversation in conversations]


def converse(
    engine, conversations, seed: int, check, aborts: float = 0.0, aborted: list | None = None, arrivals: float = 0.3
) -> list:
    """All at once: turns begin as others end, and some are aborted (named in ``aborted``) and asked again. ``check`` is called
    after every step; before each, a turn begins with probability ``arrivals``, then another one, and so on."""
    rng = random.Random(seed)
    idle, running = list(conversations), {}
    while idle or running:
        while idle and (rng.random() < arrivals or not running):
            conversation = idle.pop(rng.randrange(len(idle)))
            before = conversation.prompt
            seq = engine.add_request(conversation.next_prompt(), conversation.params)
            running[seq.seq_id] = (seq, conversation, before)
        engine.step()
        check()
        for seq_id, (seq, conversation, before) in list(running.items()):
            reasons = {one.finish_reason for one in group(seq)}
            if None in reasons and rng.random() < aborts:
                engine.abort(seq_id)
                if aborted is not None:
                    aborted += [one.seq_id for one in group(seq)]
                assert None not in {one.finish_reason for one in group(seq)}
                conversation.prompt = before
                idle.append(conversation)
            elif None in reasons:
                continue
            elif reasons <= {"length", "stop"}:
                conversation.outputs.append([list(one.output_ids) for one in group(seq)])
                if not conversation.done:
                    idle.append(conversation)
            else:
                raise AssertionError(f"request {seq_id} ended by {reasons}: {[one.error for one in group(seq)]}")
            del running[seq_id]
            for one in group(seq):
                engine.forget(one.seq_id)
    return [conversation.outputs for conversation in conversations]
