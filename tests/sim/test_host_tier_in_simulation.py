"""The host tier in simulation: copies take time, and only the request that needs one waits."""

from test_sim import cost_model, hybrid_spec

from hybridcache.prefix.cache import PrefixCache
from hybridcache.prefix.host_tier import HostTier
from hybridcache.prefix.policy import PrefixPolicy
from hybridcache.sim.simulator import simulate
from hybridcache.strategies import build
from hybridcache.workloads import build_workload


def test_in_simulation_a_request_waits_for_its_copy_and_no_other_does():
    """The same conversations on a fast and a slow link: what is found is the same, later turns wait longer."""
    ttft, hits = [], []
    for bandwidth in (1e12, 1e6):
        strategy = build("byte_exact", spec=hybrid_spec(), budget_bytes=2 * hybrid_spec().request_bytes(400))
        costs = cost_model(host_bandwidth=bandwidth)
        chosen = PrefixPolicy(placement=("generation_end",), retention="all", eviction="lru", host_bytes=1 << 30)
        cache = PrefixCache(strategy, chosen)
        stream = build_workload(
            "conversations", num_conversations=6, first_tokens=200, rounds=3, output_tokens=7, new_tokens=20
        )
        host = cache.host
        host.deeper = lambda path, live, tokens, host=host: _always(host, path, live, tokens)
        result = simulate(stream, strategy, None, costs, prefix=cache)
        assert len(result.sequences) == 18
        hits.append(cache.host_hit_tokens)
        ttft.append(sum(seq.ttft_s for seq in result.sequences))
        cache.check()
    assert hits[0] > 0 < hits[1]
    assert ttft[1] > ttft[0]


def _always(host, path, live, tokens):
    """As ``HostTier.deeper``, where bringing back is always worth it."""
    host.bytes_per_s, before = 1e18, host.bytes_per_s
    try:
        return HostTier.deeper(host, path, live, tokens)
    finally:
        host.bytes_per_s = before
