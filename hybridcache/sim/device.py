"""DeviceSpec: what a simulated device can do, as rates with their sources and efficiencies."""

from dataclasses import dataclass, fields

from hybridcache.errors import bad, number


@dataclass(frozen=True)
class DeviceSpec:
    """Rates of one device.

    Defaults are those of an NVIDIA H100 SXM (80 GB), measured with torch 2.11 and Triton 3.6 unless a field says
    otherwise. An *efficiency* is the fraction of the rate that an operation's kernels reach; calibrate them for other
    kernels.

    Raises:
        UserError: a rate or efficiency out of range.
    """

    name: str = "H100"
    memory_bytes: float = 80 * 2**30
    """Of one device."""
    bandwidth: float = 3.05e12
    """Bytes per second, read plus written, of a large device copy."""
    flops: float = 723e12
    """bf16 matrix multiplication (large, square), FLOP per second."""
    dense_efficiency: float = 0.90
    """Dense weights read at small batch, of ``bandwidth``. Assumed, not measured."""
    dense_matmul_efficiency: float = 0.80
    """Dense layers and the head at large batch, of ``flops``. Assumed, not measured."""
    expert_efficiency: float = 0.83
    """Expert weights read, of ``bandwidth``: grouped_mm, 512 experts, 32 to 1,024 tokens (606 us where 503 is the floor)."""
    expert_matmul_efficiency: float = 0.39
    """Expert multiplication, of ``flops``: the same at 8,192 tokens (283 TFLOP/s)."""
    kv_efficiency: float = 0.92
    """KV read by paged decode, of ``bandwidth``: 64 x 4,096 tokens (2.8 TB/s)."""
    prefill_attention_efficiency: float = 0.57
    """Causal paged prefill, of ``flops``: plain Triton, 1 x 8,192 tokens (415 TFLOP/s)."""
    state_efficiency: float = 0.90
    """Recurrent states read and written by decode, of ``bandwidth``: 64 fp32 states with conv, 100.5 us a layer."""
    state_prefill_efficiency: float = 0.095
    """Chunked delta rule, of ``flops``: vLLM 0.25.1's Triton kernels, 1 x 32,768 tokens (2.76 ms a layer)."""
    step_overhead_s: float = 1.9e-3
    """Host, sampling and launch time of a step that the device does not hide: vLLM 0.25.1 at batch 1, 2.56 ms a token on
    Qwen3-Next cut to 8 layers, less the other terms."""
    host_bandwidth: float = 50e9
    """Bytes per second and direction between the device and pinned host memory: a PCIe 5 x16 slot reaches 50 to 55 GB/s."""
    link_bandwidth: float = 450e9
    """Bytes per second and direction between devices: NVLink 4's data sheet. Not measured."""
    collective_latency_s: float = 10e-6
    """Of one all-reduce. Assumed, not measured."""

    def __post_init__(self) -> None:
        for field in fields(self):
            key, value = f"device.{field.name}", getattr(self, field.name)
            if field.name != "name":
                positive = not field.name.endswith("_s")
                number(key, value, above=positive, fix="give a positive number" if positive else "")
            if field.name.endswith("efficiency") and value > 1:
                raise bad(key, value, "give a fraction of the rate, above 0 and at most 1")
