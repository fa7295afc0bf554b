"""Manifests: recordings and their texts."""
