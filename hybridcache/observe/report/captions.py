"""Captions: how to read each figure, and what its words mean."""

CAPTIONS = {
    "waste_by_length": (
        "One live request alone in the pool: the bytes it holds beyond its useful ones, by its length. Lower is better. "
        "Both axes are logarithmic; the vertical one has a zero at its foot where values span more than a factor of 20. "
        "Where two lines coincide, the wide one lies behind the thin one. Bytes that no request can use at all (the wrong "
        "side of a split pool) are not charged to a request here: they show in how many requests fit."
    ),
    "residents_by_length": (
        "Identical requests of one length are admitted until the strategy refuses one. Each cell is their number; its "
        "colour is the share of the most that any fits at that length, and bold marks the most without the byte-exact bound, "
        "which cannot be beaten."
    ),
    "throughput": (
        "Left: output tokens per second from the first arrival to the last finish. Right: how often a running request lost "
        "its memory, and how many tokens had to be computed again for it. Bars are means over repetitions, dots single "
        "repetitions (where they differ)."
    ),
    "step_profile": (
        "Where the time of one engine step goes, from the profiler: kernels by class, and the time in which the device had "
        "nothing to do (on a CPU: operators by class, and Python). A mean over consecutive steps of the first strategy. "
        "Profiling slows the host, so idle time is an upper bound."
    ),
    "latency": (
        "Over all finished requests. The bar spans the middle half (p25 to p75) with the median as a white line; the thin line "
        "spans p5 to p95; the tick on the right is p99. Logarithmic; left is better. A strategy that admits more requests "
        "at once shortens the wait for the first token and lengthens the time between tokens."
    ),
    "memory": (
        "The whole budget at every moment, stacked: useful, padding, reserved, free. The figure above each panel is the mean "
        "useful share over time. A panel ends when its last request finished, so narrower is faster. First repetition."
    ),
    "pool": (
        "Each column is one moment, each row one slice of the budget in address order, coloured by what most of its bytes "
        "hold. Where a strategy shares memory, both colours meet in one row; where it splits memory, they keep apart. The "
        "figure above each panel is the share of slices that held states and KV in turn. Strategies that only count bytes "
        "have no map. First repetition."
    ),
    "queue": (
        "Requests that run and requests that wait. Where two lines coincide, the wide one lies behind the thin one. "
        "A strategy that wastes less memory keeps more running and empties its queue earlier. First repetition."
    ),
}

TERMS = {
    "useful": "the exact recurrent and convolution state of every resident request, and the keys and values of every token "
    "it holds memory for",
    "padding": "what residents hold beyond that: states rounded up to a block or page, the unused tail of a last block",
    "held": "useful + padding",
    "reserved": "bytes that can never hold a request: null blocks, the remainder below one block, gaps between split pools",
    "free": "the rest of the budget",
    "budget": "useful + padding + reserved + free; the same for every strategy",
    "utilization": "useful bytes over the budget, a mean over time",
    "residents": "requests that hold memory at the same time",
    "preemption": "a running request loses all its memory to make room and is computed again later",
    "TTFT": "time to first token: from a request's arrival to its first output token, queueing included",
    "TPOT": "time per output token after the first, a mean within a request",
}

PHASES = {
    "capacity": "How many identical requests fit. Exact: integer accounting, no timing.",
    "simulation": "The real scheduler and strategies under a cost model instead of a device. Compare strategies with each "
    "other; the absolute figures are not measurements.",
    "inference": "The real model on a real device. Times are wall-clock; on a CPU they say nothing about a GPU.",
}
