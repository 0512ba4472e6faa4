"""JAX's jitted batch norm, forward and backward, on a CPU: microseconds of one call.

Reads a list of [channels last, shape, form] on standard input and prints a dictionary of its
entries. It runs in an environment of its own, which has jax and nothing of this package:
``python bench/peers/jax_norm.py THREADS``.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time


def main() -> None:
    """Time each entry; the number of threads has to be set before jax is imported."""
    threads = int(sys.argv[1])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    os.environ["JAX_PLATFORMS"] = "cpu"
    found = {
        json.dumps([last, shape, form]): measured(shape, form, last=last)
        for last, shape, form in json.load(sys.stdin)
    }
    print(json.dumps(found))


def measured(shape: list[int], form: str, *, last: bool) -> float:
    """Microseconds of one call, the median of 15 times three."""
    import jax
    import jax.numpy as jnp

    axis = len(shape) - 1 if last else 1
    laid = [shape[0], *shape[2:], shape[1]] if last else shape
    axes = tuple(i for i in range(len(shape)) if i != axis)
    along = [shape[1] if i == axis else 1 for i in range(len(shape))]

    def norm(leaves):
        x, weight, bias, *residual = leaves
        mean = x.mean(axes, keepdims=True)
        var = jnp.square(x - mean).mean(axes, keepdims=True)
        out = (x - mean) * jax.lax.rsqrt(var + 1e-5)
        out = sum(residual, out * weight.reshape(along) + bias.reshape(along))
        return jnp.maximum(out, 0) if "ReLU" in form else out

    @jax.jit
    def both(leaves, grad):
        out, back = jax.vjp(norm, leaves)
        return out, back(grad)

    x, residual, grad = (
        jax.random.normal(key, laid) for key in jax.random.split(jax.random.key(0), 3)
    )
    leaves = [x, jnp.ones(shape[1]), jnp.zeros(shape[1]), *([residual] if "add" in form else [])]
    jax.block_until_ready(both(leaves, grad))
    times = []
    for _ in range(15):
        start = time.perf_counter()
        for _ in range(3):
            jax.block_until_ready(both(leaves, grad))
        times.append((time.perf_counter() - start) / 3 * 1e6)
    return statistics.median(times)


if __name__ == "__main__":
    main()
