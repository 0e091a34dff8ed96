"""Seconds that the search for the clients' noise takes before a private study starts.

    python -m benchmarks.private_noise --clients 100

Clients of different sizes, each with 3,000 steps of classifier and GAN and a release of
label counts and prototypes, at epsilon 8. Prints seconds in all and for each client;
writes benchmarks/results/private_noise.json.
"""

import argparse
import time

import numpy as np

from benchmarks import timing
from mosaic_jax.fl import accounting, privacy
from mosaic_jax.fl.accounting import Release

STEPS, BATCH = 3000, 64


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, default=100)
    args = parser.parse_args()
    sizes = np.linspace(50, 2500, args.clients).astype(int)
    steps, once = np.full_like(sizes, STEPS), np.ones_like(sizes)
    releases = [Release(name, steps, BATCH) for name in ("models", "generators")]
    releases += [Release(name, once) for name in ("label_counts", "prototypes")]
    start = time.perf_counter()
    accounting.plan(privacy.Privacy(epsilon=8.0), sizes, releases)
    seconds = time.perf_counter() - start
    found = {"seconds": seconds, "seconds_per_client": seconds / args.clients}
    print(timing.table(("clients", *found), [(args.clients, *found.values())]))
    timing.save("private_noise", {"clients": args.clients, **found})


if __name__ == "__main__":
    main()
