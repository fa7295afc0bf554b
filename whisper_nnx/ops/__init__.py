"""Matrix products, attention and warping, computed in the way that the processor at hand does best."""
