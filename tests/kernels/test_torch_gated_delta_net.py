"""The torch backend's gated delta net against a loop over tokens in float64.

Pools are full of NaN patterns, tables are shuffled, states and rings are compared byte ranges and all, and nothing else
may be written. Shapes: T tokens, B rows, K key heads, V value heads, C channels, W conv width.
"""

import random

import pytest
import torch
from kernel_checks import run
from torch_pools import TOLERANCE, poisoned, read

from hybridcache.kernels.backend import Backend
from hybridcache.memory.layout import StateLayout
from hybridcache.spec.dtypes import torch_dtype

LAYERS = 2


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def rng():
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return random.Random(seed)


def state_layout(
    heads: int, key_heads: int, key_dim: int, value_dim: int, width: int, dtype: str, conv_dtype: str, unit: int
) -> StateLayout:
    """States whose table counts in units of ``1 / unit`` of a slot, with some slack behind each."""
    size = heads * key_dim * value_dim * torch_dtype(dtype).itemsize
    channels = 2 * key_heads * key_dim + heads * value_dim
    conv_offset = -(-size // 128) * 128
    stored = -(-(conv_offset + channels * width * torch_dtype(conv_dtype).itemsize) // 128) * 128
    stride = -(-(stored + 128) // (128 * unit)) * 128
    return StateLayout(
        base=(0, 128),
        stride=stride,
        conv_offset=conv_offset,
        recurrent_shape=(heads, key_dim, value_dim),
        recurrent_dtype=dtype,
        conv_channels=channels,
        conv_kernel=width,
        conv_dtype=conv_dtype,
    )


class NaiveDeltaNet:
    """One request's gated delta net in float64, a token at a time."""

    def __init__(self, layout: StateLayout, weight, a_log, dt_bias) -> None:
        self.layout, self.weight = layout, weight.double()
        self.a_log, self.dt_bias = a_log.double(), dt_bias.double()
        self.state = torch.zeros(layout.recurrent_shape, dtype=torch.float64)
        self.inputs: list[torch.Tensor] = []

    def token(self, x, a, b) -> torch.Tensor:
        heads, key_dim, value_dim = self.layout.recurrent_shape
        width = self.layout.conv_kernel
        self.inputs.append(x.double())
        y = torch.zeros(self.layout.conv_channels, dtype=torch.float64)
        for column in range(width):
            p = len(self.inputs) - width + column
            if p >= 0:
                y += self.weight[:, column] * self.inputs[p]
        y = y * torch.sigmoid(y)
        keys = (self.layout.conv_channels - heads * value_dim) // 2
        q, k, v = y[:keys].view(-1, key_dim), y[keys : 2 * keys].view(-1, key_dim), y[2 * keys :].view(heads, value_dim)
        q, k = (u / torch.sqrt((u * u).sum(1, keepdim=True) + 1e-6) for u in (q, k))
        out = []
        for h in range(heads):
            key_head = h // (heads // q.shape[0])
            decay = torch.exp(-torch.exp(self.a_log[h]) * torch.log1p(torch.exp(a[h].double() + self.dt_bias[h])))
            s = self.state[h] * decay
            value = torch.sigmoid(b[h].double()) * (v[h] - k[key_head] @ s)
            self.state[h] = s + torch.outer(k[key_head], value)
            out.append(q[key_head] * key_dim**-0.5 @ self.state[h])
        return torch.stack(out)


SHAPES = [
    pytest.param(4, 2, 8, 16, 4, id="V4-K2-D8x16-W4"),
    pytest.param(3, 3, 12, 4, 3, id="V3-K3-D12x4-W3"),
    pytest.param(6, 2, 4, 20, 2, id="V6-K2-D4x20-W2"),
    pytest.param(2, 1, 16, 8, 5, id="V2-K1-D16x8-W5"),
]
DTYPES = [
    pytest.param("float64", "float64", "float64", id="fp64"),
    pytest.param("float32", "float32", "float32", id="fp32"),
    pytest.param("bfloat16", "float32", "bfloat16", id="bf16-fp32state"),
    pytest.param("bfloat16", "bfloat16", "bfloat16", id="bf16"),
]


class DeltaNetCase:
    """Random weights, one poisoned pool, and per request its inputs and its naive twin."""

    def __init__(self, rng, shape, dtypes, lengths, unit) -> None:
        heads, key_heads, key_dim, value_dim, width = shape
        self.dtype = torch_dtype(dtypes[0])
        self.layout = state_layout(heads, key_heads, key_dim, value_dim, width, dtypes[1], dtypes[2], unit)
        slots = len(lengths) + 3
        self.buffer = poisoned((slots + 1) * unit * self.layout.stride)
        table = torch.full((len(lengths), LAYERS), -1, dtype=torch.int32)
        numbers = [slot * unit for slot in rng.sample(range(slots), len(lengths))]
        for row, length in enumerate(lengths):
            if length:
                table[row] = numbers[row]
        self.table, self.layer, self.backend = table, rng.randrange(LAYERS), Backend("torch")
        channels = self.layout.conv_channels
        self.weight = (torch.randn(channels, width) * 0.7).to(self.dtype)
        self.a_log, self.dt_bias = torch.rand(heads) * 3 - 1, torch.randn(heads)
        self.x = [torch.randn(n, channels).to(self.dtype) for n in lengths]
        self.a, self.b = ([torch.randn(n, heads).to(self.dtype) for n in lengths] for _ in range(2))
        self.done = [0] * len(lengths)
        naive = [NaiveDeltaNet(self.layout, self.weight, self.a_log, self.dt_bias) for _ in lengths]
        self.expected, self.naive = [], naive
        self.states: list[list[torch.Tensor]] = []
        for row in range(len(lengths)):
            outs, states = [], []
            for x, a, b in zip(self.x[row], self.a[row], self.b[row]):
                outs.append(naive[row].token(x, a, b))
                states.append(naive[row].state.clone())
            self.expected.append(outs)
            self.states.append(states)

    def prefill(self, rows: list[int], counts: list[int], padding_tokens: int = 2) -> None:
        """Run the next ``counts`` tokens of each row, and compare. Rows without a state get padding tokens of NaN."""
        parts: tuple[list, list, list] = ([], [], [])
        lengths = []
        for row, count in zip(rows, counts):
            count = count if self.table[row, 0] >= 0 else padding_tokens
            lengths.append(count)
            for part, source in zip(parts, (self.x, self.a, self.b)):
                if self.table[row, 0] >= 0:
                    part.append(source[row][self.done[row] : self.done[row] + count])
                else:
                    part.append(torch.full((count, source[row].shape[1]), float("nan"), dtype=self.dtype))
        x, a, b = (torch.cat(part) for part in parts)
        offsets = torch.tensor([0, *lengths]).cumsum(0).int()
        start = torch.tensor([self.done[row] for row in rows], dtype=torch.int32)
        out = run(
            self.backend,
            "gdn_prefill",
            self.buffer,
            self.layout,
            self.layer,
            x,
            self.weight,
            a,
            b,
            self.a_log,
            self.dt_bias,
            self.table[rows],
            self.table[rows],
            offsets,
            start,
        )
        self.compare(rows, lengths, out.split(lengths))

    def decode(self, rows: list[int]) -> None:
        live = [self.table[row, 0] >= 0 for row in rows]
        x, a, b = (
            torch.stack(
                [
                    source[row][self.done[row]]
                    if ok
                    else torch.full(source[row].shape[1:], float("nan")).to(self.dtype)
                    for row, ok in zip(rows, live)
                ]
            )
            for source in (self.x, self.a, self.b)
        )
        out = run(
            self.backend,
            "gdn_decode",
            self.buffer,
            self.layout,
            self.layer,
            x,
            self.weight,
            a,
            b,
            self.a_log,
            self.dt_bias,
            self.table[rows],
            self.table[rows],
            torch.tensor([self.done[row] for row in rows]),
        )
        self.compare(rows, [1] * len(rows), out.split(1))

    def compare(self, rows, counts, outs) -> None:
        tolerance = TOLERANCE[self.dtype]
        for row, count, out in zip(rows, counts, outs):
            assert out.dtype == self.dtype
            if self.table[row, 0] < 0:
                continue
            expected = torch.stack(self.expected[row][self.done[row] : self.done[row] + count])
            torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
            self.done[row] += count
            self.compare_state(row, tolerance)
        self.compare_untouched()

    def compare_state(self, row: int, tolerance: float) -> None:
        layout, done = self.layout, self.done[row]
        at = layout.address(self.layer, int(self.table[row, self.layer]))
        expected = self.states[row][done - 1]
        state = read(self.buffer, at, expected.numel(), layout.recurrent_dtype).view_as(expected)
        torch.testing.assert_close(state, expected, rtol=tolerance, atol=tolerance)
        size = torch_dtype(layout.conv_dtype).itemsize
        for p in range(max(done - layout.conv_kernel, 0), done):
            column = at + layout.conv_offset + p % layout.conv_kernel * layout.conv_channels * size
            ring = read(self.buffer, column, layout.conv_channels, layout.conv_dtype)
            assert torch.equal(ring, self.x[row][p].double()), f"ring column of position {p}"

    def compare_untouched(self) -> None:
        """Nothing but the rows' states has been written, and a ring column without a position is as it was."""
        expected = self.buffer.clone()
        layout = self.layout
        column = layout.conv_channels * torch_dtype(layout.conv_dtype).itemsize
        size = torch_dtype(layout.recurrent_dtype).itemsize
        heads, key_dim, value_dim = layout.recurrent_shape
        written = torch.zeros(self.buffer.numel(), dtype=torch.bool)
        for row, done in enumerate(self.done):
            if done:
                at = layout.address(self.layer, int(self.table[row, self.layer]))
                written[at : at + heads * key_dim * value_dim * size] = True
                ring = at + layout.conv_offset
                written[ring : ring + min(done, layout.conv_kernel) * column] = True
        expected[~written] = 0xFF
        assert torch.equal(self.buffer, expected)


@pytest.mark.parametrize("shape", [p.values for p in SHAPES], ids=[p.id for p in SHAPES])
@pytest.mark.parametrize("dtypes", [p.values for p in DTYPES], ids=[p.id for p in DTYPES])
def test_gdn_decode_from_the_first_token(rng, shape, dtypes):
    lengths = [7, 0, 3, 7, 5]
    case = DeltaNetCase(rng, shape, dtypes, lengths, unit=rng.choice([1, 2, 3]))
    for _ in range(max(lengths)):
        rows = [row for row in range(len(lengths)) if lengths[row] == 0 or case.done[row] < lengths[row]]
        rng.shuffle(rows)
        case.decode(rows)
    assert case.done == lengths
    assert case.backend.launches == {"gdn_decode[torch]": max(lengths)}


@pytest.mark.parametrize("shape", [p.values for p in SHAPES], ids=[p.id for p in SHAPES])
@pytest.mark.parametrize("dtypes", [p.values for p in DTYPES], ids=[p.id for p in DTYPES])
def test_gdn_prefill_of_several_rows(rng, shape, dtypes):
    lengths = [65, 1, 0, 64, 2, 130, 63]
    case = DeltaNetCase(rng, shape, dtypes, lengths, unit=rng.choice([1, 2]))
    rows = rng.sample(range(len(lengths)), len(lengths))
    case.prefill(rows, [lengths[row] for row in rows])
    assert case.done == lengths
    assert case.backend.launches == {"gdn_prefill[torch]": 1}


@pytest.mark.parametrize("dtypes", [p.values for p in DTYPES], ids=[p.id for p in DTYPES])
def test_gdn_prefill_resumes_where_another_step_stopped(rng, dtypes):
    """Chunks cut anywhere, prefill and decode in turn, rows at their own pace."""
    shape = rng.choice([p.values for p in SHAPES])
    lengths = [rng.randint(140, 200), 0, rng.randint(60, 70), 128]
    case = DeltaNetCase(rng, shape, dtypes, lengths, unit=1)
    case.prefill([2, 1, 3], [1, 0, 64])
    while True:
        rows = [row for row in range(len(lengths)) if lengths[row] == 0 or case.done[row] < lengths[row]]
        if rows == [1]:
            break
        rng.shuffle(rows)
        if rng.random() < 0.3:
            case.decode(rows)
        else:
            left = [lengths[row] - case.done[row] for row in rows]
            case.prefill(rows, [min(n, rng.choice([1, 2, 3, 37, 63, 64, 65])) for n in left])
    assert case.done == lengths


def test_gdn_of_padding_rows_only(rng):
    case = DeltaNetCase(rng, SHAPES[0].values, DTYPES[1].values, [0, 0], unit=1)
    case.prefill([0, 1], [0, 0])
    case.decode([0, 1])
    assert (case.buffer == 0xFF).all()


def test_gdn_prefill_in_chunks_of_64_repeats_the_whole(rng):
    """Chunks lie on absolute positions, so cutting a prompt at multiples of 64 changes no operand of the arithmetic."""
    lengths = [193]
    whole = DeltaNetCase(rng, SHAPES[0].values, DTYPES[0].values, lengths, unit=1)
    whole.prefill([0], [193])
    buffer = whole.buffer.clone()
    whole.buffer.fill_(0xFF)
    whole.done = [0]
    for count in (64, 128, 1):
        whole.prefill([0], [count])
    state_bytes = whole.layout.conv_offset
    at = whole.layout.address(whole.layer, int(whole.table[0, whole.layer]))
    a, b = (read(x, at, state_bytes // 8, "float64") for x in (buffer, whole.buffer))
    torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)
