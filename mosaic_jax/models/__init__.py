"""Networks (flax linen): classifiers, the DCGAN pair and the meta heads."""

import flax.linen as nn

Module = nn.Module
