"""FedPer (Arivazhagan et al., 2019): the last layers stay with their client."""

import dataclasses

from mosaic_jax.fl.algorithms.personal_layers import PersonalLayers


@dataclasses.dataclass(frozen=True)
class FedPer(PersonalLayers):
    """Personal last layers, trained together with the rest (Arivazhagan et al., 2019).

    Only the base layers are sent and averaged, by sample counts.
    """

    per_image = True
