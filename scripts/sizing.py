"""How much memory, how many GPUs and how many tokens per second a run takes, by formulas that are shown and tested.

Worked example::

    SHAPES["8B"].parameters                                            # 8.2e9
    training_bytes(SHAPES["8B"], processes=8, recompute=True) / 1e9     # GB on each of 8 GPUs, FSDP2
    decode_rate(SHAPES["8B"], H100, episodes=64, length=2048)           # sampled tokens/s of one GPU

``python -m scripts.sizing`` prints the table of docs/sizing.md. Memory follows from shapes alone. Speed is what a
device's data sheet allows times an *assumed* utilisation: replace ``UTILISATION`` by what you measure.

Test it alone: ``pytest tests/scripts/test_sizing.py``
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A decoder of the Llama and Qwen kind."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    tied: bool
    """The head is the embedding."""

    @property
    def parameters(self) -> int:
        """Weights of all matrices; norms and biases (below 0.1 %) are left out."""
        attention = 2 * self.hidden * self.head_size * (self.heads + self.kv_heads)
        layer = attention + 3 * self.hidden * self.intermediate
        return self.layers * layer + (1 if self.tied else 2) * self.vocab * self.hidden

    def kv_bytes(self, bytes_per_value: int = 2) -> int:
        """Keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_size * bytes_per_value


SHAPES = {
    "0.6B": Shape(28, 1024, 3072, 16, 8, 128, 151_936, tied=True),
    "1.7B": Shape(28, 2048, 6144, 16, 8, 128, 151_936, tied=True),
    "4B": Shape(36, 2560, 9728, 32, 8, 128, 151_936, tied=True),
    "8B": Shape(36, 4096, 12_288, 32, 8, 128, 151_936, tied=False),
    "14B": Shape(40, 5120, 17_408, 40, 8, 128, 151_936, tied=False),
    "32B": Shape(64, 5120, 25_600, 64, 8, 128, 151_936, tied=False),
    "70B": Shape(80, 8192, 28_672, 64, 8, 128, 128_256, tied=False),
}
"""Qwen3 from 0.6B to 32B, and Llama 3 70B, as their ``config.json`` has them."""


@dataclass(frozen=True)
class Device:
    """One GPU, by its data sheet."""

    bytes: float
    flops: float
    """Dense bf16 operations per second."""
    bandwidth: float
    """Bytes per second from its memory."""


H100 = Device(80e9, 989e12, 3.35e12)
UTILISATION = {"train": 0.4, "prefill": 0.5, "decode": 0.6}
"""Assumed share of the data sheet's operations (training, prefill) and bandwidth (decoding)."""
USABLE = 0.9
"""Share of a GPU's memory that can be planned with; the rest goes to the runtime and to fragmentation."""


def training_bytes(
    shape: Shape, *, processes: int = 1, bytes_per_value: int = 4, tokens: int = 8192, recompute: bool = False
) -> float:
    """Memory of one process that trains all weights.

    Weights, gradients and both moments of AdamW have the format of the weights. On several processes they are shared
    out (FSDP2), and each keeps a whole copy to sample with.

    Args:
        shape: of the student.
        processes: that share; 1 shares nothing.
        bytes_per_value: 4 for float32, 2 for bfloat16.
        tokens: ``tokens_per_microbatch``.
        recompute: ``gradient_checkpointing``.
    """
    state = 4 * bytes_per_value * shape.parameters
    if processes > 1:
        state = state // processes + bytes_per_value * shape.parameters
    return state + activation_bytes(shape, tokens, bytes_per_value=bytes_per_value, recompute=recompute)


