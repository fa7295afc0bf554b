"""The network: its shape, its layers, its cache."""
