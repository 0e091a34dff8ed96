"""Width of each client's network, for algorithms that cut narrow networks out."""

import dataclasses

from mosaic_jax.core import schema


def _are_rates(value: tuple) -> bool:
    return len(value) > 0 and all(type(x) in (int, float) and 0 < x <= 1 for x in value)


@dataclasses.dataclass(frozen=True)
class Budgets(schema.Group):
    """The rates of the clients: fractions of every hidden layer's channels.

    A list can express any rule. DFRD's `2^-min(4, floor(rho i / N))` (Luo et al., 2023)
    for N = 10 clients and rho = 5, say, are the ten rates 1, 1, 1/2, 1/2, 1/4, 1/4,
    1/8, 1/8, 1/16, 1/16.
    """

    rates: tuple = schema.field(
        (1.0, 0.5, 0.25, 0.125, 0.0625),
        "numbers in (0, 1], at least one",
        _are_rates,
        "shares of every hidden layer's channels, dealt to the clients in turn",
    )

    def of_clients(self, num_clients: int) -> tuple[float, ...]:
        """The rate of each client: `rates` in turn."""
        count = len(self.rates)
        return tuple(float(self.rates[i % count]) for i in range(num_clients))
