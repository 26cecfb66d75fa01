"""PrefixCache: keeps states and KV of what was computed, so that later requests resume from them.

A recurrent state cannot be cut, so a prompt can only go on from a position at which its states were kept: a *checkpoint*, an
owner of blocks beside the running requests, which holds the states at its position and the KV up to there. Where the position
is the end of a step, it shares the states that the step leaves (the request writes its next ones elsewhere); where it lies
inside a prefill chunk, the prefill kernel writes them to blocks of the checkpoint's own; where a request ends, it takes them
over. A request that begins with a checkpoint's tokens shares the KV, reads the states from the checkpoint and writes its own.

Checkpoints never cost a running request its memory: when blocks are short they are evicted before anybody is preempted. A
waiting request's checkpoint is evicted after all others, that of the last in the queue first.
"""

import heapq
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from hybridcache.prefix.index import Node
from hybridcache.prefix.live import LiveCheckpoints, Prompt, alive
from hybridcache.prefix.placement import every_n, floor_position, log_spaced, optimal, uniform
from hybridcache.prefix.planned import Planned, Scheduled
from hybridcache.prefix.points import Place, Point, Standing


class PrefixCache(LiveCheckpoints):
    """Checkpoints, and the requests that make and use them; see the module. :class:`.LiveCheckpoints` has the arguments."""

    # -- requests --------------------------------------------------------------------------------------------------

    def submitted(self, seq: Any) -> None:
        """A request came: note its tokens, learn from them, and keep the checkpoint that it is going to resume from."""
        self._forget_past()
        tokens = seq.tokens(0, seq.num_known).astype(np.int32, copy=False)
        prompt = self._prompts[seq.seq_id] = Prompt(tokens)
        if seq.siblings and self._join_siblings(seq, prompt):
            return
        prompt.wanted_at = dict.fromkeys(self._pins.inside(tokens), Place.EXPLICIT)
        walk = self.index.walk(tokens)
        found, known = None, walk.node
        for node in walk.node.path():
            point = node.point
            if point is not None and node.end < len(tokens):
                if known is walk.node:
                    self._order.reused(point, self.now_s)
                    self._reused_copy(point)
                    point.touch(self.now_s)
                    self._reused_copy(point)
                    prompt.latest, known = point, node
                    self._abandon_others(point)
                if point.live:
                    found = point
                    break
        if found is not None:
            self._protect(found, prompt)
        shared = min(walk.length, len(tokens) - 1)
        if walk.node.end < walk.length or walk.node.children:
            before = (walk.edge or walk.node).end
            self.depths.parted(before - walk.length)
        self._note_branch(seq.seq_id, prompt, walk.edge or walk.node, shared, walk)
        leaf = self.index.insert(tokens, walk if prompt.branch is None else None)  # a branch has changed the index
        leaf.owner = seq.seq_id
        if seq.fork_at > 0:
            prompt.fork = self.index.insert(tokens[: seq.fork_at])

    def _join_siblings(self, seq: Any, prompt: Prompt) -> bool:
        """What holds for a sibling that came before holds for this request too. False where none came."""
        before = next((known for s in seq.siblings if s is not seq and (known := self._prompts.get(s.seq_id))), None)
        if before is None:
            return False
        prompt.branch, prompt.fork = before.branch, before.fork
        if before.wanted is not None and before.wanted.live:
            self._protect(before.wanted, prompt)
        return True

    def _awaited(self, seq: Any) -> list[Prompt]:
        """The siblings of a request that wait."""
        known = (self._prompts.get(s.seq_id) for s in seq.siblings if s is not seq)
        return [prompt for prompt in known if prompt is not None and prompt.waits]

    def _abandon_others(self, point: Point) -> None:
        """A request goes on from a checkpoint that had been superseded: the later ones are left behind, unless many sequences
        share it."""
        if point.standing is not Standing.SUPERSEDED or point.place is Place.BRANCH:
            return
        for later in point.live_after():
            other: Point | None = later
            while other is not None:
                if other.standing is Standing.LATEST:
                    self._order.stands(other, Standing.ABANDONED)
                after = other.live_after()
                other = after[0] if len(after) == 1 else None

    def _note_branch(self, seq_id: int, prompt: Prompt, other: Node, shared: int, walk: Any) -> None:
        """Where the prompt parts from another one, plan a checkpoint for both of them."""
        position = floor_position(shared)
        if "branch_points" not in self._places or position == 0:
            return
        whole = shared < walk.length
        parts = walk.edge is not None or bool(walk.node.children) or whole
        running = other.owner in self._prompts
        if not (parts or running):
            return  # it goes on where a sequence ended: no second way from here
        known = prompt.latest
        if known is not None and known.live and known.position >= position:
            return
        prompt.branch = self.index.insert(prompt.tokens[:position])
        prompt.wanted_at[position] = Place.BRANCH
        if running and other.owner != seq_id:
            first = self._prompts[other.owner]  # type: ignore[index]
            first.wanted_at.setdefault(position, Place.BRANCH)
            first.branch = first.branch or prompt.branch

    def holds_back(self, seq: Any) -> bool:
        """Whether a waiting request had better wait: a running one is about to keep a checkpoint of tokens that it shares."""
        prompt = self._prompts.get(seq.seq_id)
        if prompt is None:
            return False
        if self.host is not None:
            self.host.poll()
            if prompt.recall is not None:
                return True
        makers = [node.maker for node in (prompt.branch, prompt.fork) if node is not None]
        return any(maker is not None and maker != seq.seq_id and maker in self._prompts for maker in makers)

    def find(self, seq: Any) -> Point | None:
        """The deepest checkpoint from which the request can resume, whether it lives or its copy is worth bringing back; None
        where there is none."""
        prompt = self._prompts.get(seq.seq_id)
        if prompt is None:
            return None
        if len(prompt.tokens) != seq.num_known:  # it was preempted: its output is known by now
            prompt.tokens, prompt.version = seq.tokens(0, seq.num_known).astype(np.int32, copy=False), -1
        if prompt.version != self._version:
            path = list(self.index.walk(prompt.tokens).node.path())
            alive = (n.point for n in path if n.point is not None and n.point.live and n.end < seq.num_known)
            prompt.found, prompt.version = next(alive, None), self._version
            if self.host is not None and not prompt.on_device:
                prompt.found = self.host.deeper(path, prompt.found, seq.num_known)
        return prompt.found

    def cut(self, seq: Any, start: int, tokens: int) -> int:
        """How many of these tokens from ``start`` on the next step computes (0: none of them in this step)."""
        return tokens

    def admit(self, seq: Any, found: Point | None, tokens: int, prompt: int | None = None, *, urgent: bool) -> bool:
        """Take memory for the first ``tokens`` tokens of a request, resuming from ``found``. Where memory is short, checkpoints
        are evicted, and at last ``found`` is taken over. False where that does not do, or where ``found`` comes from the host
        and is on its way (:meth:`holds_back`).

        Args:
            seq: the request.
            found: from :meth:`find`.
            tokens: to be computed by the next step, and those before them.
            prompt: ``prompt_tokens`` of :meth:`Strategy.admit`.
            urgent: see :meth:`make_room`.
        """
        strategy = self.strategy
        if found is not None and not found.live:
            assert self.host is not None
            if not self.host.recall(self._prompts[seq.seq_id], found, urgent=urgent):
                return False
        while True:
            if found is None:
                admitted = strategy.admit(seq.seq_id, tokens, prompt_tokens=prompt)
            else:
                admitted = strategy.restore(seq.seq_id, found.key, tokens, prompt_tokens=prompt)
            if admitted or not self.make_room(urgent=urgent, but=found, idle=urgent):
                break
        takes_over = found is not None and (urgent or not found.pinned)
        while not admitted:
            if takes_over and found is not None:
                admitted = strategy.restore(seq.seq_id, found.key, tokens, prompt_tokens=prompt, take_over=True)
            elif found is None:
                admitted = strategy.admit(seq.seq_id, tokens, prompt_tokens=prompt)
            if not admitted and not self._yield_wanted(found):
                break
        if admitted and takes_over and found is not None and found.key not in strategy.cached:
            self._evict(found, dropped=True)
        return admitted

    def _yield_wanted(self, but: Point | None) -> bool:
        """Evict the checkpoint of the last waiting request, so that an earlier one need not wait, as long as those kept for
        waiting requests are more than their share."""
        waiting, running = len(self._protected), len(self.strategy.residents)
        if waiting <= self.policy.wanted_share * (waiting + running):
            return False
        victim = next((point for point in reversed(self._protected) if point is not but), None)
        if victim is None:
            return False
        self._evict(victim)
        self.evicted += 1
        return True

    def admitted(self, seq: Any, found: Point | None, first: bool) -> None:
        """The request was admitted, resuming from ``found``. Chooses where it will keep checkpoints.

        Args:
            seq: the request.
            found: where it resumes.
            first: whether this is its first admission; only these count as hits.
        """
        prompt = self._prompts.get(seq.seq_id)
        if prompt is None:
            return
        prompt.waits = False
        self._release_wanted(prompt)
        start = 0
        recalled, prompt.recalled = prompt.recalled, None
        if found is not None:
            start = found.position
            if first:
                self.hit_tokens += start
            if self.host is not None:
                if first and recalled is not None and recalled[0] is found:
                    self.host.hit_tokens += start - recalled[1]
                self.host.spare(found)
            found.touched_s = found.active_s = self.now_s
            self._reused_copy(found)
            if found.live:
                self._order.begun(found)
                self._put(found)
            prompt.latest = prompt.latest or found
        self._choose_positions(seq, prompt, start)

    def _choose_positions(self, seq: Any, prompt: Prompt, start: int) -> None:
        policy, end = self.policy, seq.num_known
        inside: list[int] = []
        if "every_n" in self._places:
            inside += every_n(start, end - 1, policy.every)
        if "log_spaced" in self._places:
            inside += log_spaced(start, end, policy.every // 16)
        if "uniform" in self._places:
            inside += uniform(start, end, policy.num_optimal)
        if "optimal" in self._places:
            inside += optimal(start, end, policy.num_optimal, self.depths, self.values.work)
        if policy.retention == "last_k":  # earlier ones would be dropped as soon as the later ones are made
            ends = ("prompt_end" in self._places) + ("generation_end" in self._places)
            inside = sorted(set(inside))[-max(policy.last_k - ends, 1) :]
        for position in inside:
            prompt.wanted_at.setdefault(position, Place.INSIDE)
        for position in getattr(seq.params, "checkpoint_at", ()) if hasattr(seq, "params") else ():
            prompt.wanted_at[position] = Place.EXPLICIT
        if "prompt_end" in self._places:
            prompt.wanted_at.setdefault(end, Place.PROMPT_END)
        for node, place in ((prompt.branch, Place.BRANCH), (prompt.fork, Place.FORK)):
            if node is not None and node.end > start and node.maker is None and not alive(node):
                prompt.wanted_at.setdefault(node.end, place)
                node.maker = seq.seq_id
                prompt.making.append(node)
        prompt.wanted_at = {p: place for p, place in prompt.wanted_at.items() if p > start}

    def left(self, seq: Any) -> None:
        """The request gives its memory back without having ended (preempted, or to be recomputed)."""
        prompt = self._prompts.get(seq.seq_id)
        if prompt is not None:
            prompt.waits, prompt.on_device = True, False
            self._stop_making(prompt)
        self._drop_handed(seq.seq_id)

    def preempting(self, seq: Any) -> None:
        """The request is about to lose its memory: keep its states and KV, if there is host memory for them to go to."""
        prompt, computed = self._prompts.get(seq.seq_id), seq.num_computed
        if self.host is None or prompt is None or not 0 < computed <= seq.prompt_len + seq.num_settled:
            return
        if not self.strategy.at_rest(seq.seq_id, computed):  # this step was to compute more of it
            return
        key = self._new_key()
        self.strategy.checkpoint(seq.seq_id, key)
        point = self._publish(prompt, seq.tokens(0, computed), key, Place.GENERATION_END)
        self._left[seq.seq_id] = point
        self._release_wanted(prompt)
        self._protect(point, prompt)

    def ending(self, seq: Any) -> None:
        """The request ends and is about to give its memory back: keep its states and KV."""
        if "generation_end" not in self._places or seq.seq_id not in self._prompts:
            return
        if not self.strategy.at_rest(seq.seq_id, seq.num_computed):  # another step has been prepared for it
            return
        key = self._new_key()
        self.strategy.checkpoint(seq.seq_id, key)
        self._handed[seq.seq_id] = (key, seq.num_computed)

    def ended(self, seq: Any) -> None:
        """The request ended and all its tokens are known."""
        prompt = self._prompts.pop(seq.seq_id, None)
        if prompt is None:
            return
        self._release_wanted(prompt)
        self._stop_making(prompt)
        prompt.waits = False
        handed = self._handed.pop(seq.seq_id, None)
        if handed is not None and handed[1] > seq.num_known:  # aborted while its last token was on its way
            self.strategy.drop(handed[0])
        elif handed is not None:
            key, position = handed
            point = self._publish(prompt, seq.tokens(0, position), key, Place.GENERATION_END)
            self._left[seq.seq_id] = point
            if len(self._left) > 1024:
                self._left.popitem(last=False)
        if self.policy.retention == "semantic" and prompt.latest is not None:
            self._keep_semantic(prompt.latest)

    def foretell(self, seq: Any, time_s: float) -> None:
        """What a request left that has ended will be used next at that time, and not again later as far as is known; for the
        bound that knows the future."""
        left = self._left.get(seq.seq_id)
        nodes = left.node.path() if left is not None else ()
        points = [node.point for node in nodes if node.point is not None and (node.point.live or node.point.host)]
        for point in points:
            point.next_use_s = time_s
            self._put_anywhere(point)
        if points and time_s < math.inf:
            heapq.heappush(self._foretold, (time_s, seq.seq_id, points))

    def _forget_past(self) -> None:
        while self._foretold and self._foretold[0][0] <= self.now_s:
            time_s, _, points = heapq.heappop(self._foretold)
            for point in points:
                if point.next_use_s == time_s:
                    point.next_use_s = math.inf
                    self._put_anywhere(point)

    def _put_anywhere(self, point: Point) -> None:
        if point.live:
            self._put(point)
        if self.host is not None and point.host is not None:
            self.host.store.touched(point.host, self.now_s)

    # -- checkpoints of a step -------------------------------------------------------------------------------------

    def plan(self, items: Iterable[Scheduled]) -> list[Planned]:
        """The checkpoints that a step is to make; those inside a chunk take blocks of their own, and are not made where there
        is no memory."""
        planned = []
        for item in items:
            prompt = self._prompts.get(item.seq.seq_id)
            if prompt is None or not prompt.wanted_at:
                continue
            for position in sorted(p for p in prompt.wanted_at if p <= item.end):
                place = prompt.wanted_at.pop(position)
                made = position > item.start and not self._lives(prompt, position)
                made = made and (place is not Place.FORK or bool(self._awaited(item.seq)))
                if made:
                    inside, key = position < item.end, self._new_key()
                    made = not inside or self._reserve(item.seq.seq_id, key, position, place)
                    if made:
                        planned.append(Planned(key, item.seq, position, place, inside))
                if not made:
                    self._stop_making(prompt, position)
        return planned

    def _reserve(self, seq_id: int, key: int, position: int, place: Place) -> bool:
        """Blocks for a checkpoint inside a chunk: free ones, or those of checkpoints that are worth less."""
        while not self.strategy.reserve_checkpoint(seq_id, key, position):
            if not self.make_room(urgent=False):
                return False
        return True

    def _lives(self, prompt: Prompt, position: int) -> bool:
        walk = self.index.walk(prompt.tokens[:position])
        return walk.node.end == position and alive(walk.node)

    def keep(self, planned: Iterable[Planned]) -> None:
        """Make the checkpoints of a step that was launched: requests admitted after it may resume from them."""
        for key, request, position, place, inside in planned:
            if not inside:
                self.strategy.checkpoint(request.seq_id, key)
            prompt = self._prompts[request.seq_id]
            point = self._publish(prompt, prompt.tokens[:position], key, place)
            self._stop_making(prompt, position)
            for sibling in self._awaited(request) if position == request.fork_at else ():
                if sibling.wanted is not point:
                    self._release_wanted(sibling)
                    self._protect(point, sibling)

    def discard(self, planned: Iterable[Planned], seqs: Iterable[Any] = ()) -> None:
        """Drop the checkpoints of a step that failed, and what its requests left that have ended: they are void."""
        for plan in planned:
            point = self._points.get(plan.key)
            if self.host is not None:
                point = self.host.void(plan.key) or point
            if point is not None and point.live:
                self._evict(point)
            elif plan.key in self.strategy.cached:
                self.strategy.drop(plan.key)
            if (prompt := self._prompts.get(plan.request.seq_id)) is not None:
                self._stop_making(prompt)
        for seq in seqs:
            self._drop_handed(seq.seq_id)
            left = self._left.pop(seq.seq_id, None)
            if left is not None and self.host is not None and left.host is not None:
                self.host.void(left.host.origin)
            if left is not None and left.live:
                self._evict(left)