def shared_bytes(
    student: Shape,
    teachers: Sequence[Shape],
    *,
    offload: bool,
    processes: int = 1,
    bytes_per_value: int = 4,
    tokens: int = 8192,
    recompute: bool = False,
) -> float:
    """Memory of one process that trains and has its teachers too (``teacher_engine=local``), by ``estimator=full``.

    With ``teacher_offload`` the larger of two phases: the largest teacher beside the student's state while it reads,
    and all teachers' heads beside everything while the student learns.

    Args:
        student: the model that is trained.
        teachers: one, or the members of a mixture; in the same format.
        offload: ``teacher_offload``.
        processes, bytes_per_value, tokens, recompute: as for ``training_bytes``.
    """
    learning = training_bytes(
        student, processes=processes, bytes_per_value=bytes_per_value, tokens=tokens, recompute=recompute
    )
    weights = [bytes_per_value * teacher.parameters for teacher in teachers]
    if not offload:
        return learning + sum(weights)
    kept = activation_bytes(student, tokens, bytes_per_value=bytes_per_value, recompute=recompute)
    heads = sum(bytes_per_value * teacher.vocab * teacher.hidden for teacher in teachers)
    return max(learning + heads, learning - kept + max(weights))


def activation_bytes(shape: Shape, tokens: int, *, bytes_per_value: int = 4, recompute: bool = False) -> float:
    """What the backward pass of one micro-batch needs of the forward pass, without the head.

    A layer keeps 7 values per hidden unit, 2 per unit of queries, keys and values, and 4 per intermediate unit (counted
    in the test); with ``recompute`` every layer keeps its input, and one layer at a time all of it.
    """
    attention = shape.head_size * (shape.heads + shape.kv_heads)
    layer = 7 * shape.hidden + 2 * attention + 4 * shape.intermediate
    kept = shape.layers * shape.hidden + layer if recompute else shape.layers * layer
    return float(tokens * kept * bytes_per_value)


def serving_bytes(shape: Shape, *, episodes: int, length: int, bytes_per_value: int = 2) -> float:
    """Memory of a server that samples or scores: weights, and keys and values of all open episodes."""
    return float(shape.parameters * bytes_per_value + episodes * length * shape.kv_bytes(bytes_per_value))


def gpus(needed: float, device: Device = H100) -> int:
    """Fewest GPUs of a server that hold ``needed`` bytes, by tensor parallelism: a power of two."""
    return int(2 ** math.ceil(math.log2(max(1.0, needed / (USABLE * device.bytes)))))


def train_rate(shape: Shape, device: Device = H100, *, recompute: bool = False) -> float:
    """Tokens per second of one GPU: 6 operations per weight and token, 8 with recomputing."""
    return UTILISATION["train"] * device.flops / ((8 if recompute else 6) * shape.parameters)


def score_rate(shape: Shape, device: Device = H100) -> float:
    """Tokens per second that one GPU reads: 2 operations per weight and token."""
    return UTILISATION["prefill"] * device.flops / (2 * shape.parameters)


def decode_rate(
    shape: Shape, device: Device = H100, *, episodes: int = 64, length: int = 2048, bytes_per_value: int = 2
) -> float:
    """Tokens per second that one GPU's worth of a server samples.

    Every step reads all weights, and the keys and values of all running episodes, half their final length on average.
    """
    per_step = serving_bytes(shape, episodes=episodes, length=length // 2, bytes_per_value=bytes_per_value)
    return UTILISATION["decode"] * device.bandwidth * episodes / per_step


def table(episodes: int = 64, length: int = 4096) -> str:
    """The table of docs/sizing.md, in Markdown."""
    lines = [
        "| model | weights | train on 1 | train on 8, each | server, GPUs | train tok/s | score tok/s | sample tok/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, shape in SHAPES.items():
        alone, shared = (training_bytes(shape, processes=n, bytes_per_value=2, recompute=True) for n in (1, 8))
        server = serving_bytes(shape, episodes=episodes, length=length)
        rates = (
            train_rate(shape, recompute=True), score_rate(shape), decode_rate(shape, episodes=episodes, length=length)
        )  # fmt: skip
        cells = [name, f"{shape.parameters / 1e9:.2f} G", _memory(alone), _memory(shared)]
        cells += [f"{_memory(server)}, {gpus(server)}", *(f"{rate:,.0f}" for rate in rates)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _memory(needed: float) -> str:
    return f"{needed / 1e9:,.0f} GB"


if __name__ == "__main__":
    print(table())
