"""Creates Whisper models with random weights and prints their sizes.

python examples/create_models.py                    # tiny, base and small
python examples/create_models.py large-v3-turbo     # any released size
"""

import argparse

import jax
from flax import nnx

from whisper_nnx import RELEASED, create_whisper

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("sizes", nargs="*", default=["tiny", "base", "small"], help=", ".join(RELEASED))
args = parser.parse_args()

for size in args.sizes:
    # create_whisper_tiny() is short for create_whisper("tiny"). Any field of the configuration can be changed
    # (create_whisper("tiny", decoder_layers=2)), and the seed too (rngs=nnx.Rngs(7)).
    model = create_whisper(size)

    params = jax.tree.leaves(nnx.state(model, nnx.Param))  # modules and their states are pytrees of arrays
    count, megabytes = sum(p.size for p in params), sum(p.nbytes for p in params) / 1e6
    config = model.config
    print(
        f"{size:<10}{count:>14,} parameters{megabytes:>8,.0f} MB   width {config.d_model}, "
        f"{config.encoder_layers} + {config.decoder_layers} layers"
    )
