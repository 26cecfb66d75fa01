"""LLM: several outputs of a prompt, pinned prompts and prefix policies, as a user meets them."""

import pytest

from hybridcache import LLM, SamplingParams
from hybridcache.errors import UserError
from hybridcache.prefix.policy import PrefixPolicy

SYSTEM = list(range(100))


def make_llm(**options) -> LLM:
    return LLM("tiny", **{"cache_bytes": 4 << 20, "dtype": "float64", "device": "cpu", **options})


@pytest.fixture(scope="module")
def llm() -> LLM:
    return make_llm()


def test_several_outputs_of_each_prompt(llm):
    params = [SamplingParams(max_tokens=6, temperature=0.9, seed=5, n=3), SamplingParams(max_tokens=4, n=2)]
    first, second = llm.generate([SYSTEM, "The pool"], params, progress=False)
    assert [output.index for output in first.outputs] == [0, 1, 2]
    assert len({tuple(output.token_ids) for output in first.outputs}) == 3
    assert second.outputs[0].text == second.outputs[1].text
    assert (first.text, first.token_ids) == (first.outputs[0].text, first.outputs[0].token_ids)
    assert first.outputs[2].text == llm.tokenizer.decode(first.outputs[2].token_ids)
    assert [output.refound_tokens for output in first.outputs] == [0, 99, 99]
    assert [output.hit_tokens for output in first.outputs] == [0, 0, 0]
    alone = SamplingParams(max_tokens=6, temperature=0.9, seed=5)
    assert llm.generate([SYSTEM], alone, progress=False)[0].token_ids == first.token_ids
    assert not llm.engine.sequences
    with pytest.raises(AttributeError, match="no attribute 'txt'"):
        _ = first.txt


def test_a_stream_tells_outputs_apart(llm):
    params = SamplingParams(max_tokens=5, temperature=0.9, seed=2, n=2)
    wanted = llm.generate([SYSTEM, SYSTEM[:5]], params, progress=False)
    texts = {(i, k): "" for i in range(2) for k in range(2)}
    whole = {}
    for piece in llm.stream([SYSTEM, SYSTEM[:5]], params):
        texts[piece.index, piece.output_index] += piece.text
        if piece.output is not None:
            assert piece.index not in whole
            whole[piece.index] = piece.output
    for i, output in enumerate(wanted):
        assert [c.token_ids for c in whole[i].outputs] == [c.token_ids for c in output.outputs]
        assert [texts[i, k] for k in range(2)] == [c.text for c in output.outputs]
    assert not llm.engine.sequences


def test_an_abort_in_a_stream_ends_all_outputs_of_the_prompt(llm):
    stream = llm.stream([SYSTEM, SYSTEM[:5]], SamplingParams(max_tokens=9, n=3, ignore_eos=True))
    next(stream)
    stream.abort(0)
    stream.abort(0)
    pieces = list(stream)
    ended = [piece for piece in pieces if piece.index == 0 and piece.token_id is None]
    assert [piece.output_index for piece in ended] == [0, 1, 2]
    assert {c.finish_reason for c in ended[-1].output.outputs} == {"abort"}
    others = next(piece.output for piece in pieces if piece.index == 1 and piece.output is not None)
    assert [len(c.token_ids) for c in others.outputs] == [9, 9, 9]
    assert not llm.engine.sequences


def test_a_pinned_prompt_is_resumed_from_whatever_is_evicted():
    llm = make_llm(cache_bytes=1 << 20, prefix=True)
    pin = llm.pin(SYSTEM)
    assert pin.positions == (64, 100)
    with llm.stream([[200 + i] * 120 for i in range(30)], SamplingParams(max_tokens=3)) as stream:
        for _ in stream:
            llm.engine.prefix.check()
    assert llm.engine.prefix.evicted > 0
    outputs = llm.generate([[*SYSTEM, 7], [*SYSTEM[:99], 1, 2]], progress=False)
    assert [output.hit_tokens for output in outputs] == [100, 64]
    again = llm.pin(SYSTEM)
    llm.unpin(pin)
    assert len(llm.engine.prefix.pinned(again)) == 2
    assert all(point.pinned for point in llm.engine.prefix.pinned(again))
    llm.unpin(again)
    assert not any(point.pinned for point in llm.engine.prefix.points)
    llm.engine.prefix.check()
    with pytest.raises(UserError, match="is not pinned"):
        llm.unpin(again)


def test_a_running_request_comes_before_a_pin_which_is_made_again():
    llm = make_llm(cache_bytes=1 << 20)
    pin = llm.pin(SYSTEM)
    limit = llm.strategy.request_limit()
    llm.generate([[3] * (limit - 20)], SamplingParams(max_tokens=20, ignore_eos=True), progress=False)
    assert not llm.engine.prefix.pinned(pin)
    first = llm.generate([[*SYSTEM, 9]], progress=False)[0]
    assert [point.position for point in llm.engine.prefix.pinned(pin)] == [64]
    second = llm.generate([[*SYSTEM, 9]], progress=False)[0]
    assert (first.hit_tokens, second.hit_tokens) == (0, 64)
    assert first.token_ids == second.token_ids


def test_policies_as_a_user_gives_them():
    assert make_llm(prefix=False).engine.prefix.policy.placement == ()
    assert make_llm(prefix=True).engine.prefix.policy == PrefixPolicy()
    assert make_llm(prefix={"placement": ["prompt_end"], "last_k": 3}).engine.prefix.policy.last_k == 3
    policy = PrefixPolicy(placement=("prompt_end",), eviction="lru")
    llm = make_llm(prefix=policy)
    assert llm.engine.prefix.policy is policy
    llm.generate([SYSTEM], progress=False)
    assert llm.generate([[*SYSTEM, 5]], progress=False)[0].hit_tokens == 100


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("lru", "prefix='lru': give True"),
        (3, "prefix=3: give True"),
        ({"evict": "lru"}, r"prefix\.evict='lru': is no field.*placement"),
        ({"eviction": "mru"}, r"prefix\.eviction='mru': choose one of lru"),
        ({"every": 100}, r"prefix\.every=100: give a multiple of 64"),
    ],
)
def test_other_policies_are_refused(prefix, message):
    with pytest.raises(UserError, match=message):
        make_llm(prefix=prefix)


def test_prompts_that_cannot_be_pinned(llm):
    with pytest.raises(UserError, match="prompt='2 prompts': give one"):
        llm.pin(["a", "b"])
    with pytest.raises(UserError, match=r"prompts\[0\]"):
        llm.pin([1] * 10**6)
    assert not llm.engine.prefix._pins._pins
