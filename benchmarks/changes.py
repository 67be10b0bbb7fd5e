"""How many texts change where only last bits do: with batch, threads, mesh, precision, and the way an id is drawn.

    python -m benchmarks.changes out/runs/RUN

One trained model, one key, the same prompts: the beginnings of stories. A text that differs in one id differs from there on.
`by inverse` draws an id where the cumulative distribution passes one uniform number, `by Gumbel` adds noise to all logits. Both
are here alone, to be compared with the package's draw in two steps.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from natfp_jax.datasets import stories

__all__ = ["main"]

NEW = 48  # tokens of a text


@dataclass(frozen=True)
class Way:
    """How texts are drawn."""

    rows: int = 256
    cores: int | None = None
    mesh: dict[str, int] = field(default_factory=dict)
    dtype: str = "float32"
    cache: str | None = None
    by: str = "two steps"


WAYS = {
    "128 rows": Way(rows=128),
    "64 rows": Way(rows=64),
    "37 rows": Way(rows=37),
    "one core": Way(cores=1),
    "data 2": Way(mesh={"data": 2}),
    "tensor 2": Way(mesh={"tensor": 2}),
    "cache in bfloat16": Way(cache="bfloat16"),
    "computed in bfloat16": Way(dtype="bfloat16"),
}


def _inverse(key: Any, z_V: Any) -> Any:
    import jax
    import jax.numpy as jnp

    p_V = jax.nn.softmax(z_V)
    return jnp.minimum((jnp.cumsum(p_V) < jax.random.uniform(key)).sum(), len(z_V) - 1).astype(jnp.int32)


def _gumbel(key: Any, z_V: Any) -> Any:
    import jax
    import jax.numpy as jnp

    return jax.random.categorical(key, z_V, mode="high").astype(jnp.int32)


DRAWN_BY: dict[str, Callable[[Any, Any], Any]] = {"by inverse": _inverse, "by Gumbel": _gumbel}


def _model(run: Path) -> dict[str, Any]:
    """Which one it is."""
    import jax

    from natfp_jax import config, mesh
    from natfp_jax.trained import trained

    found = trained(run, mesh.make(config.Mesh(), jax.devices()[:1]))
    return {"fingerprint": found.fingerprint, "step": found.step, "prompts": "the first 50 characters of stories(seed=1)"}


def ids_of(run: Path, way: Way, texts: int) -> tuple[np.ndarray, float]:
    """The ids [texts, new], and tokens/s."""
    devices = int(np.prod(list(way.mesh.values()) or [1]))
    if way.cores is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: way.cores])
    if devices > 1:
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    import jax

    from natfp_jax import config, mesh, sample
    from natfp_jax.trained import trained
    from natfp_jax.turns import draw

    if way.by != "two steps":
        sample.categorical = DRAWN_BY[way.by]
    over = mesh.make(config.Mesh(**way.mesh), jax.devices()[:devices])
    found = trained(run, over)
    model, tokenizer = replace(found.model, dtype=way.dtype), found.tokenizer
    sizes = tokenizer.size, tokenizer.padded_size, tokenizer.eos_id, way.rows
    programs = sample.Programs(model, (), *sizes, over, way.cache)
    weights, key = programs.weights([lambda: found.params]), sample.draw_key(0, "changes", 0, (), 0)
    beginnings = [stories.story(1, index)[:50] for index in range(texts)]
    prompts = [[tokenizer.eos_id, *ids] for ids in tokenizer.encode_batch(beginnings)]
    few = 2 * way.rows * devices
    draw(programs, weights, [key], range(few), prompts[:few], NEW)  # compiles
    begun = time.perf_counter()
    (drawn,) = draw(programs, weights, [key], range(texts), prompts, NEW)
    return drawn.id_NW, float(drawn.length_N.sum()) / (time.perf_counter() - begun)


def _apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What it returns in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.changes", description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="a trained run, such as one of the quickstart's")
    parser.add_argument("--texts", type=int, default=30_000)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/changes.*")
    arguments = parser.parse_args()
    rows = []
    for by in ("two steps", *DRAWN_BY):
        base, rate = _apart(ids_of, arguments.run, Way(by=by), arguments.texts)
        for name, way in WAYS.items() if by == "two steps" else [("37 rows", WAYS["37 rows"])]:
            found, other_rate = _apart(ids_of, arguments.run, replace(way, by=by), arguments.texts)
            changed = base != found
            first = np.where(changed.any(axis=1), changed.argmax(axis=1) + 1, NEW)  # tokens until they part
            rows.append(
                {
                    "drawn": by,
                    "change": name,
                    "texts": arguments.texts,
                    "changed": int(changed.any(axis=1).sum()),
                    "rate_text": float(changed.any(axis=1).mean()),
                    "rate_token": float(changed.any(axis=1).sum() / first.sum()),
                    "tokens_per_s": {"before": round(rate), "after": round(other_rate)},
                }
            )
    found_all = {
        "command": "python -m benchmarks.changes "
        + " ".join(arg if place else "RUN" for place, arg in enumerate(sys.argv[1:])),
        "model": _apart(_model, arguments.run),
        "new_tokens": NEW,
        "machine": report.machine(),
        "versions": report.versions(),
        "rows": rows,
    }
    lines = [
        (
            row["drawn"],
            row["change"],
            f"{row['changed']:,} of {row['texts']:,}",
            f"{100 * row['rate_text']:.3f} %",
            f"{row['rate_token']:.1e}",
            f"{row['tokens_per_s']['before']:,}",
            f"{row['tokens_per_s']['after']:,}",
        )
        for row in rows
    ]
    columns = ["drawn", "instead of 256 rows, float32, all cores", "texts changed", "of texts", "a token", "tokens/s", "then"]
    table = report.show(f"texts of {NEW} tokens that change", columns, lines)
    if arguments.save:
        report.save("changes", found_all, table)


if __name__ == "__main__":
    main()
