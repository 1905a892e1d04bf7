"""Times iterations of a real transformer: batched decode and chunked prefill over a KV cache, random weights.

    python -m training.profiling.step_times --device cuda --out steps.csv
    jevons profile fit steps.csv --base llama-3.1-8b-h100 --out mine.yaml

The shape is Llama-3.1-8B's by default, in bf16, with PyTorch's own attention kernels. It is what a step costs without
an engine around it: no scheduler, no sampling beyond argmax, no paging. ``--tiny`` runs the same code on a CPU in
seconds, to check it. This module must not know about profiles or fits.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention, silu

COLUMNS = (
    "device",
    "shape",
    "prefill_tokens",
    "prefix_tokens",
    "decode_requests",
    "context_tokens",
    "step_ms",
    "spread",
)
WARM_UPS = 2
MEMORY_SHARE = 0.85
"""Of the device's memory that weights and KV cache may take."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder-only transformer with grouped-query attention."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int

    @property
    def kv_bytes_per_token(self) -> int:
        """Of the cache, in 16-bit numbers."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim


LLAMA_8B = Shape("llama-3.1-8b", 32, 4096, 32, 8, 128, 14336, 128256)
TINY = Shape("tiny", 2, 64, 4, 2, 16, 128, 512)


@dataclass(frozen=True)
class Iteration:
    """One engine iteration: a prefill chunk of one sequence, and sequences that decode one token each."""

    prefill_tokens: int
    prefix_tokens: int
    decode_requests: int
    context_tokens: int


class Transformer:
    """Random weights and a KV cache of one slot per sequence.

    Args:
        shape: sizes.
        sequences: slots of the cache.
        length: tokens of a slot.
        device: where it lives.
        dtype: of weights and cache.
    """

    def __init__(self, shape: Shape, sequences: int, length: int, device: torch.device, dtype: torch.dtype) -> None:
        def weight(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, device=device, dtype=dtype) / math.sqrt(columns)

        self.shape = shape
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.embedding = weight(shape.vocabulary, shape.hidden)
        self.layers = [
            {
                "qkv": weight(queries + 2 * keys, shape.hidden),
                "out": weight(shape.hidden, queries),
                "gate_up": weight(2 * shape.intermediate, shape.hidden),
                "down": weight(shape.hidden, shape.intermediate),
            }
            for _ in range(shape.layers)
        ]
        self.cache = torch.zeros(
            shape.layers, 2, sequences, shape.kv_heads, length, shape.head_dim, device=device, dtype=dtype
        )
        positions = torch.arange(length, device=device, dtype=torch.float32)
        frequencies = 500_000.0 ** (-torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim)
        angles = torch.outer(positions, frequencies)
        self.cosine, self.sine = angles.cos().to(dtype), angles.sin().to(dtype)

    @torch.inference_mode()
    def step(self, iteration: Iteration) -> Tensor:
        """Run one iteration; the next token of every sequence in it."""
        decodes, context, chunk = iteration.decode_requests, iteration.context_tokens, iteration.prefill_tokens
        device = self.embedding.device
        positions = torch.cat(
            [
                torch.full((decodes,), context, device=device),
                torch.arange(iteration.prefix_tokens, iteration.prefix_tokens + chunk, device=device),
            ]
        )
        tokens = torch.arange(len(positions), device=device) % self.shape.vocabulary
        hidden = embedding(tokens, self.embedding)
        for index, layer in enumerate(self.layers):
            normed = rms_norm(hidden, hidden.shape[-1:])
            hidden = hidden + linear(self._attend(index, layer["qkv"], normed, positions, iteration), layer["out"])
            gate, up = linear(rms_norm(hidden, hidden.shape[-1:]), layer["gate_up"]).chunk(2, dim=-1)
            hidden = hidden + linear(silu(gate) * up, layer["down"])
        # Only the last token of a prefill chunk is sampled, as engines do.
        sampled = torch.cat([hidden[:decodes], hidden[-1:]]) if chunk else hidden[:decodes]
        chosen: Tensor = linear(rms_norm(sampled, sampled.shape[-1:]), self.embedding).argmax(dim=-1)
        return chosen

    def _attend(self, index: int, qkv: Tensor, hidden: Tensor, positions: Tensor, iteration: Iteration) -> Tensor:
        shape, decodes, context = self.shape, iteration.decode_requests, iteration.context_tokens
        sizes = [shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.kv_heads * shape.head_dim]
        query, key, value = (
            part.view(len(hidden), -1, shape.head_dim) for part in torch.split(linear(hidden, qkv), sizes, dim=-1)
        )
        query, key = self._rotate(query, positions), self._rotate(key, positions)
        keys, values = self.cache[index]
        outputs = []
        if decodes:
            keys[:decodes, :, context] = key[:decodes]
            values[:decodes, :, context] = value[:decodes]
            attended = scaled_dot_product_attention(
                query[:decodes].unsqueeze(2),
                keys[:decodes, :, : context + 1],
                values[:decodes, :, : context + 1],
                enable_gqa=True,
            )
            outputs.append(attended.squeeze(2).flatten(1))
        if iteration.prefill_tokens:
            start, end = iteration.prefix_tokens, iteration.prefix_tokens + iteration.prefill_tokens
            keys[-1, :, start:end] = key[decodes:].transpose(0, 1)
            values[-1, :, start:end] = value[decodes:].transpose(0, 1)
            mask = None
            if start:
                seen = torch.arange(end, device=hidden.device)
                mask = seen[None, :] <= positions[decodes:, None]
            attended = scaled_dot_product_attention(
                query[decodes:].transpose(0, 1).unsqueeze(0),
                keys[-1:, :, :end],
                values[-1:, :, :end],
                attn_mask=mask,
                is_causal=mask is None,
                enable_gqa=True,
            )
            outputs.append(attended.squeeze(0).transpose(0, 1).flatten(1))
        return torch.cat(outputs)

    def _rotate(self, heads: Tensor, positions: Tensor) -> Tensor:
        cosine, sine = self.cosine[positions, None], self.sine[positions, None]
        even, odd = heads[..., 0::2], heads[..., 1::2]
        return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(-2)


def grid(tiny: bool) -> Iterator[Iteration]:
    """Decode-only, prefill-only and mixed iterations."""
    batches = (1, 2, 4) if tiny else (1, 4, 16, 32, 64, 128, 256)
    contexts = (16, 64) if tiny else (128, 1024, 2048, 4096, 8192)
    chunks = (8, 32) if tiny else (64, 256, 512, 1024, 2048, 4096)
    prefixes = (0, 32) if tiny else (0, 2048, 8192)
    for batch, context in itertools.product(batches, contexts):
        yield Iteration(0, 0, batch, context)
    for chunk, prefix in itertools.product(chunks, prefixes):
        yield Iteration(chunk, prefix, 0, 0)
    for chunk, batch, context in itertools.product(chunks[:4], batches[1::2], contexts[:2]):
        yield Iteration(chunk, 0, batch, context)


def time_step_ms(run: Callable[[], object], device: torch.device, repeats: int) -> tuple[float, float]:
    """Median milliseconds of `run`, and the relative distance between its quartiles."""
    for _ in range(WARM_UPS):
        run()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started_s = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - started_s) * 1e3)
    quartiles = statistics.quantiles(times, n=4)
    middle = statistics.median(times)
    return middle, (quartiles[2] - quartiles[0]) / middle


def main(arguments: Sequence[str] | None = None) -> None:
    """Time every iteration of the grid that fits the memory, and write one row each."""
    parser = argparse.ArgumentParser(prog="python -m training.profiling.step_times", description=main.__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True, help="CSV to write, as `jevons profile fit` reads it")
    parser.add_argument("--repeats", type=int, default=20, help="timed runs of each iteration")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape and grid, to check the script on a CPU")
    options = parser.parse_args(arguments)
    if options.repeats < 2:
        raise SystemExit(f"error: --repeats: expected at least 2, got {options.repeats}")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: --device cuda: PyTorch finds no CUDA device here")
    shape = TINY if options.tiny else LLAMA_8B
    iterations = list(grid(options.tiny))
    length = max(max(it.context_tokens + 1, it.prefix_tokens + it.prefill_tokens) for it in iterations)
    sequences = _slots(shape, length, device, max(it.decode_requests for it in iterations) + 1)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = Transformer(shape, sequences, length, device, dtype)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    with options.out.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(COLUMNS)
        for done, it in enumerate(iterations):
            if it.decode_requests + (it.prefill_tokens > 0) > sequences:
                continue
            step_ms, spread = time_step_ms(lambda it=it: model.step(it), device, options.repeats)  # type: ignore[misc]
            writer.writerow(
                [
                    name,
                    shape.name,
                    it.prefill_tokens,
                    it.prefix_tokens,
                    it.decode_requests,
                    it.context_tokens,
                    f"{step_ms:.5f}",
                    f"{spread:.4f}",
                ]
            )
            out.flush()
            print(f"\r{done + 1} of {len(iterations)}", end="", file=sys.stderr, flush=True)
    print(f"\nwrote {options.out}", file=sys.stderr)


def _slots(shape: Shape, length: int, device: torch.device, wanted: int) -> int:
    """Sequences whose cache fits the memory beside the weights, at most `wanted`."""
    if device.type != "cuda":
        return wanted
    free, _ = torch.cuda.mem_get_info(device)
    layer = shape.hidden * (2 * shape.heads * shape.head_dim + 2 * shape.kv_heads * shape.head_dim)
    layer += 3 * shape.hidden * shape.intermediate
    weights = 2 * (shape.layers * layer + shape.vocabulary * shape.hidden)
    return max(2, min(wanted, int((free * MEMORY_SHARE - weights) / (shape.kv_bytes_per_token * length))))


if __name__ == "__main__":
    main()
